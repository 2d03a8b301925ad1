"""Unquantised stage 1: the checkpoint in one floating-point dtype."""

from __future__ import annotations

from engine_recipes import StageContext, checkpoint


def convert(context: StageContext, dtype: checkpoint.Dtype) -> None:
    """Convert the source to `dtype`, split over the ranks that the options name."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(
            source,
            context.out,
            dtype=dtype,
            tp_size=int(context.options["tp_size"]),
            pp_size=int(context.options["pp_size"]),
        )
