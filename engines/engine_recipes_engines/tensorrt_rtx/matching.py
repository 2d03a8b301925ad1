"""Whether a loaded engine is the one that `rtx.json` describes: what it is fed is bound by address and size alone."""

from __future__ import annotations

from typing import Any

from engine_recipes import StageFailed

from .settings import Settings, Tensor

PAST, PRESENT = "past_key_values.", "present."
#: Dynamic dimensions of the inputs; those of a cache are all `B`.
_DIMENSIONS = {"input_ids": "BS", "position_ids": "BS", "write_indices": "B", "kv_lengths": "B", "logit_indices": "L"}


def check_engine(engine: Any, settings: Settings) -> None:
    """Compare a `tensorrt_rtx.ICudaEngine` with the notes.

    Raises:
        StageFailed: they differ: in names, types, shapes, the largest sizes, or in what is updated in place.
    """
    wrong = _tensors(engine, settings) or _sizes(engine, settings) or _aliases(engine, settings)
    if wrong:
        raise StageFailed(
            f"model.engine is not the engine that rtx.json describes: {wrong}", "copy it again, or build it again"
        )


def _tensors(engine: Any, settings: Settings) -> str:
    noted = {tensor.name: tensor for tensor in (*settings.inputs, *settings.outputs)}
    held = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    for name in sorted(noted.keys() ^ held):
        return f"{name} is in one of them"
    for name, tensor in noted.items():
        dtype, shape = engine.get_tensor_dtype(name).name, list(engine.get_tensor_shape(name))
        if dtype != tensor.dtype or not _fits(shape, tensor):
            return f"{name} is {dtype} {shape}, not {tensor.dtype} {tensor.shape}"
    return ""


def _fits(shape: list[int], noted: Tensor) -> bool:
    # a size that was dynamic in the network may be fixed in an engine whose profile leaves it no choice
    return len(shape) == len(noted.shape) and all(b in (-1, a) for a, b in zip(shape, noted.shape, strict=True))


def _sizes(engine: Any, settings: Settings) -> str:
    for tensor in settings.inputs:
        names = iter(_DIMENSIONS.get(tensor.name, "B"))
        expected = [settings.most[next(names)] if side < 0 else side for side in tensor.shape]
        largest = list(engine.get_tensor_profile_shape(tensor.name, 0)[2])
        if largest != expected:
            return f"it takes {tensor.name} up to {largest}, not {expected}"
    return ""


def _aliases(engine: Any, settings: Settings) -> str:
    aliased = getattr(engine, "get_aliased_input_tensor", lambda name: None)  # which older versions have not
    for tensor in settings.outputs:
        if tensor.name.startswith(PRESENT):
            told = aliased(tensor.name)
            # Whether the library tells it of cache updates is not documented: only another name is an answer.
            if told and told != tensor.name.replace(PRESENT, PAST):
                return f"it updates {told} in place of {tensor.name}"
    return ""
