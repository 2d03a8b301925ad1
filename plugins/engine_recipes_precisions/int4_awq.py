"""int4-awq: 4-bit weights with a scale for each group, inputs scaled channel by channel; activations stay 16-bit."""

from __future__ import annotations

from engine_recipes import Decoder, StageContext, checkpoint, hookimpl

from .quantised import quantize


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads, rows or groups."""
    tp_size = int(context.options["tp_size"])
    checkpoint.check_split(decoder, tp_size, int(context.options["pp_size"]))
    checkpoint.choose_group_size(decoder, int(context.options["group_size"]), tp_size)


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `kv_cache`, `group_size`."""
    quantize(context, "W4A16_AWQ")
