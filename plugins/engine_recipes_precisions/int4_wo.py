"""int4-wo: 16-bit weights and the word `W4A16`: the engine's builder rounds each output channel to 4 bits itself."""

from __future__ import annotations

from engine_recipes import StageContext, hookimpl

from .plain import check_decoder, convert

__all__ = ["check_decoder"]


@hookimpl
def stage1(context: StageContext) -> None:
    """Convert the source. Options: `tp_size`, `pp_size`, `dtype`."""
    convert(context, context.options["dtype"], "W4A16")
