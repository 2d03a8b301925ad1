"""Walks a plan: for each stage a store hit, or the provider's hook in a worker. Emits events, prints nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from . import __version__, availability, confine, gate, history, portability
from .errors import Interrupted, RecipesError, Rejected, StageFailed, disk_error
from .events import Event
from .launch import Answer, call
from .planning import Plan
from .stages import STAGES, Stage, provider
from .store import MANIFEST, Slot, Store, note, read_json, read_manifest, size_of
from .types import DECODER, HF_CHECKPOINT, Artifact, Findings, Provider, Report, StageContext, StageName

#: How a stage went.
StageStatus = Literal["run", "cached", "skipped", "failed"]
#: How a build went.
BuildStatus = Literal["built", "cached", "rejected", "failed"]
State = tuple[int, int, int, int] | None


@dataclass(frozen=True)
class StageResult:
    """How one stage went. Bytes of what it left, peak resident set of its process."""

    name: StageName
    status: StageStatus
    seconds: float = 0.0
    key: str = ""
    path: Path | None = None
    bytes: int = 0
    peak_rss_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        """The stage object of `build --json`."""
        return {**asdict(self), "path": str(self.path) if self.path else None, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Build:
    """A finished build, also a failed one.

    Attributes:
        plan: what was built.
        stages: how each of them went, in order, as far as it came.
        seconds: that all of it took.
        report: what validation found.
        error: why it is not usable; None if it is.
    """

    plan: Plan
    status: BuildStatus
    stages: tuple[StageResult, ...]
    seconds: float
    report: Report
    error: RecipesError | None = None

    def path(self, name: StageName) -> Path | None:
        """Where a stage's result lies."""
        return next((s.path for s in self.stages if s.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """One build of `build --json`."""
        checkpoint, engine = self.path("stage1"), self.path("stage2")
        return {
            "ref": str(self.plan.ref),
            "model": self.plan.model.name,
            "precision": self.plan.precision.name,
            "engine": self.plan.engine.name,
            "target": self.plan.target,
            "status": self.status,
            "stages": [stage.as_json() for stage in self.stages],
            "checkpoint_dir": str(checkpoint) if checkpoint else None,
            "engine_dir": str(engine) if engine else None,
            "seconds": round(self.seconds, 3),
            "validation": self.report.as_json(),
        }


@dataclass(frozen=True)
class How:
    """Choices about running, not about what is built; none of them is in a key.

    Attributes:
        force: do again what was done, and what is estimated not to fit; what a plan says is ready is used all the
            same.
        accept: why an engine that fails its validation is published nevertheless; empty: it is not.
    """

    until: StageName = "validate"
    validate: bool = True
    force: bool = False
    accept: str = ""


def status(plan: Plan, stage: Stage, store: Store, engine: Path | None = None) -> Path | None:
    """Where the stage's result is, if it is there already. For validate: the engine's folder, if it was judged."""
    if stage.ready:
        return stage.ready.path
    if stage.slot is not None:
        folder = store.get(stage.slot)
        if folder and stage.name == "resolve" and plan.located:
            # the same contents may lie elsewhere by now, and other contents where they lay
            known = read_json(folder / "source.json").get("folder")
            return folder if known == str(plan.located.folder.absolute()) else None
        return folder
    if stage.name == "validate" and engine and stage.key and gate.found(engine, stage.key):
        return engine
    return None


def run(plan: Plan, store: Store, how: How, listen: Callable[[Event], None]) -> Build:
    """Run what is missing. Never raises for a stage that fails: the build says so and `error` why.

    Args:
        plan: whose missing stages lack nothing here.
        listen: gets `stage` events (name, status started, cached, waiting or finished) and what workers send,
            each with the stage's name under `stage`.

    Raises:
        RecipesError: the plan is blocked, or the workspace cannot be written.
        Interrupted: Ctrl-C; finished stages are kept.
    """
    walk = _Walk(plan, store, how, listen)
    lacking = plan.lacks(stage.name for stage in walk.stages if walk.hit(stage) is None) or plan.unavailable
    if lacking:
        raise lacking
    started = time.monotonic()
    error: RecipesError | None = None
    try:
        walk.all()
    except KeyboardInterrupt:
        raise Interrupted("interrupted", "finished stages are kept: run the same command to go on") from None
    except RecipesError as failure:
        error = failure
    seconds = time.monotonic() - started
    build = Build(plan, walk.outcome(error), tuple(walk.results), seconds, walk.report, error)
    is_build = plan.stage("stage2").ready is None  # and no mere judging of an engine
    if is_build and any(result.status in ("run", "failed") for result in walk.results):
        _remember(store, build)
    return build


class _Walk:
    """One walk through a plan, and what came of it so far."""

    def __init__(self, plan: Plan, store: Store, how: How, listen: Callable[[Event], None]) -> None:
        self.plan, self.store, self.how, self.listen = plan, store, how, listen
        self.results: list[StageResult] = []
        self.artifacts: list[Artifact] = []  # nearest first, as hooks get them
        self.report = Report()
        self.imported = self.checked = False
        names = STAGES[: STAGES.index(how.until) + 1]
        self.stages = [s for s in plan.stages if s.name in names and (s.name != "baseline" or how.validate)]

    def all(self) -> None:
        for stage in self.stages:
            if stage.name == "validate":
                self.validate(stage)
            else:
                self.build(stage)

    def outcome(self, error: RecipesError | None) -> BuildStatus:
        if isinstance(error, Rejected):
            return "rejected"
        if error:
            return "failed"
        return "built" if any(result.status == "run" for result in self.results) else "cached"

    def build(self, stage: Stage) -> None:
        folder = self.hit(stage)
        if folder is None:
            assert stage.slot is not None
            with self.store.lock(stage.slot, lambda: self.tell(stage, "waiting")):
                folder = self.hit(stage)  # somebody else built it meanwhile
                if folder is None:
                    folder = self.produce(stage, stage.slot)
                else:
                    self.keep(stage, folder)
        else:
            self.keep(stage, folder)
        # nearest first; but a baseline is no step on the way to the engine, which judges find in the first place
        self.artifacts.insert(
            len(self.artifacts) if stage.name == "baseline" else 0, Artifact(stage.gives, folder, stage.key)
        )

    def hit(self, stage: Stage) -> Path | None:
        if self.how.force and not stage.ready and stage.name != "baseline":
            return None
        return status(self.plan, stage, self.store)

    def keep(self, stage: Stage, folder: Path) -> None:
        manifest = read_manifest(folder) or {}
        self.results.append(
            StageResult(
                stage.name, "cached", 0.0, stage.key, folder, size_of(folder), manifest.get("peak_rss_bytes", 0)
            )
        )
        self.tell(stage, "cached", path=str(folder))

    def produce(self, stage: Stage, slot: Slot) -> Path:
        started = time.monotonic()
        try:
            self.check(stage)
            self.tell(stage, "started")
            with self.store.staging(slot) as out:
                answer = self.work(stage, out, self.store.log_path(self.store.path(slot), slot.place))
                seconds = time.monotonic() - started
                if stage.name == "stage2":
                    gate.withdraw(self.store, self.store.path(slot))  # built again under the same key: not judged yet
                folder = self.store.commit(slot, out, self.manifest(stage, answer, seconds))
        except OSError as error:
            self.results.append(StageResult(stage.name, "failed", time.monotonic() - started, stage.key))
            raise disk_error(error, self.store.workspace) from None
        except RecipesError:
            self.results.append(StageResult(stage.name, "failed", time.monotonic() - started, stage.key))
            raise
        result = StageResult(stage.name, "run", seconds, stage.key, folder, size_of(folder), answer.peak_rss_bytes)
        self.results.append(result)
        self.tell(stage, "finished", seconds=seconds, bytes=result.bytes, path=str(folder))
        return folder

    def check(self, first: Stage) -> None:
        """Before the first stage, and not after hours: import every provider, and ask whether it refuses the model."""
        resolved = next((a.path / DECODER for a in self.artifacts if a.kind == HF_CHECKPOINT), None)
        if self.checked or (self.imported and resolved is None):
            return
        stages = [stage for stage in self.stages if stage.slot]  # nobody is asked who has nothing to do
        request = {
            "action": "check",
            "providers": [asdict(stage.provider) for stage in stages],
            "contexts": [self.context(stage, Path(os.devnull)).as_json() for stage in stages],
            "decoder": str(resolved) if resolved else None,
            "protected": self.protected(),
        }
        call("checking the plan", request, None, lambda e: self.listen({**e, "stage": first.name}))
        self.imported, self.checked = True, resolved is not None

    def work(self, stage: Stage, out: Path, log: Path | None, judges: Iterable[Provider] = ()) -> Answer:
        located = self.plan.located
        assert located is not None
        self.store.cache(self.plan.engine.name).parent.mkdir(parents=True, exist_ok=True)  # no stage may make it
        request = {
            "action": "stage",
            "providers": [asdict(provider) for provider in (judges or [stage.provider])],
            "context": self.context(stage, out).as_json(),
            "gives": stage.gives,
            "data": stage.preimage.get("data", {}),
            "claims": {
                "algorithm": self.plan.precision.algorithm,
                "bits": self.plan.precision.bits,
                "gives": self.plan.precision.gives,
                "not_compared": self.plan.not_compared,
                "unwitnessed": self.plan.unwitnessed,
                "cannot_run": self.plan.cannot_run,
                "engine_options": self.plan.stage("stage2").options,
            },
            "protected": self.protected(),
            "architectures": self.plan.family.architectures,
            "source": {
                "folder": str(located.folder.absolute()),
                "spec": str(located.source),
                "revision": located.revision,
                "identity": located.identity,
            },
        }
        what = f"{stage.name} of {stage.provider}"
        before = self.content()
        try:
            answer = call(what, request, log, lambda e: self.listen({**e, "stage": stage.name}), self.plan.gpus)
        finally:
            changed = self.changed(before)
        if changed:
            raise StageFailed(
                f"{changed} was changed while {what} read it",
                f"it is not used again; if nobody else did it, report this to the authors of {stage.provider.package}",
            )
        return answer

    def protected(self) -> list[str]:
        """What no stage may write to, but for its own folder: what others made, and the source."""
        source = confine.files_of(self.plan.located.folder) if self.plan.located else []
        return [str(path) for path in (*self.store.kept, *source)]

    def content(self) -> dict[Path, dict[Path, State]]:
        """Of every folder that is read: itself, and its files."""
        folders = {
            a.path: [a.path / name for name in (read_manifest(a.path) or {}).get("files", ())] for a in self.artifacts
        }
        if self.plan.located:
            folder = self.plan.located.folder
            folders[folder] = confine.files_of(folder)
        return {folder: {path: _state(path) for path in (folder, *files)} for folder, files in folders.items()}

    def changed(self, before: Mapping[Path, Mapping[Path, State]]) -> Path | None:
        """The first file that is not as it was. An artifact's folder is then no longer taken for whole: a library wrote
        where Python code is not let. A folder that another process has put in its place is nobody's fault."""
        for folder, files in before.items():
            now = {path: _state(path) for path in files}
            wrong = [path for path in files if path != folder and now[path] != files[path]]
            if wrong and _same_folder(files[folder], now[folder]):
                if self.store.owns(folder):
                    (folder / MANIFEST).unlink(missing_ok=True)
                return wrong[0]
        return None

    def context(self, stage: Stage, out: Path) -> StageContext:
        return StageContext(
            ref=str(self.plan.ref),
            stage=stage.name,
            options=stage.options,
            inputs=tuple(self.artifacts),
            out=out,
            target=self.plan.target,
            cache=self.store.cache(self.plan.engine.name),
            ranks=self.plan.ranks,
        )

    def manifest(self, stage: Stage, answer: Answer, seconds: float) -> dict[str, Any]:
        located = self.plan.located
        return {
            "schema": 1,
            "engine_recipes": __version__,
            "ref": str(self.plan.ref),
            "stage": stage.name,
            "kind": stage.gives,
            "target": self.plan.target if stage.name == "stage2" else None,
            "provider": asdict(stage.provider),
            "options": stage.options,
            "set": self.plan.recipe,
            "checkpoint_from_elsewhere": self.plan.is_of_strangers,
            "preimage": stage.preimage,
            "inputs": [{**asdict(a), "path": str(a.path)} for a in self.artifacts],
            "source": {"spec": str(located.source), "revision": located.revision} if located else None,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            "peak_rss_bytes": answer.peak_rss_bytes,
            "machine": portability.describe(
                self.plan.facts, availability.requirements(self.plan.engine, self.plan.target)
            ),
            "result": answer.value,
        }

    def validate(self, stage: Stage) -> None:
        engine = self.artifacts[0].path
        if not self.how.validate:
            self.results.append(StageResult("validate", "skipped", key=stage.key))
            return
        with self.store.lock_folder(engine, lambda: self.tell(stage, "waiting")):
            found = self.known(stage, engine)
            if found is None:
                found = self.look(stage, engine)
            self.publish(stage, engine, found)

    def known(self, stage: Stage, engine: Path) -> Findings | None:
        """What was measured before, under this key; what lies beside an engine from elsewhere proves nothing."""
        found = gate.found(engine, stage.key) if self.store.holds(engine) and not self.how.force else None
        if found is not None:
            self.results.append(StageResult("validate", "cached", key=stage.key, path=engine))
            self.tell(stage, "cached", path=str(engine))
        return found

    def look(self, stage: Stage, engine: Path) -> Findings:
        """Measure."""
        started = time.monotonic()
        self.tell(stage, "started")
        judges = [provider("family", self.plan.family), provider("precision", self.plan.precision), stage.provider]
        try:
            with self.store.scratch(engine) as scratch:  # judges may write, but leave nothing
                answer = self.work(stage, scratch, self.store.log_path(engine), judges)
        except RecipesError:
            self.results.append(StageResult("validate", "failed", time.monotonic() - started, stage.key, engine))
            raise
        seconds = time.monotonic() - started
        found = replace(Findings.from_json(answer.value), seconds=round(seconds, 3))
        self.results.append(
            StageResult("validate", "run", seconds, stage.key, engine, peak_rss_bytes=answer.peak_rss_bytes)
        )
        verdict = gate.judge(found, self.plan.bounds).verdict
        self.tell(stage, "finished", seconds=seconds, verdict=verdict)
        return found

    def publish(self, stage: Stage, engine: Path, found: Findings) -> None:
        """Judge, keep the verdict, and give the engine its plain name unless it failed and nobody accepts that."""
        before, report = gate.read(engine), gate.judge(found, self.plan.bounds)
        ran = self.results[-1].status == "run"
        if report.verdict == "fail":
            # what was accepted were these failures as they were measured then
            known = before.accepted if before and not ran and report.failed <= before.failed else ""
            report = replace(report, accepted=self.how.accept or known)
        self.report = report
        try:
            if ran or report != before:
                gate.write(engine, stage.key, found, report)
            if report.accepted != (before.accepted if before else ""):
                note(engine, accepted=report.accepted or None)
        except OSError as error:
            raise disk_error(error, engine) from None
        ours = self.store.holds(engine) and not gate.is_of_strangers(read_manifest(engine) or {})
        if report.verdict == "fail" and not report.accepted:
            if ours:
                gate.withdraw(self.store, engine)
            raise _rejected(self.plan, report, engine)
        news = ran or not (before and before.is_good) or not self.store.plain(engine).exists()
        if ours and news and report.is_good:
            self.store.link(engine)

    def tell(self, stage: Stage, what: str, **more: Any) -> None:
        self.listen({"event": "stage", "stage": stage.name, "status": what, "provider": str(stage.provider), **more})


def _state(path: Path) -> State:
    """Device, inode, size and time of change; for a folder the first two say which it is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _same_folder(before: State, now: State) -> bool:
    return before is not None and now is not None and before[:2] == now[:2]


def _rejected(plan: Plan, report: Report, engine: Path) -> Rejected:
    failed = [check for check in report.checks if check.verdict == "fail"]
    first = failed[0]
    number = f" ({first.value:g}, limit {first.limit:g})" if first.value is not None and first.limit is not None else ""
    return Rejected(
        f"{plan.ref} was built and rejected: {first.name}{number}"
        + (f", and {len(failed) - 1} more" if failed[1:] else ""),
        f"{first.note or 'see the checks'}; the engine is kept for study in {engine}",
    )


def _remember(store: Store, build: Build) -> None:
    line: Mapping[str, Any] = {
        "schema": 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "error": build.error.message if build.error else None,
        **build.as_json(),
    }
    try:
        history.append(store.workspace, line)
    except OSError as error:
        raise disk_error(error, store.workspace) from None
