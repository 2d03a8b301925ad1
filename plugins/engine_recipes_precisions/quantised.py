"""Calibrated stage 1: the checkpoint from the source and the statistics that the calibration left."""

from __future__ import annotations

from typing import Any

from engine_recipes import StageContext, checkpoint


def quantize(context: StageContext, algorithm: Any) -> None:
    """Quantize the source as the options say."""
    options: Any = context.options
    statistics = checkpoint.read_statistics(context.input("calibration").path)
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.quantize(
            source,
            context.out,
            statistics,
            algorithm,
            dtype=options["dtype"],
            kv_cache=options["kv_cache"],
            group_size=options.get("group_size", 0),
            tp_size=options["tp_size"],
            pp_size=options["pp_size"],
        )
