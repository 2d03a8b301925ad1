"""The suite: which cases there are for a package, and how pytest runs them."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from traceback import StackSummary, TracebackException
from typing import TYPE_CHECKING, Any

import pluggy

from .. import host
from ..errors import RecipesError, did_you_mean
from ..types import Value
from . import calibrations, engines, families, models, packages, precisions, references, running, stand_in
from .faults import Fault, Skip
from .lab import Lab

if TYPE_CHECKING:
    import pytest

#: What every entry of a kind of the registry promises. A function's name is the promise.
PROMISES: Mapping[str, Sequence[Callable[[Lab, str], None]]] = {
    "families": families.PROMISES,
    "models": models.PROMISES,
    "precisions": precisions.PROMISES,
    "calibrations": calibrations.PROMISES,
    "engines": (*engines.PROMISES, *running.PROMISES),
    "references": references.PROMISES,
    "aliases": models.ALIASES,
}
#: Where an author reads on, by kind.
_READ = {
    "package": "docs/reference/registry.md",
    "family": "docs/how-to/add-a-family.md",
    "model": "docs/how-to/add-a-model.md",
    "alias": "docs/how-to/add-a-model.md",
    "calibration": "docs/how-to/add-a-precision.md",
    "precision": "docs/how-to/add-a-precision.md",
    "engine": "docs/how-to/add-an-engine.md",
    "reference": "docs/how-to/add-an-engine.md",
}
_SINGULAR = {
    "families": "family",
    "models": "model",
    "precisions": "precision",
    "calibrations": "calibration",
    "engines": "engine",
    "references": "reference",
    "aliases": "alias",
}
#: Kinds of entry that `configs` gives models for.
_TRIED = ("families", "precisions", "engines")
#: Files of which a traceback tells authors nothing.
_OURS = (
    str(Path(__file__).parent),
    str(Path(pluggy.__file__).parent),
    str(Path(importlib.__file__).parent),
    "<frozen importlib",
    host.__file__,
)

#: Of core itself; frames of it in a worker tell authors nothing either.
_CORE = str(Path(host.__file__).parent)
_FRAME = re.compile(r'  File "([^"]+)", line \d+')


@dataclass(frozen=True)
class Case:
    """One promise of one entry. Call it to check it.

    Attributes:
        id: `family acme: unshard equals source`.
        promise: why it matters, in words.
        reason: why it is skipped; empty: it is not.
    """

    id: str
    promise: str
    check: Callable[[], None] = field(repr=False)
    lab: Lab = field(repr=False)
    reason: str = ""

    def __call__(self) -> None:
        """Check it, as a part of a pytest test: passes, fails with what is wrong, or skips with the reason."""
        import pytest

        if self.reason:
            pytest.skip(self.reason)
        fault = ""
        try:
            with self.lab.world():
                self.check()
        except Skip as skip:
            pytest.skip(str(skip))
        except Fault as found:
            fault = str(found)
        except RecipesError as error:
            output = getattr(error, "output", "")
            fault = f"{type(error).__name__}: {error}" + (f"\n{without_ours(output, error.message)}" if output else "")
        except Exception as error:  # of the plugin's code, which cases call
            fault = traceback_of(error)
        if fault:  # not in the except clause: its traceback would tell of this suite, and not of the plugin
            pytest.fail(
                f"{self.id}\n{fault}\nWhy: {self.promise}\nMore: {_READ[self.id.partition(' ')[0]]}", pytrace=False
            )


def conformance(
    package: str,
    *,
    configs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    settings: Mapping[str, Mapping[str, Value]] | None = None,
    tolerance: Mapping[str, float] | None = None,
    skip: Mapping[str, str] | None = None,
) -> pytest.MarkDecorator:
    """Parametrise a test with everything that a package's entries promise, as `case`.

    Args:
        package: the distribution whose registry entries are checked; it must be installed.
        configs: family -> `config.json` of tiny models; needed for the package's own families. Precisions and engines
            too, if the suite's own tiny models are none for them.
        settings: entry name -> options as in `--set`, for its builds: `{"acme-int8": {"calib.size": 4}}`.
        tolerance: precision -> largest relative root mean square error of an engine's logits on a tiny model, against
            the unquantised source. Left out: 0.002 for plain 16 bits, 0.1 for 8 bits, 0.5 for fewer.
        skip: pattern of case ids -> why they are skipped; as a failure says them, or as pytest does.

    Raises:
        ValueError: configs, settings or tolerance name what is not there, or a pattern of `skip` fits no case.
    """
    import pytest

    found = cases(package, configs=configs, settings=settings, tolerance=tolerance, skip=skip)
    return pytest.mark.parametrize("case", found, ids=[slug(case.id) for case in found])


def cases(
    package: str,
    *,
    configs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    settings: Mapping[str, Mapping[str, Value]] | None = None,
    tolerance: Mapping[str, float] | None = None,
    skip: Mapping[str, str] | None = None,
) -> list[Case]:
    """The cases themselves, for those who do not use pytest's parametrisation. As `conformance` otherwise."""
    lab = Lab(package, configs or {}, settings or {}, tolerance or {})
    with lab.world():
        stand_in.add(lab.setup)
        names = lab.names()
        _check_arguments(lab)
    found = [_case(lab, f"package {package}", promise, package, skip or {}) for promise in packages.PROMISES]
    for kind, promises in PROMISES.items():
        for name in names.get(kind, ()):
            check = [_if_imported(kind, promise) for promise in promises]
            found += [_case(lab, f"{_SINGULAR[kind]} {name}", promise, name, skip or {}) for promise in check]
    with lab.world():
        unused = [pattern for pattern in skip or {} if not any(_fits(case.id, pattern) for case in found)]
        if unused and lab.is_sound():
            raise ValueError(f"skip: no case is {unused[0]!r}; {did_you_mean(unused[0], [case.id for case in found])}")
    return found


def slug(case_id: str) -> str:
    """A case's id as pytest prints it: one word, for `-k` takes no others."""
    return case_id.replace(": ", ":").replace(" ", "-")


def _check_arguments(lab: Lab) -> None:
    """Raise ValueError for a name that nobody has: a tolerance for it would never be asked for."""
    if not lab.is_sound():  # the package's own cases say what is wrong
        return
    everything = {name for names in lab.registry.kinds for name in names.entries}
    for argument, given, known in (
        ("configs", lab.configs, [n for kind in _TRIED for n in lab.names().get(kind, ())]),
        ("settings", lab.settings, everything),
        ("tolerance", lab.tolerance, lab.registry.precisions.entries),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{argument}: there is no {name!r}; {did_you_mean(name, known)}")


def _if_imported(kind: str, promise: Callable[[Lab, str], None]) -> Callable[[Lab, str], None]:
    """The promise, skipped if the entry's module cannot be imported: one failure is enough, and a hang takes long."""

    @functools.wraps(promise)
    def check(lab: Lab, name: str) -> None:
        if packages.imported(lab).get((kind, name), {}).get("error"):
            raise Skip("its module cannot be imported, see `its modules have the hooks that they need`")
        promise(lab, name)

    return check


def traceback_of(error: BaseException) -> str:
    """The traceback without what is between the plugin's code and pytest."""
    found = TracebackException.from_exception(error)
    one: TracebackException | None = found
    while one:
        one.stack = StackSummary.from_list([frame for frame in one.stack if not frame.filename.startswith(_OURS)])
        one = one.__cause__ or one.__context__
    return "".join(found.format()).rstrip()


def without_ours(output: str, said: str) -> str:
    """What a worker printed, without frames of its tracebacks that are not the plugin's, and what is said already."""
    kept, ours = [], False
    for line in output.splitlines():
        frame = _FRAME.match(line)
        ours = bool(frame and frame[1].startswith((*_OURS, _CORE))) or (ours and line.startswith("    "))
        kept += [] if ours or said in line else [line]
    return "\n".join(kept)


def _fits(case_id: str, pattern: str) -> bool:
    """Whether a pattern of `skip` is for a case, written as `Case.id` or as pytest prints it."""
    return fnmatchcase(slug(case_id), slug(pattern))


def _case(lab: Lab, who: str, promise: Callable[[Lab, str], None], name: str, skip: Mapping[str, str]) -> Case:
    case_id = f"{who}: {promise.__name__.replace('_', ' ')}"
    why = " ".join((promise.__doc__ or "").split())
    reason = next((reason for pattern, reason in skip.items() if _fits(case_id, pattern)), "")
    return Case(case_id, why, functools.partial(promise, lab, name), lab, reason)
