"""What can be built where: a pair of precision and engine, on a target, on this machine. Pure; no plan is made."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from .entries import Calibration, Engine, Model, Precision, StageEntry
from .errors import MachineError, RequestError
from .facts import Facts, within
from .registry import Registry
from .sources.spec import parse
from .space import human_bytes
from .structure import quote
from .targets import compute_of, parts, target_of
from .types import HF_CHECKPOINT, StageName, Value

_AT_LEAST = re.compile(r">=(\d+\.\d)")


def why_not(registry: Registry, precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why this pair can never work, and the nearest that does; two empty strings if it can."""
    reason, hint = unsupported(precision, engine, target)
    near = alternatives(registry, precision, engine, target) if reason else []
    return reason, f"choose {' or '.join(near)}" if near else hint


def alternatives(registry: Registry, precision: Precision, engine: Engine, target: str) -> list[str]:
    """What works in place of a pair that does not: other precisions with this engine, this one with another (`@NAME`).

    Of the precisions the next smaller one and the next larger one, by bits of a weight; of the engines the first.
    """
    able = [p for p in registry.precisions.entries.values() if not unsupported(p, engine, target)[0]]
    smaller = max((p for p in able if p.bits < precision.bits), key=lambda p: p.bits, default=None)
    larger = min((p for p in able if p.bits >= precision.bits), key=lambda p: p.bits, default=None)
    engines = [e for e in registry.engines.entries.values() if not unsupported(precision, e, target)[0]]
    return [p.name for p in (smaller, larger) if p] + [f"@{e.name}" for e in engines[:1]]


def unsupported(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why this pair can never work, and what to change; two empty strings if it can."""
    found = mismatched(precision, engine, target)
    return found if found[0] else unrunnable(precision, engine, target)


def unrunnable(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """That the engine cannot compute what the precision stores, which is made all the same, and what to change."""
    part = next((part for part in parts(target) if not runs(engine, precision, part)), "")
    if not part:
        return "", ""
    where = [pattern for pattern in engine.targets if runs(engine, precision, pattern)]
    return (
        f"{engine.name} does not run {precision.name} ({precision.algorithm}) on {part}",
        f"choose --target {where[0].replace('*', '89')}, or another engine"
        if where
        else "choose another engine; --until stage1 makes its checkpoint alone",
    )


def mismatched(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why not even a checkpoint is to be made of this pair, and what to change; two empty strings if it is."""
    if precision.gives not in engine.takes:
        takes = " or ".join(engine.takes)
        return f"{engine.name} takes {takes}, {precision.name} gives {precision.gives}", "choose another engine"
    if HF_CHECKPOINT not in precision.takes:
        return f"{precision.name} takes {' or '.join(precision.takes)}", "choose another precision"
    if len(parts(target)) > 1 and not engine.combines:
        return f"{engine.name} builds for one target at a time", f"build for {parts(target)[0]}, then for the next"
    return next((found for part in parts(target) if (found := _mismatched(precision, engine, part))[0]), ("", ""))


def _mismatched(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    if not is_target(engine, target):
        return (
            f"{engine.name} builds for {_targets(engine)}, not {target}",
            f"give --target {engine.targets[0].replace('*', '89')} or another engine",
        )
    compute, needed = compute_of(target), precision.needs.compute
    if compute and needed and not within(compute, needed):
        least = _AT_LEAST.fullmatch(needed)
        words = f"{target_of(least[1])} or newer" if least else f"compute capability {needed}"
        return f"{precision.name} needs {words}, this is {target}", "choose another precision or --target"
    return "", ""


def lacking(
    calibration: Calibration | None,
    precision: Precision,
    engine: Engine,
    target: str,
    facts: Facts,
    options: Mapping[str, Value] | None = None,
) -> dict[StageName, MachineError]:
    """What has to be here before the stages of this pair can run here; those that lack nothing are left out.

    Args:
        options: of the engine, as they are settled; of them `runtime` says which programs it needs, and `python` where
            else than on the PATH to look for them.
    """
    found: dict[StageName, MachineError] = {}
    if calibration and (missing := facts.missing(calibration.requires)):
        who = f"{precision.name} (calibration {calibration.name})"
        found["calibrate"] = _uninstalled(who, calibration, missing, facts)
    if missing := facts.missing(precision.requires):
        found["stage1"] = _uninstalled(precision.name, precision, missing, facts)
    if missing := facts.missing(requirements(engine, target)):
        found["stage2"] = found["validate"] = _uninstalled(engine.name, engine, missing, facts)
    elif problem := no_gpu(engine, target, facts) or no_program(engine, facts, options):
        found["stage2"] = problem
    return found


def _uninstalled(who: str, entry: StageEntry, missing: list[str], facts: Facts) -> MachineError:
    hint = entry.install if set(missing) <= set(facts.missing(entry.requires)) else ""
    return MachineError(
        f"{who} needs {facts.described(missing)}", hint or f"pip install {' '.join(repr(m) for m in missing)}"
    )


def no_gpu(engine: Engine, target: str, facts: Facts) -> MachineError | None:
    """That an engine compiles on the GPU it is for, and this machine has none such; None if that is no obstacle."""
    here = ", ".join(f"{gpu.name} ({gpu.target})" for gpu in facts.gpus) or "no NVIDIA GPU"
    if not engine.needs_gpu or any(gpu.target == target for gpu in facts.gpus):
        return None
    return MachineError(
        f"{engine.name} compiles for {target} on such a GPU alone, and here is {here}",
        "build it on that machine, or with an engine that needs no GPU to compile",
    )


def no_program(engine: Engine, facts: Facts, options: Mapping[str, Value] | None = None) -> MachineError | None:
    """Which program an engine needs that is not here; None if all are. `options` as for `lacking`."""
    if absent := next((tool for tool in engine.tools if tool_name(tool) not in facts.programs), ""):
        name, variable = tool_name(absent), absent.partition("|")[0] if "|" in absent else ""
        other = f", or name another in the environment variable {variable[1:]}" if variable else ""
        return MachineError(f"{engine.name} needs the program {name}, not found here", f"install {name}{other}")
    if not engine.programs:
        return None
    options = options or {}
    runtime = str(options.get("runtime") or next(iter(engine.programs)))
    python = str(options.get("python") or engine.python)
    missing = [name for name in engine.programs.get(runtime, ()) if not program(name, python, facts)]
    if not missing:
        return None
    others = [other for other in engine.programs if other != runtime]
    here = [other for other in others if all(name in facts.programs for name in engine.programs[other])] or others
    usable = f", or {' or '.join(f'--runtime {other}' for other in here)}" if here else ""
    beside = f" beside {python}" if python else " here"
    return MachineError(f"{engine.name} needs the program {missing[0]}, not found{beside}", f"{engine.install}{usable}")


def tool_name(tool: str) -> str:
    """The program that an engine's `tools` mean: of `$CXX|g++` what the environment variable names, else the other."""
    variable, _, name = tool.rpartition("|")
    return os.environ.get(variable.removeprefix("$"), name) if variable else name


def program(name: str, python: str, facts: Facts) -> str:
    """Where a program is: beside the interpreter of the environment it belongs to, if one is named, else on the PATH.
    Empty if it is not there."""
    if python:
        try:
            path = Path(python).expanduser().with_name(name)
            return str(path) if os.access(path, os.X_OK) else ""
        except (OSError, RuntimeError, ValueError):  # `~` of nobody, a path without a name
            return ""
    return facts.programs.get(name, "")


def not_fetched(model: Model) -> MachineError:
    """That the checkpoint has to be fetched first, and how much that is."""
    folders = [source.name for source in map(parse, model.source) if source.scheme == "file"]
    if len(folders) == len(model.source):
        return MachineError(
            f"the checkpoint of {model.name} is not on this machine",
            f"copy it to {' or '.join(os.path.abspath(os.path.expanduser(folder)) for folder in folders)}, "
            f"or change models.{quote(model.name)}.source in your registry.toml",
        )
    size = f" (about {human_bytes(model.parameters * 2)})" if model.parameters else ""
    return MachineError(
        f"the checkpoint of {model.name} is not on this machine",
        f"run `recipes fetch {model.name}`{size}, or build with --fetch",
    )


def requirements(engine: Engine, target: str) -> tuple[str, ...]:
    """What an engine needs for a target."""
    some = [pattern for pattern in engine.target_requires if any(fnmatch(part, pattern) for part in parts(target))]
    return tuple(dict.fromkeys([*engine.requires, *(r for pattern in some for r in engine.target_requires[pattern])]))


def default_target(precision: Precision, engine: Engine, facts: Facts) -> str:
    """This machine's GPU if the engine builds this for it and has what it needs, else the CPU, else the GPU."""
    for candidate in (facts.target, "cpu"):
        fits = is_target(engine, candidate) and runs(engine, precision, candidate)
        if fits and not facts.missing(requirements(engine, candidate)):
            return candidate
    return "cpu" if "cpu" in engine.targets else facts.target


def example_target(precision: Precision, engine: Engine, facts: Facts) -> str:
    """The default target; where nothing here is one for this engine, another that it builds for."""
    default = default_target(precision, engine, facts)
    if is_target(engine, default):
        return default
    named = [target for target in engine.targets if "*" not in target]
    return next((t for t in named if not unsupported(precision, engine, t)[0]), named[0] if named else default)


def is_target(engine: Engine, target: str) -> bool:
    """Whether the engine builds for this one target."""
    return any(fnmatch(target, pattern) for pattern in engine.targets)


def untargeted(engine: Engine, facts: Facts) -> RequestError | MachineError:
    """That no target was named and this machine is none."""
    here = f"this machine has {facts.target}" if facts.gpus else "this machine has no NVIDIA GPU"
    reason = f"{engine.name} builds for {_targets(engine)}, and {here}"
    if engine.needs_gpu:
        return MachineError(reason, "build it where such a GPU is, or name one: --target … --until stage1")
    return RequestError(reason, f"name what it is for: --target {engine.targets[0].replace('*', '89')}")


def default_engine(registry: Registry, precision: Precision, facts: Facts, target: str | None) -> str:
    """The first engine in order of preference that can build this here; else one that could elsewhere."""
    names = [n for n in registry.defaults.engines if n in registry.engines.entries]
    possible, here = [], []
    for name in names:
        engine = registry.engines[name]
        where = target or default_target(precision, engine, facts)
        if not mismatched(precision, engine, where)[0]:
            here.append(name)
        if not unsupported(precision, engine, where)[0] and not no_gpu(engine, where, facts):
            possible.append(name)
            if not facts.missing(requirements(engine, where)) and not no_program(engine, facts):
                return name
    there = [name for name in names if target and all(is_target(registry.engines[name], t) for t in parts(target))]
    if names:
        return (possible or there or here or names)[0]
    raise RequestError("no engine is installed", "name one with @ENGINE, or install a package that adds one")


def _targets(engine: Engine) -> str:
    return ", ".join(sorted(engine.targets, key=lambda target: (len(target), target)))


def runs(engine: Engine, precision: Precision, target: str) -> bool:
    """Whether the engine can run checkpoints of the precision's algorithm on this target, or pattern of targets."""
    known = [algorithms for pattern, algorithms in engine.algorithms.items() if fnmatch(target, pattern)]
    return not precision.algorithm or not known or any(precision.algorithm in algorithms for algorithms in known)
