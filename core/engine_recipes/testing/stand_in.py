"""A precision that only the suite has: calibrations that no precision names are tried with it."""

from __future__ import annotations

from dataclasses import replace

from .. import checkpoint, hookimpl
from ..api import Setup
from ..entries import Precision
from ..types import HF_CHECKPOINT, StageContext


def add(setup: Setup) -> Setup:
    """The same setup; its registry has a stand-in for each calibration that is not used."""
    registry = setup.registry
    precisions, owner = registry.precisions, registry.owners[0]
    used = {entry.calibration for entry in precisions.entries.values()}
    made = {
        name: Precision(name=name, owner=owner, module=__name__, calibration=calibration.name)
        for calibration in registry.calibrations.entries.values()
        if calibration.name not in used
        for name in [f"conformance-{calibration.name}"]
    }
    known = replace(precisions, entries={**precisions.entries, **made})
    setup.__dict__["registry"] = replace(registry, precisions=known)
    return setup


@hookimpl
def stage1(context: StageContext) -> None:
    """Store the weights as they are."""
    with checkpoint.open_source(context.input(HF_CHECKPOINT)) as source:
        checkpoint.convert(source, context.out, "float16")
