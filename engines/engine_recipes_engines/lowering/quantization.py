"""What quantised checkpoints have in common for every engine that lowers them: which can be, and their scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine_recipes import RequestError
from engine_recipes.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

E4M3 = "float8_e4m3fn"
#: kv_cache_quant_algo -> what the numbers in the cache are rounded to.
CACHES = {"FP8": E4M3, "INT8": "int8"}


def check_known(weights: Checkpoint, engine: str, algorithms: Sequence[str], groups: Sequence[int]) -> None:
    """Refuse a checkpoint that an engine cannot lower, before anything is written.

    Args:
        engine: its name, for messages.
        algorithms: the `quant_algo` it knows.
        groups: sizes of groups that it knows, for W4A16_AWQ.

    Raises:
        RequestError: an unknown algorithm or variant of one.
    """
    for key, known in (("quant_algo", algorithms), ("kv_cache_quant_algo", tuple(CACHES))):
        algorithm = weights.quantization.get(key)
        if algorithm is not None and algorithm not in known:
            raise RequestError(
                f"the {engine} engine cannot lower {key} {algorithm}",
                f"known: {', '.join(known)}; choose another precision, or another engine",
            )
    problem = _unknown_variant(weights, groups)
    if problem:
        raise RequestError(f"the {engine} engine cannot lower {problem}", "choose another engine for it")


def _unknown_variant(weights: Checkpoint, groups: Sequence[int]) -> str:
    """What of a known algorithm is not known, empty if all is."""
    names, group = weights.names(), weights.quantization.get("group_size", 128)
    if "lm_head.weights_scaling_factor" in names:
        return "a quantised lm_head"
    if any(name.endswith(".per_channel_scale") for name in names):
        return "weights that are packed for one GPU's kernels already (per_channel_scale)"
    if weights.quantization["quant_algo"] != "W4A16_AWQ":
        return ""
    if weights.quantization.get("has_zero_point"):
        return "W4A16_AWQ with zero points"
    return "" if group in groups else f"W4A16_AWQ in groups of {group} (known: {', '.join(map(str, groups))})"


def cache_dtype(weights: Checkpoint) -> str | None:
    """What keys and values are rounded to before they are cached; None if they are not."""
    return CACHES.get(weights.quantization.get("kv_cache_quant_algo") or "")


def scale_of(weights: Checkpoint, name: str) -> Array:
    """A scale of a whole tensor, float32 []."""
    return weights.array(name).astype("float32").reshape(())


def cache_scale(weights: Checkpoint, attention: str) -> Array:
    """The scale of a layer's cache, float32 []. TensorRT-LLM has one for keys and values: the larger, if there are
    two."""
    import numpy as np

    held = frozenset(weights.names())
    names = [f"{attention}.{which}cache_scaling_factor" for which in ("kv_", "k_", "v_")]
    found = [scale_of(weights, name) for name in names if name in held]
    return np.asarray(np.max(found)) if found else scale_of(weights, names[0])  # which says that it is missing
