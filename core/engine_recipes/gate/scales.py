"""The scales of a quantised checkpoint: sane in themselves, and what the calibration says."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..checkpoint.formats import Scheme
from ..checkpoint.quantize import (
    E4M3_MAX,
    FLOAT32_TINY,
    INT8_MAX,
    LARGE_CACHE_SCALE,
    cache_scale,
    linear_groups,
)
from ..checkpoint.statistics import PREQUANT, Statistics
from ..decoder import Decoder
from ..errors import RequestError
from ..types import Check, Measure
from .parts import Part, Parts, check

if TYPE_CHECKING:
    from ..checkpoint.safetensors import Array

_LAYERS_TO_JUDGE = 4


def sane(parts: Parts) -> Check:
    """All there, finite, above zero, and different from layer to layer."""
    import numpy as np

    wrong = []
    by_role: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for part in parts.parts:
        for name in part.scales():
            array = part.file.array(name).astype(np.float32).reshape(-1)
            if not (np.isfinite(array).all() and (array > 0).all()):
                wrong.append(f"{name} holds {_first_odd(array):g}")
            if array.size == 1 and "cache" not in name:  # an FP8 cache's are all 1 with good reason
                role = (".".join(part.module.split(".")[-2:]), name.rpartition(".")[2])
                by_role[role][part.name] = float(array[0])
        wrong += [f"{part.module} has no {what}" for what in _missing(part, parts.scheme) if parts.scheme.is_known]
    same = [
        (what, f"{what} of {layer} is {min(values.values()):g} in all {len(values)} layers: was it calibrated?")
        for (layer, what), values in by_role.items()
        if len(values) >= _LAYERS_TO_JUDGE and len(set(values.values())) == 1
    ]
    inputs = [note for what, note in same if what == "activation_scaling_factor"]
    if wrong or inputs:
        return check("scales are sane", wrong + inputs)
    return check("scales are sane", [note for _, note in same], "warn")


def _first_odd(array: Array) -> float:
    return next(float(value) for value in array if not (math.isfinite(value) and value > 0))


def _missing(part: Part, scheme: Scheme) -> Iterator[str]:
    if part.kind in ("fp8", "int8") and f"{part.module}.activation_scaling_factor" not in part.file.tensors:
        yield "activation_scaling_factor"
    has_cache = scheme.cache and part.spec.name.endswith("attention.qkv.weight")
    if has_cache and not any(name.endswith(".kv_cache_scaling_factor") for name in part.scales()):
        yield "kv_cache_scaling_factor"


def drift(parts: Parts, decoder: Decoder, statistics: Statistics | None) -> tuple[Measure, ...]:
    """`scale_drift`: the largest |log2(stored / calibrated)| over the scales of inputs and of the KV cache."""
    if statistics is None:
        return ()
    groups = {linear: group for group in linear_groups(decoder) for linear in group}
    found = []
    for part in parts.parts:
        for name in part.scales():
            expected = _calibrated(name, part, groups, parts.scheme, statistics)
            if expected:
                stored = float(part.file.array(name).reshape(-1)[0])
                sane = math.isfinite(stored) and stored > 0
                found.append((abs(math.log2(stored / expected)) if sane else math.inf, name, stored, expected))
    if not found:
        return ()
    most, name, stored, expected = max(found)
    return (Measure("scale_drift", most, note=f"{name} is {stored:.4g}, calibrated is {expected:.4g}"),)


def _calibrated(
    name: str, part: Part, groups: Mapping[str, Sequence[str]], scheme: Scheme, statistics: Statistics
) -> float | None:
    """What a scale should be; None if the calibration did not look at that."""
    linears = [piece.name.removesuffix(".weight") for piece in part.spec.pieces]
    try:
        if name.endswith(".activation_scaling_factor"):
            if part.kind == "int8":
                return _smoothed(linears, statistics) / INT8_MAX
            most = max(statistics.number(f"{linear}.input_amax") for linear in groups[linears[0]]) / E4M3_MAX
            return most if most > FLOAT32_TINY else 1.0
        if name.endswith("_cache_scaling_factor") and scheme.cache:
            k, v = (cache_scale(statistics, linear, scheme.cache) for linear in linears[1:])
            return {"k_cache_scaling_factor": k, "v_cache_scaling_factor": v}.get(name.rpartition(".")[2], max(k, v))
    except RequestError:
        pass
    return None


def _smoothed(linears: Sequence[str], statistics: Statistics) -> float:
    """The largest input of a layer after it was multiplied by `pre_quant_scale`; its source layers share their mean."""
    scale = sum(statistics.vector(f"{linear}.{PREQUANT}") for linear in linears) / len(linears)
    return max(float((statistics.vector(f"{linear}.channel_amax") * scale).max()) for linear in linears)


def cache_risk(parts: Parts, decoder: Decoder, statistics: Statistics | None) -> Iterator[Check]:
    """Whether an 8-bit cache is known to be dangerous here."""
    cache = parts.scheme.cache
    if cache not in ("FP8", "INT8"):
        return
    risks = []
    if decoder.qkv_bias and not decoder.qk_norm:
        risks.append(
            "q, k and v have biases and no norms, as in Qwen2: keys are large in a few channels, and 8 bits are known "
            "to turn the text of such models into nonsense"
        )
    if cache == "FP8":
        largest = {name: value for part in parts.parts for name, value in _largest(part, statistics)}
        large = [name for name, value in largest.items() if value > LARGE_CACHE_SCALE * E4M3_MAX]
        if large:
            most = max(largest.values())
            risks.append(
                f"keys or values up to {most:.4g} in {len(large)} of {decoder.layers} layers, first {large[0]}: "
                f"above {LARGE_CACHE_SCALE * E4M3_MAX:g} rounding to 8 bits costs quality"
            )
    yield check("KV cache risk", risks, "warn")


def _largest(part: Part, statistics: Statistics | None) -> Iterator[tuple[str, float]]:
    """The layer's largest key or value: as calibrated, or as far as a scale above 1 tells."""
    scale = f"{part.module.removesuffix('.qkv')}.kv_cache_scaling_factor"
    if not part.spec.name.endswith("attention.qkv.weight") or scale not in part.file.tensors:
        return
    stored = float(part.file.array(scale).reshape(-1)[0])
    most = stored * E4M3_MAX if stored > 1 else 0.0
    if statistics is not None:
        for piece in part.spec.pieces[1:]:
            name = f"{piece.name.removesuffix('.weight')}.cache_amax"
            most = max(most, statistics.number(name) if name in statistics.names() else 0.0)
    yield part.name.removesuffix(".qkv.weight"), most
