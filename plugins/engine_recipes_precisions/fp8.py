"""fp8: weights and the inputs of linear layers in 8-bit E4M3, one scale each a layer; head and embedding untouched."""

from __future__ import annotations

from engine_recipes import Decoder, Report, StageContext, hookimpl

from .fallback import Offer, offers
from .quantised import check, quantize


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads or rows, and layers to exclude that are not there."""
    check(context.options, decoder)


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `kv_cache`, `exclude`."""
    quantize(context, "FP8")


@hookimpl
def fallbacks(context: StageContext, report: Report) -> list[Offer]:
    """A 16-bit KV cache, then the layers with the largest weight errors at 16 bits."""
    return offers(context, report)
