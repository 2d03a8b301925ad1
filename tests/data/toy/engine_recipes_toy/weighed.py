"""Stage 1 of the toy after its calibration."""

import json

from engine_recipes import hookimpl

from .misbehave import misbehave


@hookimpl
def stage1(context) -> None:
    misbehave(context)
    weight = int((context.input("toy-weight").path / "weight.txt").read_text())
    (context.out / "weights.json").write_text(json.dumps({"ref": context.ref, "weight": weight}))
