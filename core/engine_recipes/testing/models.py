"""What models and other names promise: that they lead somewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .. import refs
from .faults import expect
from .lab import Lab

_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([mb])(?![a-z0-9])")
_UNITS = {"m": 1e6, "b": 1e9}


def its_parameters_are_plausible(lab: Lab, name: str) -> None:
    """Memory, disk and time are estimated from them: wrong ones refuse what fits, or fill the disk."""
    model = lab.registry.models[name]
    expect(model.parameters >= 0, f"models.{name}: {model.parameters} parameters")
    said = _SIZE.search(name)
    if model.parameters and said:
        size = float(said[1]) * _UNITS[said[2]]
        expect(
            0.6 * size < model.parameters < 1.7 * size,
            f"models.{name} has {model.parameters:,} parameters, its name says {said[0]}",
        )


def it_leads_to_a_model(lab: Lab, name: str) -> None:
    """An alias is typed instead of a model: one that leads nowhere is an unknown name."""
    ref = lab.registry.expand(refs.parse(name))
    known = ref.model in lab.registry.models.entries or refs.is_hub_id(ref.model) or refs.is_folder(ref.model)
    expect(known, f"aliases.{name}: there is no model {ref.model}")
    if ref.precision:
        lab.registry.precisions[ref.precision]
    if ref.engine:
        lab.registry.engines[ref.engine]


PROMISES: Sequence[Callable[[Lab, str], None]] = (its_parameters_are_plausible,)
ALIASES: Sequence[Callable[[Lab, str], None]] = (it_leads_to_a_model,)
