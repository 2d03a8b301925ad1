"""fp16: every weight rounded to float16. Values above 65504 become inf and are warned of."""

from __future__ import annotations

from engine_recipes import StageContext, checkpoint, hookimpl


@hookimpl
def stage1(context: StageContext) -> None:
    """Convert the source to a float16 checkpoint. Options: `tp_size`, `pp_size`."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.convert(
            source,
            context.out,
            dtype="float16",
            tp_size=int(context.options["tp_size"]),
            pp_size=int(context.options["pp_size"]),
        )
