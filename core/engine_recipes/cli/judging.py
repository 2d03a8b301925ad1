"""`validate`, and how verdicts are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import click

from .. import runner
from ..api import Setup
from ..runner import Build, How
from ..types import Check
from . import report as report_error, style
from .common import complete_ref, json_option, print_json, quiet_option, recipe_options, verbose_option
from .progress import Lines, reporter

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


@click.command("validate")
@click.argument("what", metavar="REF|FOLDER", shell_complete=complete_ref)
@click.option("--source", metavar="MODEL", help="what a folder was made from: MODEL[:PRECISION]")
@click.option("--accept", metavar="REASON", default="", help="publish it although it fails; the reason is kept")
@click.option("--force", is_flag=True, help="measure again what was measured")
@json_option
@quiet_option
@verbose_option
@recipe_options
def validate_command(
    what: str,
    source: str | None,
    accept: str,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    setup: Setup,
    choices: dict[str, Any],
) -> None:
    """Judge a built engine, or any TensorRT-LLM checkpoint, against the unquantised source.

    FOLDER is an engine, also one that was copied here, or a checkpoint folder, also one that other tools made:
    it is checked, lowered by an engine of this machine and judged.
    """
    from ..foreign import plan_for

    check_reason(accept)
    plan = plan_for(setup, what, source, choices)
    with reporter(quiet, verbose) as lines:
        lines.say(f"{style(str(plan.ref), bold=True)} for {plan.target}")
        build = runner.run(plan, setup.store, How(force=force, accept=accept), lines)
    if as_json:
        print_json({"schema": 1, "builds": [build.as_json()]})
    else:
        for line in table(build.report.checks):
            click.echo(line)
    if build.error:
        report_error(build.error)
        raise SystemExit(build.error.exit_code)


def check_reason(reason: str) -> None:
    """Refuse a reason that gives none. It stands in the manifest for whoever deploys the engine."""
    if reason and not reason.strip():
        raise click.UsageError("--accept needs a reason\nsay why this engine is good enough in spite of its failures")


def table(checks: Sequence[Check]) -> list[str]:
    """One line a check, worst first."""
    order = ("fail", "warn", "pass", "not run")
    checks = sorted(checks, key=lambda check: order.index(check.verdict))
    width = max((len(check.name) for check in checks), default=0)
    return [_line(check, width) for check in checks]


def _line(check: Check, width: int) -> str:
    verdict = style(f"{check.verdict:<5}", fg=_COLOURS.get(check.verdict))
    value = "" if check.value is None else _number(check.value)
    limit = "" if check.limit is None else f"limit {_number(check.limit)}"
    return (
        f"{verdict} {check.name:<{width}}  {value:>9}  {limit:<13}  {check.note}".rstrip()
        .encode(errors="replace")
        .decode()
    )


def _number(value: float) -> str:
    """Four digits, whole numbers whole."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e9 else f"{value:.4g}"


def conclude(lines: Lines, build: Build) -> None:
    """What a build's validation says: warnings, and failures also where they were accepted."""
    bad = [check for check in build.report.checks if check.verdict in ("fail", "warn")]
    for line in table(bad):
        lines.say(f"  {line}")
    if build.report.accepted:
        lines.say(f"  accepted: {build.report.accepted}")
