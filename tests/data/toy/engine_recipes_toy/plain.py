"""Stage 1 of the toy: one JSON file."""

import json

from engine_recipes import hookimpl

from .misbehave import misbehave


@hookimpl
def stage1(context) -> None:
    misbehave(context)
    options = dict(context.options)
    (context.out / "weights.json").write_text(json.dumps({"ref": context.ref, "options": options}, sort_keys=True))


@hookimpl
def fallbacks(context, report):
    if context.options["scale"] == 3:
        raise ValueError("three is too many")
    return [{"style": "long"}, {"loud": False}] if report.failed else []
