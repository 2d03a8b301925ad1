"""After a rejection: what the precision offers next, built and judged, within a budget."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .errors import RecipesError, Rejected
from .events import Event
from .launch import call
from .planning import Plan
from .runner import Build, How, run
from .stages import provider
from .store import Store
from .types import Artifact, StageContext, Value


@dataclass(frozen=True)
class Budget:
    """How much may be tried: builds after the first, and minutes for all of them together; checked before each."""

    builds: int = 4
    minutes: float = 120


@dataclass(frozen=True)
class Attempt:
    """One build on the way: what was set beyond the request, and what came of it."""

    settings: Mapping[str, Value]
    build: Build

    def as_json(self) -> dict[str, Any]:
        """One entry of a build's `attempts`."""
        reason = self.build.error.message if self.build.error else ""
        engine = self.build.path("stage2")
        data = {"settings": dict(self.settings), "status": self.build.status, "verdict": self.build.report.verdict}
        return {**data, "reason": reason, "engine_dir": str(engine) if engine else None}


@dataclass(frozen=True)
class Outcome:
    """The build that counts, the last that was judged, and all that were tried, in order."""

    build: Build
    attempts: tuple[Attempt, ...]

    def as_json(self) -> dict[str, Any]:
        """One build of `build --json`."""
        return {**self.build.as_json(), "attempts": [attempt.as_json() for attempt in self.attempts]}


def run_with_fallback(
    plan: Plan,
    store: Store,
    how: How,
    budget: Budget,
    replan: Callable[[Mapping[str, str]], Plan],
    listen: Callable[[Event], None],
) -> Outcome:
    """Build; while the gate rejects it, build what the precision offers next.

    Args:
        plan: what was asked for.
        replan: makes the plan again with more settings, as in `--set`.
        listen: gets the builds' events, and a `fallback` event before each attempt with its `settings` and `reason`.
    """
    deadline = time.monotonic() + 60 * budget.minutes
    attempts = [Attempt({}, run(plan, store, how, listen))]
    last, tried = attempts[0], [plan.stage("stage2").key]
    while budget.builds and isinstance(last.build.error, Rejected):
        if len(attempts) > budget.builds or time.monotonic() > deadline:
            listen({"event": "warn", "text": f"the fallback's budget is spent after {len(attempts)} builds"})
            break
        try:
            chosen = next(_untried(last, replan, tried, listen), None)
        except RecipesError as error:  # a plugin's fault must not hide the rejection
            listen({"event": "warn", "text": f"no fallback: {error.message}"})
            break
        if chosen is None:
            listen({"event": "warn", "text": f"{plan.precision.name} has nothing else to offer"})
            break
        settings, following = chosen
        tried.append(following.stage("stage2").key)
        listen({"event": "fallback", "settings": settings, "reason": last.build.error.message})
        attempts.append(Attempt(settings, run(following, store, replace(how, force=False), listen)))
        if attempts[-1].build.error is None or isinstance(attempts[-1].build.error, Rejected):
            last = attempts[-1]
        else:  # nor must another failure on the way
            listen({"event": "warn", "text": f"that failed: {attempts[-1].build.error.message}"})
    return Outcome(last.build, tuple(attempts))


def _untried(
    last: Attempt, replan: Callable[[Mapping[str, str]], Plan], tried: list[str], listen: Callable[[Event], None]
) -> Iterator[tuple[dict[str, Value], Plan]]:
    """Settings and plan of each offer that leads to an engine that was not built yet."""
    for offer in _offers(last.build, listen):
        settings = {**last.settings, **offer}
        plan = replan({key: str(value) for key, value in settings.items()})
        if plan.stage("stage2").key not in tried:
            yield settings, plan


def _offers(build: Build, listen: Callable[[Event], None]) -> list[Mapping[str, Value]]:
    """What the precision would try next. Asked in a worker: it is a plugin's code."""
    plan, stage = build.plan, build.plan.stage("stage1")
    names = ("calibrate", "resolve")
    before = [s for name in names for s in plan.stages if s.name == name]
    paths = [(stage, build.path(stage.name)) for stage in before]
    inputs = tuple(Artifact(stage.gives, path, stage.key) for stage, path in paths if path)
    context = StageContext(str(plan.ref), "stage1", stage.options, inputs, Path(os.devnull), plan.target)
    request = {
        "action": "fallbacks",
        "providers": [asdict(provider("precision", plan.precision))],
        "context": context.as_json(),
        "engine": str(build.path("stage2")),
    }
    offers: list[Mapping[str, Value]] = call("asking for fallbacks", request, None, listen).value
    return offers
