"""fp16: every weight rounded to float16. Values above 65504 become inf and are warned of."""

from __future__ import annotations

from engine_recipes import StageContext, hookimpl

from .plain import check_decoder, convert

__all__ = ["check_decoder"]


@hookimpl
def stage1(context: StageContext) -> None:
    """Convert the source to a float16 checkpoint. Options: `tp_size`, `pp_size`."""
    convert(context, "float16")
