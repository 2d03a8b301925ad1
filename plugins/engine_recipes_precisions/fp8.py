"""fp8: weights and the inputs of linear layers in 8-bit E4M3, one scale each a layer; head and embedding untouched."""

from __future__ import annotations

from engine_recipes import Decoder, StageContext, checkpoint, hookimpl

from .quantised import quantize


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads or rows."""
    checkpoint.check_split(decoder, int(context.options["tp_size"]), int(context.options["pp_size"]))


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `kv_cache`."""
    quantize(context, "FP8")
