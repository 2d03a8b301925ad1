"""int4-awq: 4-bit weights with a scale for each group, inputs scaled channel by channel; activations stay 16-bit."""

from __future__ import annotations

from engine_recipes import Decoder, Report, StageContext, checkpoint, hookimpl

from .fallback import Offer, offers
from .quantised import check, quantize


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads, rows or groups, and layers to exclude that are not there."""
    check(context.options, decoder)
    checkpoint.choose_group_size(decoder, int(context.options["group_size"]), int(context.options["tp_size"]))


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `kv_cache`, `group_size`, `exclude`."""
    quantize(context, "W4A16_AWQ")


@hookimpl
def fallbacks(context: StageContext, report: Report) -> list[Offer]:
    """A 16-bit KV cache, groups of 64, then the layers with the largest weight errors at 16 bits."""
    return offers(context, report, grouped=True)
