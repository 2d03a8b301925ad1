"""Findings and limits to a verdict, and the verdict's file beside the engine. Importing this loads no numpy.

Measuring is dear and judging is cheap, so the two are apart: findings are kept under a key that no limit is part of,
and another limit judges them anew without running the engine again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..store import Store, write_json
from ..types import Check, Findings, Measure, Report, Verdict, read_verdict

VALIDATION = "validation.json"
_ORDER: tuple[Verdict, ...] = ("fail", "warn", "pass")


@dataclass(frozen=True)
class Bound:
    """Where a metric begins to warn and to fail. None: never.

    Attributes:
        worse: which way is worse, `above` or `below` the limit. A value that is the limit is good.
        help: what the metric is, in words.
    """

    worse: str
    warn: float | None = None
    fail: float | None = None
    help: str = ""

    def verdict(self, value: float) -> tuple[Verdict, float | None]:
        """The verdict on a value, and the limit that decided it; NaN fails if anything can."""
        for verdict, limit in (("fail", self.fail), ("warn", self.warn)):
            if limit is not None and not (value <= limit if self.worse == "above" else value >= limit):
                return ("fail" if verdict == "fail" else "warn"), limit
        return "pass", self.warn if self.warn is not None else self.fail

    def beside(self, base: float | None) -> Bound:
        """The same where the source itself is over the limit: who does as the source does is good, and who is worse
        than it by as much as lies between the limits fails."""
        first = self.warn if self.warn is not None else self.fail
        if base is None or first is None or not math.isfinite(base) or self.verdict(base)[0] == "pass":
            return self
        shift = base - first
        return replace(
            self,
            warn=None if self.warn is None else base,
            fail=None if self.fail is None else self.fail + shift,
            help=f"{self.help}; the source's own is {base:.3g}",
        )


def judge(findings: Findings, bounds: Mapping[str, Bound], accepted: str = "") -> Report:
    """Limits on measures, and the worst verdict of all checks that ran; `not run` if none did.

    Args:
        bounds: by metric. A measure that has no limit is reported and not judged.
        accepted: why a failure is let pass, if it is.
    """
    limited = {name: bound for name, bound in bounds.items() if (bound.warn, bound.fail) != (None, None)}
    judged = [_judged(measure, limited[measure.name]) for measure in findings.measures if measure.name in limited]
    checks = (*findings.checks, *judged)  # what is plainly wrong first: a message names the first failure
    metrics = {measure.name: measure.value for measure in findings.measures}
    verdict = worst(check.verdict for check in checks)
    return Report(verdict, metrics, checks, findings.samples, findings.layers, accepted, findings.seconds)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of all that ran; `not run` if none did."""
    found = set(verdicts)
    return next((verdict for verdict in _ORDER if verdict in found), "not run")


def _judged(measure: Measure, bound: Bound) -> Check:
    bound = bound.beside(measure.base)
    verdict, limit = bound.verdict(measure.value)
    return Check(measure.name, verdict, measure.value, limit, measure.note or bound.help)


def write(engine: Path, key: str, findings: Findings, report: Report) -> None:
    """Keep what was found and the verdict beside the engine, with the key that the findings have."""
    data = {"schema": 1, "key": key, **report.as_json(), "findings": findings.as_json()}
    write_json(engine / VALIDATION, data)


def found(engine: Path, key: str) -> Findings | None:
    """What was measured under this key; None if nothing was."""
    data = _read(engine)
    try:
        return Findings.from_json(data["findings"]) if data["key"] == key else None
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def read(engine: Path) -> Report | None:
    """The last verdict on an engine; None if there is none that can be read."""
    data = _read(engine)
    try:
        findings = Findings.from_json({**data["findings"], "checks": data["checks"]})
        metrics = {measure.name: measure.value for measure in findings.measures}
        accepted = data["accepted"]
        if not (accepted is None or isinstance(accepted, str)):
            return None
        known = findings.samples, findings.layers, accepted or "", findings.seconds
        return Report(read_verdict(data["verdict"]), metrics, findings.checks, *known)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return None


def withdraw(store: Store, engine: Path) -> None:
    """Take the plain name from an engine that has it, and give it to the newest other one that is good."""
    if store.is_published(engine):
        store.unlink(engine)
        newest = _newest_good(store, store.plain(engine), engine)
        if newest:
            store.link(newest)


def is_of_strangers(manifest: Mapping[str, Any]) -> bool:
    """Whether an engine was built from a checkpoint that was made elsewhere: it is judged, and gets no plain name."""
    return bool(manifest.get("checkpoint_from_elsewhere"))


def _newest_good(store: Store, plain: Path, without: Path) -> Path | None:
    folder: Path
    for folder, manifest in reversed(store.artifacts("engines")):
        if store.plain(folder) == plain and folder != without and not is_of_strangers(manifest):
            report = read(folder)
            if report and report.is_good:
                return folder
    return None


def _read(engine: Path) -> dict[str, Any]:
    try:
        data = json.loads((engine / VALIDATION).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}
