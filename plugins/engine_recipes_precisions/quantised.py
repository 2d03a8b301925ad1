"""Calibrated stage 1: the checkpoint from the source and the statistics that the calibration left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, StageContext, checkpoint


def check(options: Mapping[str, Any], decoder: Decoder) -> None:
    """Refuse a split that would cut heads or rows, and layers to exclude that are not there."""
    checkpoint.check_split(decoder, options["tp_size"], options["pp_size"])
    checkpoint.excluded_linears(decoder, patterns(options), options["pp_size"])


def patterns(options: Mapping[str, Any]) -> list[str]:
    """What the option `exclude` names."""
    return [word.strip() for word in options["exclude"].split(",") if word.strip()]


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
            exclude=patterns(options),
        )
