"""bf16: every weight rounded to bfloat16. Most sources are bfloat16, and then nothing is lost."""

from __future__ import annotations

from engine_recipes import StageContext, checkpoint, hookimpl


@hookimpl
def stage1(context: StageContext) -> None:
    """Convert the source to a bfloat16 checkpoint. Options: `tp_size`, `pp_size`."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(
            source,
            context.out,
            dtype="bfloat16",
            tp_size=int(context.options["tp_size"]),
            pp_size=int(context.options["pp_size"]),
        )
