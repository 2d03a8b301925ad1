"""bf16: every weight rounded to bfloat16. Most sources are bfloat16, and then nothing is lost."""

from __future__ import annotations

from engine_recipes import StageContext, hookimpl

from .plain import check_decoder, convert

__all__ = ["check_decoder"]


@hookimpl
def stage1(context: StageContext) -> None:
    """Convert the source to a bfloat16 checkpoint. Options: `tp_size`, `pp_size`."""
    convert(context, "bfloat16")
