"""Checks to a verdict, and the verdict's file beside the engine. Knows no check; limits come with them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from .store import write_json
from .types import Check, Report, Verdict

VALIDATION = "validation.json"


def judge(checks: Iterable[Check]) -> Report:
    """The worst verdict of all checks that ran; `not run` if none did."""
    checks = tuple(checks)
    verdicts = {check.verdict for check in checks}
    order: tuple[Verdict, ...] = ("fail", "warn", "pass")
    verdict: Verdict = next((v for v in order if v in verdicts), "not run")
    metrics = {check.name: check.value for check in checks if check.value is not None}
    return Report(verdict=verdict, metrics=metrics, checks=checks)


def write(engine: Path, key: str, report: Report) -> None:
    """Keep a report beside its engine, with the key it was given for."""
    write_json(engine / VALIDATION, {"schema": 1, "key": key, **report.as_json()})


def read(engine: Path, key: str | None = None) -> Report | None:
    """The report of an engine; None if there is none that can be read, or none for this key."""
    try:
        data = json.loads((engine / VALIDATION).read_text(encoding="utf-8"))
        if key is not None and data["key"] != key:
            return None
        checks = tuple(Check(**check) for check in data["checks"])
        return Report(data["verdict"], data["metrics"], checks, tuple(data["samples"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
