"""fp8: weights and the inputs of linear layers in 8-bit E4M3, one scale each a layer; head and embedding untouched."""

from __future__ import annotations

from engine_recipes import StageContext, hookimpl

from .plain import check_decoder
from .quantised import quantize

__all__ = ["check_decoder"]


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `kv_cache`."""
    quantize(context, "FP8")
