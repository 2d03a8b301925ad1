"""Stage 1 with quantization: from a Hugging Face source and a calibration to a TensorRT-LLM checkpoint, streamed.

The arithmetic is ModelOpt's (`export_tensorrt_llm_checkpoint`), in float32 from the source's own values. Two passes
over the source: the largest magnitude of each weight where scales span whole tensors (FP8), then the weights.
Memory is a few blocks, whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import events
from ..decoder import SAME_INPUT, Decoder
from ..errors import RequestError
from ..facts import cpus
from .blocks import fp8_rounder, largest, pack_rows, quantize_groups
from .convert import Block, ConvertStats, Dtype, blocks, cast_job, forget, rows_of
from .exclude import excluded_linears
from .formats import Scheme, Stored, choose_group_size, stored
from .layout import TensorSpec, layout
from .ranks import room_for, write_ranks
from .source import SourceCheckpoint, not_finite
from .statistics import PREQUANT, Statistics
from .streaming import Job

if TYPE_CHECKING:
    from .safetensors import Array

#: What `quantize` can make, as TensorRT-LLM names it.
Algorithm = Literal["FP8", "W4A16_AWQ"]
#: What keys and values are kept in; none: as the model computes, 16 bits.
CacheDtype = Literal["none", "fp8", "int8"]
E4M3_MAX = 448.0
INT8_MAX = 127.0
FLOAT32_TINY = 2.0**-126
_MOST_WORKERS = 16
_MEASURED_BYTES = 16 << 20  # that a thread looks at at a time
#: An FP8 KV cache whose scale would have to be larger than this loses quality (ModelOpt warns at the same place).
LARGE_CACHE_SCALE = 0.5


def quantize(
    source: SourceCheckpoint,
    out: Path,
    statistics: Statistics,
    algorithm: Algorithm,
    *,
    dtype: Dtype | Literal["auto"] = "auto",
    kv_cache: CacheDtype = "none",
    group_size: int = 0,
    tp_size: int = 1,
    pp_size: int = 1,
    exclude: Sequence[str] = (),
) -> ConvertStats:
    """Write `rank<r>.safetensors` for each rank and then `config.json` into `out`.

    Args:
        source: opened source; its pages are given back as they are used.
        out: an existing folder without rank files.
        statistics: of this very source.
        algorithm: `FP8` needs `input_amax`, `W4A16_AWQ` needs `pre_quant_scale` of each linear layer.
        dtype: of what is not quantised; `auto` is the source's, bfloat16 for float32.
        kv_cache: 8-bit caches need `cache_amax` of each k and v.
        group_size: of int4; 0 is the largest that fits, up to the one that was calibrated for.
        tp_size, pp_size: the mapping.
        exclude: linear layers that stay in `dtype`, see `excluded_linears`.

    Raises:
        RequestError: a mapping, group size or exclusion that does not fit, a statistic that is missing, NaN or inf in
            the source.
        MachineError: not enough free disk.
    """
    excluded = excluded_linears(source.decoder, exclude, pp_size)
    scheme = Scheme(algorithm, None if kv_cache == "none" else kv_cache.upper(), excluded=excluded)
    if algorithm == "W4A16_AWQ":
        most = int(statistics.about.get("group_size") or 128)
        scheme = replace(scheme, group_size=choose_group_size(source.decoder, group_size, tp_size, most))
        if scheme.group_size < 128 and not group_size:
            events.warn(f"group_size is {scheme.group_size}: 128 does not divide every layer's inputs")
    kept = unquantised_dtype(source, dtype)
    ranks = [list(stored(specs, scheme, kept)) for specs in layout(source.decoder, tp_size, pp_size)]
    groups = _quantised_groups(source.decoder, chain.from_iterable(ranks))
    _require_statistics(source, statistics, scheme, chain.from_iterable(groups))
    progress = room_for(ranks, out)
    writer = _Writer(source, statistics, scheme, kept, groups)
    return write_ranks(writer, out, scheme, (tp_size, pp_size), ranks, progress)


def unquantised_dtype(source: SourceCheckpoint, dtype: Dtype | Literal["auto"]) -> Dtype:
    """What `auto` stands for: the dtype of the source's embedding; bfloat16 for float32, as float16 lacks its range."""
    if dtype != "auto":
        return dtype
    embedding = source.tensors[source.decoder.names["embedding"]][1]
    return "float16" if embedding.dtype == "float16" else "bfloat16"


def _quantised_groups(decoder: Decoder, tensors: Iterable[Stored]) -> list[tuple[str, ...]]:
    """Those of `linear_groups`, as far as they are quantised."""
    pieces = chain.from_iterable(tensor.base.pieces for tensor in tensors if tensor.part == "weight")
    linears = {piece.name.removesuffix(".weight") for piece in pieces}
    groups = (tuple(name for name in group if name in linears) for group in linear_groups(decoder))
    return [group for group in groups if group]


def _require_statistics(
    source: SourceCheckpoint, statistics: Statistics, scheme: Scheme, linears: Iterable[str]
) -> None:
    """Look for everything before anything is read or written."""
    for linear in linears:
        if scheme.algorithm == "FP8":
            statistics.number(f"{linear}.input_amax")
            continue
        inputs = source.tensors[f"{linear}.weight"][1].shape[1]
        given = statistics.vector(f"{linear}.{PREQUANT}").shape
        if given != (inputs,):
            raise RequestError(
                f"{PREQUANT} of {linear} has shape {list(given)} and the layer {inputs} inputs",
                "the calibration is of another model, or its authors made a mistake",
            )
    for layer in range(source.decoder.layers if scheme.cache else 0):
        for role in ("k", "v"):
            statistics.number(f"{source.decoder.names[role].format(layer)}.cache_amax")


def _scale(amax: float, most: float) -> float:
    """What a stored number is multiplied by; 1 where there is nothing, or too little for float32 to divide by."""
    return amax / most if amax / most > FLOAT32_TINY else 1.0


@dataclass(frozen=True)
class _Scales:
    """Of one quantised linear layer, FP8: value = stored × scale."""

    weight: float
    input: float


class _Writer:
    """Turns the stored tensors of a rank into jobs."""

    def __init__(
        self,
        source: SourceCheckpoint,
        statistics: Statistics,
        scheme: Scheme,
        dtype: Dtype,
        groups: Sequence[tuple[str, ...]],
    ) -> None:
        self.source, self.statistics, self.scheme, self.dtype = source, statistics, scheme, dtype
        self.workers = max(2, min(_MOST_WORKERS, cpus()))
        self.stats = ConvertStats()
        self._scales = self._measure(groups) if scheme.algorithm == "FP8" else {}
        if scheme.cache:
            _warn_of_cache(source.decoder, statistics, scheme.cache)

    def jobs(self, tensors: Sequence[Stored]) -> Iterator[Iterator[Job]]:
        """The jobs of each tensor, in order."""
        self._group_scales: list[Array] = []
        for tensor in tensors:
            if tensor.part == "plain":
                yield (cast_job(self.source, block, self.dtype, self.stats) for block in self._blocks(tensor.base))
            elif tensor.part == "weight":
                yield self._weight(tensor)
            elif tensor.part == "weights_scaling_factor" and self.scheme.algorithm == "W4A16_AWQ":
                yield iter([_last(tensor, self._take_group_scales)])
            else:
                yield iter([_last(tensor, self._vector_of(tensor))])

    def _blocks(self, spec: TensorSpec) -> Iterator[Block]:
        return blocks(self.source, [spec], self.dtype)

    # --- FP8: one scale a tensor, shared by what TensorRT-LLM runs as one matrix or on one input ------------------

    def _measure(self, groups: Sequence[tuple[str, ...]]) -> dict[str, _Scales]:
        """HF linear layer -> its scales. Reads every weight once, some rows at a time."""
        found = self._largest([name for group in groups for name in group])
        scales: dict[str, _Scales] = {}
        for group in groups:
            weight = max(found[name] for name in group)
            inputs = max(self.statistics.number(f"{name}.input_amax") for name in group)
            scales |= dict.fromkeys(group, _Scales(_scale(weight, E4M3_MAX), _scale(inputs, E4M3_MAX)))
        empty = [name for name, value in found.items() if value == 0]
        if empty:
            events.warn(f"the weights of {len(empty)} layers are zero throughout, first {empty[0]}")
        return scales

    def _largest(self, names: Sequence[str]) -> dict[str, float]:
        """HF linear layer -> the largest magnitude among its weights."""
        parts = [(name, start, stop) for name in names for start, stop in self._row_ranges(f"{name}.weight")]
        found = dict.fromkeys(names, 0.0)
        with ThreadPoolExecutor(self.workers, "measure") as pool:
            values = pool.map(lambda part: self._largest_of(*part), parts)
            for done, ((name, _, _), value) in enumerate(zip(parts, values, strict=True)):
                found[name] = max(found[name], value)
                if done % 64 == 0 or done + 1 == len(parts):
                    events.progress("measuring weights", done + 1, len(parts), "blocks")
        return found

    def _row_ranges(self, tensor: str) -> Iterator[tuple[int, int]]:
        info = self.source.tensors[tensor][1]
        step = max(_MEASURED_BYTES * info.shape[0] // info.nbytes, 1)
        for start in range(0, info.shape[0], step):
            yield start, min(start + step, info.shape[0])

    def _largest_of(self, linear: str, start: int, stop: int) -> float:
        tensor = f"{linear}.weight"
        rows = self.source.array(tensor)
        value = largest(rows[start:stop])
        width = rows[:1].nbytes
        self.source.forget(tensor, start * width, stop * width)
        if not math.isfinite(value):
            raise not_finite(tensor)
        return value

    # --- both -----------------------------------------------------------------------------------------------------

    def _weight(self, tensor: Stored) -> Iterator[Job]:
        prequant = None if self.scheme.algorithm == "FP8" else self._prequant(tensor.base)
        for block in self._blocks(tensor.base):
            yield self._weight_job(tensor, block, prequant)

    def _weight_job(self, tensor: Stored, block: Block, prequant: Array | None) -> Job:
        assert block.piece is not None
        linear = block.piece.name.removesuffix(".weight")
        if prequant is None:
            # the tensor's own dtype: config.json may say another, and tensors may differ
            round_to_fp8 = fp8_rounder(self.source.tensors[block.piece.name][1].dtype, self._scales[linear].weight)
            return Job(
                tensor.name,
                lambda: round_to_fp8(rows_of(self.source, block)),
                lambda: forget(self.source, block),
            )
        scale = prequant[slice(*(block.piece.columns or (0, None)))]
        found: list[Array] = []

        def make() -> Array:
            scales, values = quantize_groups(rows_of(self.source, block), scale, self.scheme.group_size, linear)
            found.append(scales)
            return pack_rows(values)

        def written() -> None:
            self._group_scales += found
            forget(self.source, block)

        return Job(tensor.name, make, written)

    def _take_group_scales(self) -> Array:
        import numpy as np

        scales, self._group_scales = np.concatenate(self._group_scales), []
        return scales

    def _prequant(self, base: TensorSpec) -> Array:
        """What the layer's input is multiplied by, as stored, float32 [in]. q, k and v share their mean."""
        import numpy as np

        from .safetensors import numpy_dtype

        linears = dict.fromkeys(piece.name.removesuffix(".weight") for piece in base.pieces)
        vectors = [self.statistics.vector(f"{linear}.{PREQUANT}") for linear in linears]
        mean: Array = np.stack(vectors).mean(axis=0, dtype=np.float64)
        with np.errstate(over="ignore", under="ignore"):
            scale: Array = mean.astype(numpy_dtype(self.dtype)).astype(np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise RequestError(
                f"{PREQUANT} of {next(iter(linears))} does not fit {self.dtype}", "--set dtype=bfloat16 has room"
            )
        return scale

    def _vector_of(self, tensor: Stored) -> Callable[[], Array]:
        """A small tensor that needs no weights."""
        import numpy as np

        from .safetensors import numpy_dtype

        def make() -> Array:
            linear = tensor.base.pieces[0].name.removesuffix(".weight")
            if tensor.part == "prequant_scaling_factor":
                columns = tensor.base.pieces[0].columns or (0, None)
                return self._prequant(tensor.base)[slice(*columns)].astype(numpy_dtype(self.dtype)).view(np.uint8)
            if tensor.part == "cache_scale":
                return np.array([self._cache_scale(tensor)], np.float32)
            scales = self._scales[linear]
            return np.array([scales.weight if tensor.part == "weights_scaling_factor" else scales.input], np.float32)

        return make

    def _cache_scale(self, tensor: Stored) -> float:
        _, k, v = (piece.name.removesuffix(".weight") for piece in tensor.base.pieces)
        assert self.scheme.cache
        scales = {name: cache_scale(self.statistics, name, self.scheme.cache) for name in (k, v)}
        which = tensor.name.rpartition(".")[2]
        return {"k_cache_scaling_factor": scales[k], "v_cache_scaling_factor": scales[v]}.get(
            which, max(scales.values())
        )


def _last(tensor: Stored, make: Callable[[], Array]) -> Job:
    return Job(tensor.name, make, last=True)


def linear_groups(decoder: Decoder) -> Iterator[tuple[str, ...]]:
    """HF linear layers whose FP8 scales must agree: q, k, v are one matrix; gate and up read one quantised input."""
    for layer in range(decoder.layers):
        for roles in SAME_INPUT:
            yield tuple(dict.fromkeys(decoder.names[role].format(layer) for role in roles))


def cache_scale(statistics: Statistics, linear: str, cache: str) -> float:
    """What a cached key or value is multiplied by when it is read. FP8: never below 1, so that small ones keep their
    relative precision (E4M3 has an exponent); INT8: the largest seen is 127."""
    amax = statistics.number(f"{linear}.cache_amax")
    return max(amax / E4M3_MAX, 1.0) if cache == "FP8" else _scale(amax, INT8_MAX)


def _warn_of_cache(decoder: Decoder, statistics: Statistics, cache: str) -> None:
    if decoder.qkv_bias and not decoder.qk_norm:
        events.warn(
            f"kv_cache={cache.lower()}: q, k and v of this model have biases and no norms, as in Qwen2; its keys are "
            "large in a few channels, and an 8-bit cache is known to turn the text of such models into nonsense"
        )
    layers = [[decoder.names[role].format(layer) for role in ("k", "v")] for layer in range(decoder.layers)]
    amaxs = [max(statistics.number(f"{name}.cache_amax") for name in names) for names in layers]
    large = [layer for layer, amax in enumerate(amaxs) if amax / E4M3_MAX > LARGE_CACHE_SCALE]
    if large and cache == "FP8":
        events.warn(
            f"kv_cache=fp8: keys or values above {LARGE_CACHE_SCALE * E4M3_MAX:g} in {len(large)} of {decoder.layers} "
            f"layers, first in layer {large[0]}: rounding them to 8 bits costs quality"
        )
