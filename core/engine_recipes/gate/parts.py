"""A checkpoint's files against what the source's layout says must be in them: which tensor stands for which weights.

What there must be comes from the source, never from the checkpoint's own config: a checkpoint that describes itself
wrongly agrees with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from ..checkpoint.cast import FLOATS
from ..checkpoint.config import object_of
from ..checkpoint.formats import LINEARS, Scheme
from ..checkpoint.layout import TensorSpec, layout
from ..checkpoint.reader import EMBEDDING, HEAD, ROPE_TABLES, mapping_of
from ..checkpoint.safetensors import SafeFile, TensorInfo
from ..checkpoint.source import SourceCheckpoint, read_json
from ..errors import RequestError
from ..types import Check, Verdict

if TYPE_CHECKING:
    from ..checkpoint.safetensors import Array

Kind = Literal["plain", "fp8", "int8", "int4"]
_AGAIN = "build the checkpoint again"
_CACHE = ("kv_cache_scaling_factor", "k_cache_scaling_factor", "v_cache_scaling_factor")
#: What a quantised layer has beside its weight.
SCALES = ("weights_scaling_factor", "activation_scaling_factor", "prequant_scaling_factor")


_SHOWN = 3


@dataclass(frozen=True)
class Part:
    """What one rank holds of one of the source's tensors.

    Attributes:
        file: the rank's.
        spec: its name in the file, and the pieces of the source that it stands for.
        name: in a checkpoint that is not split.
        kind: how it is stored.
    """

    file: SafeFile
    spec: TensorSpec
    name: str
    kind: Kind

    @property
    def info(self) -> TensorInfo:
        """dtype and shape in the file."""
        return self.file.tensors[self.spec.name]

    @property
    def module(self) -> str:
        """The layer's name in the file, `transformer.layers.0.mlp.fc`."""
        return self.spec.name.rpartition(".")[0]

    @property
    def is_linear(self) -> bool:
        """Whether it is a weight that precisions quantise."""
        return is_linear(self.spec.name)

    def scale(self, what: str) -> Array:
        """A scale of its layer, float32: `weights_scaling_factor` …"""
        import numpy as np

        return self.file.array(f"{self.module}.{what}").astype(np.float32)

    def scales(self) -> Iterator[str]:
        """Names in the file of the scales that belong to it, those of the KV cache to q, k and v."""
        names = [f"{self.module}.{what}" for what in SCALES]
        if self.module.endswith("attention.qkv"):
            names += [f"{self.module.removesuffix('.qkv')}.{what}" for what in _CACHE]
        return (name for name in names if name in self.file.tensors and self.spec.name.endswith(".weight"))


class Parts:
    """An opened checkpoint, part by part. Use as a context manager; arrays must not outlive it.

    Attributes:
        config, scheme: what `config.json` says.
        ranks: the rank files.
        parts: all tensors that can be compared, in file order.
        problems: what cannot be: the tensor and why.
    """

    def __init__(self, folder: Path, source: SourceCheckpoint) -> None:
        self.config = read_json(folder / "config.json")
        self.scheme = Scheme.from_config(object_of(self.config, "quantization"))
        self.parts: list[Part] = []
        self.problems: list[str] = []
        tp_size, pp_size = mapping_of(self.config)
        specs = layout(source.decoder, tp_size, pp_size, bool(self.config.get("use_parallel_embedding", False)))
        with ExitStack() as opened:
            self.ranks = [opened.enter_context(_open(folder, rank)) for rank in range(len(specs))]
            for file, rank, names in zip(self.ranks, specs, _names(source, specs, tp_size), strict=True):
                if source.decoder.tied and HEAD not in file.tensors and EMBEDDING in file.tensors:
                    kept = [pair for pair in zip(rank, names, strict=True) if pair[0].name != HEAD]
                    rank, names = [spec for spec, _ in kept], [name for _, name in kept]
                self._match(file, rank, names)
            self._opened = opened.pop_all()

    def __enter__(self) -> Parts:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._opened.close()

    def _match(self, file: SafeFile, specs: list[TensorSpec], names: list[str]) -> None:
        known = set()
        for spec, name in zip(specs, names, strict=True):
            kind, problem = _kind(file, spec)
            part = Part(file, spec, name, kind)
            known |= {spec.name, *part.scales()}
            if problem:
                self.problems.append(f"{name} {problem}")
            else:
                self.parts.append(part)
        extra = [name for name in file.tensors if name not in known and name.split(".")[-1] not in ROPE_TABLES]
        self.problems += [f"{name} is nothing that the source has" for name in extra]


def check(name: str, problems: Sequence[str], verdict: Verdict = "fail", **more: float | None) -> Check:
    """A check that passes without problems; else it has this verdict and names the first few."""
    problems = list(dict.fromkeys(problems))  # ranks repeat each other
    rest = len(problems) - _SHOWN
    note = "; ".join(problems[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")
    return Check(name, verdict if problems else "pass", note=note, **more)


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a layer that precisions quantise."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.endswith(LINEARS)


def _open(folder: Path, rank: int) -> SafeFile:
    path = folder / f"rank{rank}.safetensors"
    if not path.is_file():
        raise RequestError(f"{path.name} is missing in {folder}", _AGAIN)
    return SafeFile(path)


def _names(source: SourceCheckpoint, ranks: list[list[TensorSpec]], tp_size: int) -> Iterator[list[str]]:
    """The names that each rank's tensors have when nothing is split: a stage holds the next ones in the same order."""
    (whole,) = layout(source.decoder)
    position = 0
    for number, specs in enumerate(ranks):
        yield [spec.name for spec in whole[position : position + len(specs)]]
        position += len(specs) if number % tp_size == tp_size - 1 else 0


def _kind(file: SafeFile, spec: TensorSpec) -> tuple[Kind, str]:
    """How a tensor is stored, and what is wrong with it, in words."""
    info = file.tensors.get(spec.name)
    if info is None:
        return "plain", "is missing"
    if info.shape == spec.shape and info.dtype in FLOATS:
        return "plain", ""
    rows, columns = spec.shape if len(spec.shape) == 2 else (0, 0)
    of_module = {what: file.tensors.get(f"{spec.name.rpartition('.')[0]}.{what}") for what in SCALES}
    weight, prequant = of_module["weights_scaling_factor"], of_module["prequant_scaling_factor"]
    if info.shape == spec.shape and info.dtype == "float8_e4m3fn":
        fits = weight is not None and weight.shape == (1,)
        return "fp8", "" if fits else "is FP8 and has no weights_scaling_factor of one number"
    if info.shape == spec.shape and info.dtype == "int8" and columns:
        fits = weight is not None and weight.shape == (rows,) and (prequant is None or prequant.shape == (columns,))
        return "int8", "" if fits else "is int8 and has no scales that fit its shape"
    if rows % 2 == 0 and info.shape == (rows // 2, columns) and info.dtype in ("int8", "uint8"):
        fits = weight is not None and len(weight.shape) == 2 and weight.shape[0] == rows
        groups = weight.shape[1] if weight is not None and fits else 0
        fits = groups > 0 and columns % groups == 0 and (prequant is None or prequant.shape == (columns,))
        return "int4", "" if fits else "is int4 and has no scales that fit its shape"
    return "plain", f"is {info.dtype} {list(info.shape)}, which cannot be compared with the source's {list(spec.shape)}"
