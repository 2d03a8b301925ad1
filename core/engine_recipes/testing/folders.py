"""What a stage left: whether it kept to its folder, and what is there after it was killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .. import history
from ..checkpoint.statistics import ABOUT
from ..store import MANIFEST, PLACES, Store, is_whole, read_manifest
from ..types import StageName
from .building import Recipe
from .faults import Fault, Skip, expect
from .lab import Lab
from .processes import LIMIT, answered, end, kill_left_over, left_over, start

#: How core says that it ended what a stage had left running.
_ENDED = " running, which were ended"
#: Files of the workspace that core itself writes.
_CORES = (history.NAME, "digests.json")
#: Seconds after which a stage that has written nothing is killed at its work.
_PATIENCE = 5
Snapshot = Mapping[str, tuple[int, int]]


def keeps_to_its_folder(lab: Lab, recipe: Recipe, stage: StageName) -> Path:
    """Build up to a stage, in a workspace of its own, and see that nothing else changed. What the stage left.

    Watched are the model, the current folder, the home, temporary files and the package itself.

    Raises:
        Fault: files outside the stage's folder were written or changed, or processes go on running.
    """
    workspace = lab.place(f"{stage}-{recipe.precision}-{recipe.engine}/workspace")
    if stage != "resolve":
        lab.build(recipe, "stage1" if stage == "stage2" else "resolve", workspace=workspace)
    watched = [workspace, Path(recipe.model), *(lab.place(name) for name in ("here", "home", "temporary"))]
    code = lab.owner.path.parent if lab.owner else lab.folder
    watched.append(code)
    earlier = _look(watched)
    lab.warnings.clear()
    build = lab.build(recipe, stage, workspace=workspace)
    left = left_over(lab)
    kill_left_over(lab)
    left += [warning for warning in lab.warnings if _ENDED in warning]
    expect(not left, "processes go on running after the stage has ended:\n" + "\n".join(left))
    made = [result.path for result in build.stages if result.path and result.status == "run"]
    allowed = [*made, *(workspace / name for name in ("locks", "logs", "caches", *_CORES))]
    later = _look(watched)
    changed = [path for path in {**earlier, **later} if earlier.get(path) != later.get(path)]
    strange = sorted(p for p in changed if not any(Path(p) == ok or ok in Path(p).parents for ok in allowed))
    strange = [p for p in strange if not (p.endswith(".py") and code in Path(p).parents)]  # saved in an editor
    shown = "\n".join(strange[:5])
    expect(
        not strange,
        f"{stage} writes outside the folder it is given, or leaves temporary files:\n{shown}\n"
        "Write into context.out only; what makes the next build faster belongs into context.cache",
    )
    folder = build.path(stage)
    assert folder is not None
    locks = [file for file in contents(folder) if file.endswith(".lock")]
    expect(
        not locks,
        f"{stage} leaves {', '.join(locks)} in context.out: locks belong into context.cache, or are removed in the end",
    )
    return folder


def _look(folders: list[Path]) -> Snapshot:
    """Every file below: path -> size and time of change. What Python keeps of modules is no matter."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if "__pycache__" not in path.parts and (not path.is_dir() or path.is_symlink()):
                status = path.lstat()
                found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """File -> bytes, without the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def expect_the_same(first: Path, again: Path, what: str, why: str) -> None:
    """Raise Fault, which names the files, unless two folders hold the same, but for what says how they came about."""
    ours, theirs = contents(first), contents(again)
    different = [file for file in sorted({*ours, *theirs} - {ABOUT}) if ours.get(file) != theirs.get(file)]
    expect(not different, f"{what} differ in {', '.join(different)}: {why}")


def survives_a_kill(lab: Lab, recipe: Recipe, stage: StageName) -> None:
    """Kill the stage's worker, then the whole build, in the middle; then build.

    Raises:
        Fault: something looks whole that is not, something goes on running, or the next build fails.
    """
    for whom in ("worker", "build"):
        workspace = lab.folder / f"killed-{stage}-{recipe.precision}-{recipe.engine}-{whom}"
        for wait in (True, False, False):  # one that is too quick to be met at its work is killed as it starts
            shutil.rmtree(workspace, ignore_errors=True)
            _prepare(lab, recipe, stage, workspace)
            said = _interrupt(lab, recipe, stage, workspace, whom, wait)
            if said is not None:
                break
        if said is None:
            raise Skip(f"{stage} is over before it can be killed")
        if whom == "worker":
            who = str(lab.plan(recipe).stage(stage).provider)
            expect(
                said.get("error") == "StageFailed" and who in said.get("message", ""),
                f"killing the worker of {stage} should be told as a failure of {who}, and this is said: {said}",
            )
        left = left_over(lab)
        kill_left_over(lab)
        expect(not left, f"after the {whom} was killed there still runs:\n" + "\n".join(left))
        for folder in (workspace / PLACES[stage]).glob("[!.]*"):
            whole = read_manifest(folder)
            expect(whole and is_whole(folder, whole), f"{folder.name} was published though {stage} was killed")
        build = lab.build(recipe, stage, workspace=workspace)
        garbage = [path.name for path in Store(workspace).garbage()]
        expect(build.path(stage), f"after {stage} was killed it cannot be built")
        expect(not garbage, f"what a killed {stage} left is not swept by the next build: {', '.join(garbage)}")


def _prepare(lab: Lab, recipe: Recipe, stage: StageName, workspace: Path) -> None:
    """Put into a new workspace what the stages before this one left in the lab's."""
    names = [one.name for one in lab.plan(recipe).stages]
    for result in lab.build(recipe, names[names.index(stage) - 1]).stages:
        if result.path:
            place = workspace / result.path.relative_to(lab.setup.workspace)
            shutil.copytree(result.path, place, symlinks=True, dirs_exist_ok=True)


def _interrupt(
    lab: Lab, recipe: Recipe, stage: StageName, workspace: Path, whom: str, wait: bool
) -> dict[str, str] | None:
    """Build in a process of its own, and kill it or its worker; what it said then. None if it was over before.

    Args:
        wait: until the stage has written something, or for _PATIENCE, and not only until its worker has started.
    """
    pids = lab.place("answers") / f"pids-{time.monotonic_ns()}"
    pids.touch()
    request = {"recipe": asdict(recipe), "workspace": str(workspace), "until": stage, "pids": str(pids)}
    child, answer = start(lab, "build", request)
    try:
        worker = _wait_for_the_stage(child, workspace / PLACES[stage], pids, wait)
        if worker is None:
            return None
        with suppress(ProcessLookupError):  # it ended just now
            os.kill(worker if whom == "worker" else child.pid, signal.SIGKILL)
        code = child.wait(LIMIT)
    except subprocess.TimeoutExpired:
        raise Fault(f"the build waits for ever after the worker of {stage} was killed") from None
    finally:
        end(child)
    said = dict(answered(answer).get("value", {}))
    return None if code == 0 and not said else said


def _wait_for_the_stage(child: subprocess.Popen[bytes], place: Path, pids: Path, wait: bool) -> int | None:
    """The stage's worker, at its work; None if the build was over before."""
    deadline = time.monotonic() + LIMIT
    known: set[str] = set()
    late = 0.0
    while child.poll() is None and time.monotonic() < deadline:
        staging = next(iter(place.glob(".tmp-*")), None) if place.is_dir() else None
        lines = pids.read_text(encoding="ascii").split()
        fresh = [line for line in lines if line not in known]
        if staging is None:
            known = set(lines)  # workers of checks and of earlier stages
        elif fresh:
            late = late or time.monotonic() + _PATIENCE
            if not wait or _is_written_to(staging) or time.monotonic() > late:
                return int(fresh[-1])
        time.sleep(0.001)
    return None


def _is_written_to(staging: Path) -> bool:
    try:
        return any(staging.iterdir())
    except FileNotFoundError:  # it was published just now
        return False
