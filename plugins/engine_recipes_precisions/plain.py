"""Stage 1 without calibration: the checkpoint in one floating-point dtype."""

from __future__ import annotations

from typing import Any

from engine_recipes import Decoder, StageContext, checkpoint, hookimpl


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads or rows."""
    checkpoint.check_split(decoder, int(context.options["tp_size"]), int(context.options["pp_size"]))


def convert(context: StageContext, dtype: Any, algorithm: checkpoint.WeightOnly | None = None) -> None:
    """Convert the source to `dtype` (`auto`: its own), split over the ranks that the options name."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(
            source,
            context.out,
            dtype=checkpoint.unquantised_dtype(source, dtype),
            tp_size=int(context.options["tp_size"]),
            pp_size=int(context.options["pp_size"]),
            algorithm=algorithm,
        )
