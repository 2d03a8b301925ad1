"""Checks to a verdict. Knows no check; limits come with them."""

from __future__ import annotations

from collections.abc import Iterable

from .types import Check, Report, Verdict


def judge(checks: Iterable[Check]) -> Report:
    """The worst verdict of all checks that ran; `not run` if none did."""
    checks = tuple(checks)
    verdicts = {check.verdict for check in checks}
    order: tuple[Verdict, ...] = ("fail", "warn", "pass")
    verdict: Verdict = next((v for v in order if v in verdicts), "not run")
    metrics = {check.name: check.value for check in checks if check.value is not None}
    return Report(verdict=verdict, metrics=metrics, checks=checks)
