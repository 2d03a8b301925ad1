"""What a reference promises: that it computes the source as others do, since engines are judged by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..entries import Family, Reference
from ..errors import RequestError
from .faults import Skip, expect
from .lab import Lab
from .numbers import apart, logits_of_reference, logits_of_transformers, sample

if TYPE_CHECKING:
    from .numbers import Floats

#: Both compute with the same weights in 32 bits; a reference that computes in bfloat16 is 0.02 away.
_LARGEST_ERROR = 0.05


def computes_what_others_compute(lab: Lab, name: str) -> None:
    """Engines are judged by it: what it computes wrongly, good engines are rejected for, and bad ones pass."""
    reference, compared = lab.registry.references[name], 0
    if missing := lab.setup.facts.missing(reference.requires):
        raise Skip(f"it cannot run here: {', '.join(missing)} is missing")
    for what, (folder, family) in lab.models().items():
        try:
            logits = logits_of_reference(lab, reference, folder, family, sample(lab.vocabulary(folder)))
        except RequestError:  # it refuses such models
            continue
        if logits is None:
            raise Skip("it gives no logits")
        who, base = next(_others(lab, reference, folder, family), ("", logits))
        if not who:
            raise Skip("nothing else here runs the source")
        error = apart(logits, base)
        expect(
            error <= _LARGEST_ERROR,
            f"on a tiny {what} model its logits are {error:.2g} of their spread away from those of {who}",
        )
        compared += 1
    expect(compared, "it refuses every tiny model")


PROMISES: Sequence[Callable[[Lab, str], None]] = (computes_what_others_compute,)


def _others(lab: Lab, reference: Reference, folder: Path, family: Family) -> Iterator[tuple[str, Floats]]:
    """Who else runs the source, and its logits."""
    try:
        yield "transformers", logits_of_transformers(lab, folder, lab.vocabulary(folder))
    except Skip:
        for other in lab.registry.references.entries.values():
            if other is reference or lab.setup.facts.missing(other.requires):
                continue
            logits = logits_of_reference(lab, other, folder, family, sample(lab.vocabulary(folder)))
            if logits is not None:
                yield f"reference {other.name}", logits
