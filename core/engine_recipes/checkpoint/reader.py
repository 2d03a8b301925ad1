"""Reading a TensorRT-LLM checkpoint as one model, however many ranks it was split over.

Knows the layout and joins by it, quantised tensors as they are: what they mean is the caller's business.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..decoder import Decoder
from ..errors import RequestError
from .config import decoder_from_config, object_of
from .formats import LINEARS, Scheme, stored
from .layout import TensorSpec, layout, stage_layers
from .safetensors import SafeFile, TensorInfo, numpy_dtype
from .source import read_json

if TYPE_CHECKING:
    from .safetensors import Array

#: Rotary tables that NVIDIA's converter stores. Loaders compute them again; they are no weights.
ROPE_TABLES = ("embed_positions", "rotary_inv_freq", "embed_positions_for_gpt_attention")
EMBEDDING = "transformer.vocab_embedding.weight"
HEAD = "lm_head.weight"
_LAYER = re.compile(r"(transformer\.layers\.)([0-9]{1,9})(\..*)")
_AGAIN = "build or copy the checkpoint again"
_MOST_RANKS = 1 << 16


class Checkpoint:
    """An opened checkpoint. Use as a context manager; arrays must not outlive it.

    Names are those of an unsplit checkpoint: layers count through all pipeline stages.

    Attributes:
        folder: where it lies.
        config: its parsed `config.json`.
        decoder: what the model is.
        dtype: of the unquantised tensors.
        quantization: the config's `quantization` object; its `quant_algo` is None if there is none.
        scheme: the same, as far as it says which tensors there are. Its `excluded` are names of each rank.
        tp_size, pp_size: the mapping.
        ranks: the header of every rank file: names as in the file -> where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.tp_size, self.pp_size = mapping_of(self.config)
        self._files: list[SafeFile] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        for rank in range(self.tp_size * self.pp_size):
            self._files.append(_open_rank(self.folder, rank))
        self.ranks: list[Mapping[str, TensorInfo]] = [file.tensors for file in self._files]
        self.decoder: Decoder = decoder_from_config(self.config, self.ranks[0])
        self.dtype: str = self.decoder.dtype
        self.quantization: dict[str, Any] = {"quant_algo": None, **object_of(self.config, "quantization")}
        self.scheme = Scheme.from_config(self.quantization)
        held = sum(map(len, self.ranks))
        if self.decoder.layers > held:  # or laying them out would take for ever
            raise RequestError(
                f"config.json says num_hidden_layers {self.decoder.layers}, and the rank files hold {held} tensors",
                _AGAIN,
            )
        self._places = self._find_places()
        self._specs = self._find_specs()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap all files."""
        for file in self._files:
            file.close()

    def names(self) -> list[str]:
        """Names of all tensors, in file order, first stage first. Of a tied head that the files leave out, too."""
        return list(self._places)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """dtype (numpy's name) and shape of the joined tensor."""
        stage, local = self._place(name)
        info = self.ranks[stage * self.tp_size][local]
        return info.dtype, self._specs[name][0].shape if self._is_split(name) else info.shape

    def is_quantized(self, module: str) -> bool:
        """Whether `quant_algo` is about this linear layer: False for what `exclude_modules` names."""
        _, local = self._places.get(f"{module}.weight", (0, ""))
        return self.scheme.quantises(local.removesuffix(".weight"))

    def array(self, name: str) -> Array:
        """The whole tensor, read-only.

        Mapped and not copied if one rank holds all of it; else joined in memory: q rows of all ranks, then k, then
        v, repeated k/v heads once, padding left out.

        Raises:
            RequestError: no such tensor, or it is split in a way that is not known here.
        """
        import numpy as np

        stage, local = self._place(name)
        files = self._files[stage * self.tp_size : (stage + 1) * self.tp_size]
        if not self._is_split(name):
            return files[0].array(local)
        whole, *parts = self._specs[name]
        dtype, shape = self.info(name)
        joined: Array = np.empty(shape, numpy_dtype(dtype))
        for file, part in zip(files, parts, strict=True):
            _join(joined, whole, file.array(local), part)
            file.forget(local)
        joined.flags.writeable = False
        return joined

    def forget(self, name: str) -> None:
        """Give the tensor's mapped pages back."""
        stage, local = self._place(name)
        for file in self._files[stage * self.tp_size : (stage + 1) * self.tp_size]:
            file.forget(local)

    def _place(self, name: str) -> tuple[int, str]:
        try:
            return self._places[name]
        except KeyError:
            raise RequestError(f"the checkpoint has no tensor {name}", _AGAIN) from None

    def _find_places(self) -> dict[str, tuple[int, str]]:
        """Name -> (pipeline stage, name in that stage's files)."""
        places: dict[str, tuple[int, str]] = {}
        for stage, layers in enumerate(stage_layers(self.decoder.layers, self.pp_size)):
            ranks = self.ranks[stage * self.tp_size : (stage + 1) * self.tp_size]
            for rank, header in enumerate(ranks):
                different = sorted(header.keys() ^ ranks[0].keys())
                if different:
                    raise RequestError(
                        f"rank{stage * self.tp_size + rank}.safetensors and its neighbour differ in {different[0]}",
                        _AGAIN,
                    )
            for local in ranks[0]:
                if local.split(".")[-1] not in ROPE_TABLES:
                    places[_global_name(local, layers)] = (stage, local)
        if self.decoder.tied and HEAD not in places and EMBEDDING in places:
            places[HEAD] = places[EMBEDDING]  # ModelOpt writes no second copy of a Gemma's table
        return places

    def _find_specs(self) -> dict[str, list[TensorSpec]]:
        """Name -> its unsplit layout and its part on each tensor-parallel rank. Empty if nothing is split."""
        if self.tp_size == 1:
            return {}
        (whole,) = layout(self.decoder)
        modules = [name.removesuffix(".weight") for name in self._places]
        plain = tuple(name for name in modules if name.endswith(LINEARS) and not self.is_quantized(name))
        scheme = replace(self.scheme, excluded=plain)
        specs = {tensor.name: [tensor.spec] for tensor in stored(whole, scheme, self.dtype)}
        stages = stage_layers(self.decoder.layers, self.pp_size)
        for rank, parts in enumerate(self.layout()):
            for part in stored(parts, self.scheme, self.dtype):
                specs[_global_name(part.name, stages[rank // self.tp_size])].append(part.spec)
        return specs

    def layout(self) -> list[list[TensorSpec]]:
        """What each rank holds, unquantised."""
        parallel_embedding = bool(self.config.get("use_parallel_embedding", False))
        return layout(self.decoder, self.tp_size, self.pp_size, parallel_embedding)

    def _is_split(self, name: str) -> bool:
        """True if ranks hold different parts of this tensor, False if each holds all of it."""
        if self.tp_size == 1:
            return False
        stage, local = self._places[name]
        headers = self.ranks[stage * self.tp_size : (stage + 1) * self.tp_size]
        shapes = [header[local].shape for header in headers]
        if name in self._specs and shapes == [part.shape for part in self._specs[name][1:]]:
            return self._specs[name][0].pieces != self._specs[name][1].pieces
        files = self._files[stage * self.tp_size : (stage + 1) * self.tp_size]
        if len({(header[local].dtype, header[local].shape) for header in headers}) == 1:
            first, *others = (file.array(local).tobytes() for file in files)
            if all(other == first for other in others):
                return False
        raise RequestError(
            f"{name} is split over {self.tp_size} ranks in a way that is not known here ({list(shapes[0])} each)",
            "build the checkpoint with tp_size 1 to read it as one model",
        )


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder: `config.json` and `rank<r>.safetensors`.

    Raises:
        RequestError: a file is missing or damaged, or config.json leaves out what cannot be guessed.
    """
    return Checkpoint(folder)


def mapping_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(tp_size, pp_size) of a checkpoint's config; without `mapping` it is not split."""
    mapping = object_of(config, "mapping")
    sizes = [mapping.get(key, 1) for key in ("tp_size", "pp_size", "cp_size")]
    if any(type(size) is not int or not 1 <= size <= _MOST_RANKS for size in sizes):
        raise RequestError(f"config.json gives the mapping as {mapping!r}", _AGAIN)
    tp_size, pp_size, cp_size = sizes
    world = mapping.get("world_size", tp_size * pp_size)
    if cp_size != 1 or world != tp_size * pp_size:
        raise RequestError(
            f"config.json says world_size {world}, tp_size {tp_size}, pp_size {pp_size}, cp_size {cp_size}",
            "world_size must be tp_size x pp_size; context parallelism is not supported",
        )
    return tp_size, pp_size


def _open_rank(folder: Path, rank: int) -> SafeFile:
    path = folder / f"rank{rank}.safetensors"
    if not path.is_file():
        raise RequestError(f"{path.name} is missing in {folder}", _AGAIN)
    return SafeFile(path)


def _global_name(local: str, layers: Sequence[int]) -> str:
    match = _LAYER.fullmatch(local)
    if not match:
        return local
    index = int(match[2])
    if index >= len(layers):
        raise RequestError(f"{local}: this pipeline stage has {len(layers)} layers", _AGAIN)
    return f"{match[1]}{layers[index]}{match[3]}"


def _join(joined: Array, whole: TensorSpec, array: Array, part: TensorSpec) -> None:
    """Put the rows and columns that this rank holds where they belong."""
    starts, position = whole.starts, 0
    for piece in part.pieces:
        rows = piece.shape[0]
        first = starts[piece.name] + piece.rows[0]
        target = joined[first : first + rows]
        if piece.columns is not None:
            target = target[:, slice(*piece.columns)]
        target[...] = array[position : position + rows]
        position += rows
