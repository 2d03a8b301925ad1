"""What can be built where: a pair of precision and engine, on a target, on this machine. Pure; no plan is made."""

from __future__ import annotations

from fnmatch import fnmatch

from .errors import MachineError, RequestError
from .facts import Facts, within
from .registry import Calibration, Engine, Model, Precision, Registry
from .space import human_bytes
from .types import HF_CHECKPOINT


def unsupported(precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why this pair can never work, and what would; two empty strings if it can."""
    if precision.gives not in engine.takes:
        takes = " or ".join(engine.takes)
        return f"{engine.name} takes {takes}, {precision.name} gives {precision.gives}", "choose another engine"
    if HF_CHECKPOINT not in precision.takes:
        return f"{precision.name} takes {' or '.join(precision.takes)}", "choose another precision"
    if not any(fnmatch(target, pattern) for pattern in engine.targets):
        return (
            f"{engine.name} builds for {', '.join(engine.targets)}, not {target}",
            f"give --target {engine.targets[0].replace('*', '89')} or another engine",
        )
    if not _runs(engine, precision, target):
        where = [pattern for pattern in engine.targets if _runs(engine, precision, pattern)]
        return (
            f"{engine.name} does not run {precision.name} ({precision.algorithm}) on {target}",
            f"choose --target {where[0].replace('*', '89')}, or another engine" if where else "choose another engine",
        )
    compute = _compute(target)
    if compute and precision.needs.compute and not within(compute, precision.needs.compute):
        return (
            f"{precision.name} needs compute capability {precision.needs.compute}, {target} is {compute}",
            "choose another precision or --target",
        )
    return "", ""


def lacking(
    calibration: Calibration | None, precision: Precision, engine: Engine, target: str, facts: Facts
) -> MachineError | None:
    """What has to be installed before this pair can be built here; None if nothing has."""
    first = [(calibration, calibration.requires)] if calibration else []
    for entry, requires in (*first, (precision, precision.requires), (engine, requirements(engine, target))):
        missing = facts.missing(requires)
        if missing:
            hint = entry.install if set(missing) <= set(facts.missing(entry.requires)) else ""
            hint = hint or f"pip install {' '.join(repr(m) for m in missing)}"
            who = f"{precision.name} (calibration {entry.name})" if entry is calibration else entry.name
            return MachineError(f"{who} needs {facts.described(missing)}", hint)
    return None


def not_fetched(model: Model) -> MachineError:
    """That the checkpoint has to be fetched first, and how much that is."""
    size = f" (about {human_bytes(model.parameters * 2)})" if model.parameters else ""
    return MachineError(
        f"the checkpoint of {model.name} is not on this machine",
        f"run `recipes fetch {model.name}`{size}, or build with --fetch",
    )


def requirements(engine: Engine, target: str) -> tuple[str, ...]:
    """What an engine needs for a target."""
    more = (r for pattern, rs in engine.target_requires.items() if fnmatch(target, pattern) for r in rs)
    return (*engine.requires, *more)


def default_target(precision: Precision, engine: Engine, facts: Facts) -> str:
    """This machine's GPU if the engine builds this for it and has what it needs, else the CPU, else the GPU."""
    for candidate in (facts.target, "cpu"):
        fits = any(fnmatch(candidate, pattern) for pattern in engine.targets) and _runs(engine, precision, candidate)
        if fits and not facts.missing(requirements(engine, candidate)):
            return candidate
    return "cpu" if "cpu" in engine.targets else facts.target


def default_engine(registry: Registry, precision: Precision, facts: Facts, target: str | None) -> str:
    """The first engine in order of preference that can build this here; else one that could elsewhere."""
    names = [n for n in registry.defaults.engines if n in registry.engines.entries]
    possible = []
    for name in names:
        engine = registry.engines[name]
        where = target or default_target(precision, engine, facts)
        if not unsupported(precision, engine, where)[0]:
            possible.append(name)
            if not facts.missing(requirements(engine, where)):
                return name
    if possible or names:
        return (possible or names)[0]
    raise RequestError("no engine is installed", "name one with @ENGINE, or install a package that adds one")


def _runs(engine: Engine, precision: Precision, target: str) -> bool:
    """Whether the engine can run checkpoints of the precision's algorithm there."""
    known = [algorithms for pattern, algorithms in engine.algorithms.items() if fnmatch(target, pattern)]
    return not precision.algorithm or not known or any(precision.algorithm in algorithms for algorithms in known)


def _compute(target: str) -> str:
    """`8.9` from `sm89`, `12.0` from `sm120`; nothing for a target that is no GPU."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}" if target != digits and len(digits) > 1 and digits.isdigit() else ""
