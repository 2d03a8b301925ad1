"""Weights rounded to few bits and stored at 16: every engine runs them, so an idea is judged before it has a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, StageContext, checkpoint, hookimpl

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse what can never work before any work: here a split that would cut heads or rows."""
    checkpoint.check_split(decoder, int(context.options["tp_size"]), int(context.options["pp_size"]))


@hookimpl
def stage1(context: StageContext) -> None:
    """Write the checkpoint. Options: `bits`, `tp_size`, `pp_size`."""
    bits = int(context.options["bits"])
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(
            source,
            context.out,
            dtype="float16",  # keeps 11 bits of what was rounded, bfloat16 8
            tp_size=int(context.options["tp_size"]),
            pp_size=int(context.options["pp_size"]),
            edit=lambda name, rows: rounded(rows, bits),
        )


def rounded(rows: Floats, bits: int) -> Floats:
    """Round to the nearest of 2**bits - 1 levels around 0, with one scale a row. float32 [n, inputs], as it came."""
    import numpy as np

    most = 2 ** (bits - 1) - 1  # levels on either side of 0
    scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(most)  # [n, 1]
    scales[scales == 0] = 1  # a row of zeros
    result: Floats = np.rint(rows / scales) * scales
    return result
