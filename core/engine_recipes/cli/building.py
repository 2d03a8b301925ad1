"""`fetch`, `plan`, `build`: each parses, calls one function, prints."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import click

from .. import events, refs, runner
from ..api import Setup
from ..entries import Model
from ..errors import MachineError, Rejected
from ..fallback import Budget, Outcome, run_with_fallback
from ..planning import STAGES, Plan, Stage
from ..runner import Build, How
from ..space import human_bytes
from ..store import size_of
from ..types import Artifact, StageContext, StageName
from . import report, style
from .common import (
    complete_ref,
    confirm,
    json_option,
    place_options,
    print_json,
    quiet_option,
    recipe_options,
    verbose_option,
    yes_option,
)
from .judging import check_reason, conclude
from .progress import Lines, reporter


@click.command("fetch")
@click.argument("model", shell_complete=complete_ref)
@json_option
@quiet_option
@verbose_option
@yes_option
@place_options
def fetch_command(model: str, as_json: bool, quiet: bool, verbose: bool, yes: bool, setup: Setup) -> None:
    """Download a model's checkpoint: says how much, asks, resumes, verifies."""
    ref = setup.registry.expand(refs.parse(model))
    located = fetch(setup, _to_fetch(setup, ref.model), yes, quiet, verbose)
    if as_json:
        data = {"model": ref.model, "source": str(located.source), "revision": located.revision}
        print_json({"schema": 1, **data, "folder": str(located.folder), "bytes": size_of(located.folder)})
    elif not quiet:
        click.echo(f"{ref.model} is in {located.folder}")


def _to_fetch(setup: Setup, name: str) -> Model:
    """The entry to fetch. A Hub id needs none: its family is found when it is here."""
    if refs.is_hub_id(name):
        return Model(name=name, family="", source=(f"hf:{name}",))
    if refs.is_folder(name):
        return setup.model(refs.parse(name))
    return setup.registry.models[name]


def fetch(setup: Setup, model: Model, yes: bool, quiet: bool, verbose: bool = False) -> Any:
    """Fetch with progress on stderr; asks first, with the bars out of the way."""
    with reporter(quiet, verbose) as lines, events.sink(lambda event: lines({**event, "stage": "fetch"})):

        def ask(text: str, size: int | None) -> bool:
            question = f"download {text} ({human_bytes(size) if size else 'size not known'})?"
            lines.__exit__(None, None, None)
            answer = confirm(question, yes)
            lines.__enter__()
            return answer

        return setup.fetch(model, ask)


@click.command("plan")
@click.argument("ref", shell_complete=complete_ref)
@json_option
@recipe_options
def plan_command(ref: str, as_json: bool, setup: Setup, choices: dict[str, Any]) -> None:
    """The stages and keys that build would run, what is there already, and what is missing. Changes nothing."""
    plan = replace(setup, remember=False).plan(ref, **choices)
    rows = planned(setup, plan)
    if as_json:
        print_json({"schema": 1, "ref": str(plan.ref), "target": plan.target, "stages": rows})
        return
    click.echo(title(plan))
    said = ""
    for row in rows:
        key = row["key"][:8] or "-"
        click.echo(f"  {row['name']:<9} {row['status']:<8} {key:<9} {row['provider']}")
        if row["reason"] != said:  # the same holds for all stages: say it once
            said = row["reason"]
            click.echo(f"            {said}" if said else "", nl=bool(said))
        if row["path"]:
            click.echo(f"            {row['path']}")
        if row["command"]:
            click.echo(f"            {shlex.join(row['command'])}")


def planned(setup: Setup, plan: Plan) -> list[dict[str, Any]]:
    """One row a stage, as `plan --json` gives them."""
    rows = []
    engine = None
    general = plan.unavailable or setup.short(plan)
    for stage in plan.stages:
        path = runner.status(plan, stage, setup.store, engine)
        engine = path if stage.name == "stage2" else engine
        problem = None if path else general or plan.lacking.get(stage.name)
        reason = f"{problem.message}; {problem.hint}" if problem else ""
        rows.append(
            {
                "name": stage.name,
                "provider": str(stage.provider),
                "key": stage.key,
                "status": "cached" if path else "blocked" if problem else "to run",
                "command": _command(setup, plan, stage),
                "reason": reason,
                "options": {k: v for k, v in stage.options.items() if v not in (math.inf, -math.inf)},  # no limit
                "path": str(path) if path else None,
            }
        )
    return rows


def _command(setup: Setup, plan: Plan, stage: Stage) -> list[str] | None:
    """The command of the user's own that an engine would run; None if it runs none."""
    from .. import launch

    if stage.name != "stage2" or not plan.engine.programs or not stage.slot:
        return None
    inputs = []
    for before in reversed(plan.stages[: plan.stages.index(stage)]):
        if before.ready:
            inputs.append(before.ready)
        elif before.slot:
            inputs.append(Artifact(before.gives, setup.store.path(before.slot), before.key))
    cache = setup.store.cache(plan.engine.name)
    out = setup.store.path(stage.slot)
    of = StageContext(str(plan.ref), "stage2", stage.options, tuple(inputs), out, plan.target, cache, plan.ranks)
    request = {
        "action": "command",
        "providers": [asdict(stage.provider)],
        "context": of.as_json(),
        "protected": [str(place) for place in setup.store.kept],
    }
    words: list[str] | None = launch.call(
        f"command of {stage.provider}", request, None, lambda _: None, plan.gpus
    ).value
    return words


def title(plan: Plan) -> str:
    """What will be built, and what was chosen for the user."""
    chosen = f"  (chosen here: {', '.join(plan.chosen)})" if plan.chosen else ""
    return f"{style(str(plan.ref), bold=True)} for {plan.target}{chosen}"


@click.command("build")
@click.argument("references", nargs=-1, required=True, metavar="REF...", shell_complete=complete_ref)
@click.option("--fetch", "may_fetch", is_flag=True, help="download what is missing (asks, unless -y)")
@click.option("--until", type=click.Choice(STAGES[:-1]), help="stop after this stage")
@click.option("--no-validate", is_flag=True, help="do not judge the engine: it stays unverified")
@click.option("--accept", metavar="REASON", default="", help="publish it although it fails; the reason is kept")
@click.option("--fallback", is_flag=True, help="after a rejection try what the precision offers next")
@click.option("--max-builds", type=click.IntRange(min=1), default=4, show_default=True, help="of --fallback")
@click.option("--max-minutes", type=click.FloatRange(min=0), default=120, show_default=True, help="of --fallback")
@click.option("--force", is_flag=True, help="build again what is there, and what is estimated not to fit")
@json_option
@quiet_option
@verbose_option
@yes_option
@recipe_options
def build_command(
    references: tuple[str, ...],
    may_fetch: bool,
    until: Any,
    no_validate: bool,
    accept: str,
    fallback: bool,
    max_builds: int,
    max_minutes: float,
    force: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    yes: bool,
    setup: Setup,
    choices: dict[str, Any],
) -> None:
    """Build engines: resolve, calibrate, stage 1, stage 2, validate. What is there already is reused."""
    if until and no_validate:
        raise click.UsageError("--until stops before validation anyway\nleave out --no-validate")
    if (until or no_validate) and (accept or fallback):
        raise click.UsageError("--accept and --fallback are about the validation\nlet it run")
    if accept and fallback:
        raise click.UsageError("--accept publishes what fails, --fallback builds something else\ngive one of them")
    if max_minutes != max_minutes:  # NaN passes every range
        raise click.UsageError("--max-minutes is no number\ngive minutes, 0 or more")
    check_reason(accept)
    how = How(until or STAGES[-1], not no_validate, force, accept)
    budget = Budget(max_builds if fallback else 0, max_minutes)
    plans = _plans(setup, references, choices, how.until, may_fetch, yes, quiet)
    for plan in plans:
        short = None if force else setup.short(plan, how.until)
        if short:
            raise short
    builds: list[Outcome] = []
    try:
        with reporter(quiet, verbose) as lines:
            for text, plan in zip(references, plans, strict=True):
                lines.say(title(plan))
                replan = partial(_replan, setup, text, choices)
                builds.append(run_with_fallback(plan, setup.store, how, budget, replan, lines))
                _conclude(lines, builds[-1].build)
    finally:
        if as_json:
            print_json({"schema": 1, "builds": [outcome.as_json() for outcome in builds]})
    failures = [outcome.build.error for outcome in builds if outcome.build.error]
    for failure in failures:
        report(failure)
    raise SystemExit(failures[0].exit_code if failures else 0)


def _replan(setup: Setup, text: str, choices: dict[str, Any], more: Mapping[str, str]) -> Plan:
    """The plan with more settings."""
    return setup.plan(text, **{**choices, "settings": {**choices["settings"], **more}})


def _plans(
    setup: Setup,
    references: tuple[str, ...],
    chosen: dict[str, Any],
    until: StageName,
    may_fetch: bool,
    yes: bool,
    quiet: bool,
) -> list[Plan]:
    """All plans before any work, so that a wrong last argument costs neither a download nor an hour."""
    with reporter(quiet) as lines, events.sink(lambda event: lines({**event, "stage": "resolve"})):
        wanted = [(text, _plan(setup, text, chosen, until, may_fetch)) for text in references]
    plans = []
    for text, plan in wanted:
        if plan is None or plan.located is None:
            fetch(setup, plan.model if plan else _to_fetch(setup, refs.parse(text).model), yes, quiet)
            plan = setup.plan(text, **chosen)
        plans.append(plan)
    return plans


def _plan(setup: Setup, text: str, chosen: dict[str, Any], until: StageName, may_fetch: bool) -> Plan | None:
    """The plan; None for a Hub id that has to be fetched before its family can be known."""
    try:
        plan = setup.plan(text, **chosen)
    except MachineError:
        if may_fetch and refs.is_hub_id(refs.parse(text).model):
            return None
        raise
    lacking = plan.lacks(setup.missing(plan, until))
    if lacking:
        raise lacking
    if plan.unavailable and not may_fetch:
        raise plan.unavailable
    return plan


def _conclude(lines: Lines, build: Build) -> None:
    """The statistics of one build."""
    if build.error:
        if isinstance(build.error, Rejected):
            conclude(lines, build)
        return
    engine = build.path("stage2")
    peak = max((stage.peak_rss_bytes for stage in build.stages if stage.status == "run"), default=0)
    memory = f", peak memory {human_bytes(peak)}" if peak else ""
    verdict = {"not run": "not validated"}.get(build.report.verdict, f"validation: {build.report.verdict}")
    lines.say(f"  {build.status} in {build.seconds:.1f} s{memory}; {verdict}")
    conclude(lines, build)
    if engine:
        lines.say(f"  {engine}")
        if build.plan.cannot_run:
            lines.say("  carry this folder to such a machine, and there: recipes validate FOLDER")
            return
        lines.say(f'  try: recipes run {build.plan.arguments} "What is the capital of France?"')
