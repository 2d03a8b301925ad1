"""Rotary position embedding: the angles, for every scaling that an engine can bake into a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .decoder import Decoder
from .errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    #: A numpy array of any shape and dtype.
    Array = np.ndarray[Any, np.dtype[Any]]
else:  # numpy is not loaded for names of types
    Array = Any


def tables(decoder: Decoder, positions: int) -> tuple[Array, Array]:
    """Cosine and sine of every angle, both float32 [positions, rotated / 2].

    Angles are computed in float64, since at position 100,000 float32 is off by 0.004 radians.

    Raises:
        RequestError: a scaling that cannot be put into a table, or that lacks a setting.
    """
    import numpy as np

    frequencies, amplitude = inverse_frequencies(decoder)
    angles = np.outer(np.arange(positions, dtype=np.float64), frequencies)  # [positions, rotated / 2]
    return (amplitude * np.cos(angles)).astype(np.float32), (amplitude * np.sin(angles)).astype(np.float32)


def inverse_frequencies(decoder: Decoder) -> tuple[Array, float]:
    """Radians a position advances, float64 [rotated / 2], and the factor on cosine and sine.

    Formulas: transformers' `modeling_rope_utils` (`_compute_default_rope_parameters`, `_compute_linear…`,
    `_compute_llama3…`, `_compute_yarn…`); llama3 is Meta's `apply_scaling` in llama-models.

    Raises:
        RequestError: as for `tables`.
    """
    import numpy as np

    half = np.arange(0, decoder.rotated, 2, dtype=np.float64) / decoder.rotated
    plain = decoder.rope_theta**-half
    scaling = decoder.rope_scaling
    if scaling is None:
        return plain, 1.0
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return plain / _setting(scaling, "factor"), 1.0
    if kind == "llama3":
        return _llama3(plain, scaling), 1.0
    if kind == "yarn":
        return _yarn(plain, scaling, decoder)
    raise RequestError(
        f"this engine cannot do rope scaling {kind!r}: it changes with the length of the text",
        "known: linear, llama3, yarn; choose another engine for this model",
    )


def _llama3(plain: Array, scaling: Mapping[str, Any]) -> Array:
    import numpy as np

    factor, context = _setting(scaling, "factor"), _setting(scaling, "original_max_position_embeddings")
    low, high = _setting(scaling, "low_freq_factor"), _setting(scaling, "high_freq_factor")
    turns = context * plain / (2 * math.pi)  # how often each pair turns within the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)  # 0: slow pairs, stretched; 1: fast pairs, untouched
    return (1 - blend) * plain / factor + blend * plain


def _yarn(plain: Array, scaling: Mapping[str, Any], decoder: Decoder) -> tuple[Array, float]:
    import numpy as np

    factor = _setting(scaling, "factor")
    context = _setting({"original_max_position_embeddings": decoder.max_positions, **scaling}, _ORIGINAL)
    size, base = decoder.rotated, decoder.rope_theta

    def pair_that_turns(turns: float) -> float:  # within the original context
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high += 0.001 * (low == high)  # as the reference does, against a division by zero
    stretched = np.clip((np.arange(size // 2) - low) / (high - low), 0.0, 1.0)
    return plain / factor * stretched + plain * (1 - stretched), _yarn_amplitude(factor, scaling)


def _yarn_amplitude(factor: float, scaling: Mapping[str, Any]) -> float:
    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    above, below = scaling.get("mscale"), scaling.get("mscale_all_dim")
    return grown(above) / grown(below) if above and below else grown(1.0)


_ORIGINAL = "original_max_position_embeddings"


def _setting(scaling: Mapping[str, Any], key: str) -> float:
    value = scaling.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
        raise RequestError(
            f"rope scaling needs {key}, which is {value!r}",
            "repair rotary_scaling in config.json (rope_scaling in the original model)",
        )
    return float(value)
