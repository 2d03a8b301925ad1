"""Whether an engine can run on this machine, from its manifest: asked before any library is loaded. Pure.

An engine may come from elsewhere, so that its manifest may hold anything: what is not of the expected type says
nothing.
"""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from . import refs
from .availability import alternatives, is_target, unsupported
from .entries import Engine
from .errors import MachineError, RequestError
from .facts import Facts, distribution
from .registry import Registry
from .targets import compute_of, parts

_LONGEST = 500  # characters of a word from a manifest that are shown


def describe(facts: Facts, requires: Iterable[str] = ()) -> dict[str, Any]:
    """The machine, for a manifest: what `check` compares later, elsewhere.

    Args:
        requires: what the stage needs, as in the registry; of these the versions are kept.
    """
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "gpus": [{"name": gpu.name, "compute": gpu.compute, "driver": gpu.driver} for gpu in facts.gpus],
        "cuda": facts.cuda,
        "versions": facts.tools(requires),
    }


def check(
    manifest: Mapping[str, Any], facts: Facts, engine: Engine, registry: Registry | None = None
) -> MachineError | None:
    """Why an engine cannot work on this machine and what to build instead; None if nothing is in its way.

    Args:
        manifest: the engine's, made here or elsewhere.
        engine: the registry's entry for it: `binds`, `min_driver`, `targets`.
        registry: with it the hint names a precision that this machine's GPU can run.
    """
    reason = runs_here(manifest, facts)
    if reason:
        return MachineError(reason, _instead(manifest, facts, engine, registry))
    if _computes(manifest) and older(facts.driver, engine.min_driver):
        return MachineError(
            f"{engine.name} needs NVIDIA driver {engine.min_driver} or newer, this machine has {facts.driver}",
            "update the driver",
        )
    recorded = _versions(manifest)
    for name in map(distribution, engine.binds):
        built, here = recorded.get(name, ""), facts.versions.get(name, "")
        if built and here and built != here:
            return MachineError(
                f"this engine was built with {name} {built}, this machine has {here}",
                f"install {name} {built}, or build it again: {_command(manifest, _target(manifest))}",
            )
    return None


def runs_here(manifest: Mapping[str, Any], facts: Facts) -> str:
    """Empty, or why no GPU of this machine can run the engine. One for a CPU runs everywhere."""
    wanted = _computes(manifest)
    if not wanted or any(gpu.compute in wanted for gpu in facts.gpus):
        return ""
    names = dict.fromkeys(name for name, compute in _gpus(manifest) if compute in wanted)
    made = f" ({', '.join(names)})" if names else ""
    here = {gpu.target: gpu.name for gpu in facts.gpus}
    have = " and ".join(f"{target} ({name})" for target, name in here.items()) or "no NVIDIA GPU"
    return f"this engine is for {_target(manifest)}{made}, this machine has {have}"


def older(version: str, least: str) -> bool:
    """Whether a driver is older than the least that is needed, `580`. False if either is not known."""
    numbers = [[int(n) for n in re.findall(r"\d+", text)] for text in (version, least)]
    return all(numbers) and numbers[0] < numbers[1]


def _instead(manifest: Mapping[str, Any], facts: Facts, engine: Engine, registry: Registry | None) -> str:
    """The command that builds an engine for this machine: by the same engine if it builds for it, else by another."""
    for target in (*facts.targets, "cpu"):
        if is_target(engine, target):
            ref = _fitting(manifest, engine, target, registry)
            return f"build one for this machine: {_command(manifest, target, ref)}"
    return f"run it where such a GPU is, or build one for this machine: {_command(manifest)}"


def _fitting(manifest: Mapping[str, Any], engine: Engine, target: str, registry: Registry | None) -> str:
    """The reference with the nearest precision, or engine, that works on a target; empty if its own does."""
    if registry is None:
        return ""
    try:
        ref = refs.parse(_word(manifest.get("ref")))
        precision = registry.precisions[ref.precision or registry.defaults.precision]
    except RequestError:
        return ""
    near = alternatives(registry, precision, engine, target) if unsupported(precision, engine, target)[0] else []
    if not near:
        return ""
    name = near[0]
    return str(replace(ref, engine=name[1:]) if name.startswith("@") else replace(ref, precision=name))


def _command(manifest: Mapping[str, Any], target: str = "", other: str = "") -> str:
    """`recipes build REF --set … --target …`. Of another reference than the manifest's, or without a target, which
    leaves the engine open, the options stay away: they may not be its own."""
    ref = _word(manifest.get("ref")) or "REF"
    if not target:
        other = ref.rpartition("@")[0] or ref
    given = {} if other else _table(manifest.get("set"))
    chosen = [_word(f"{k}={_spelled(v)}") for k, v in given.items() if isinstance(v, (str, int, float))]
    words = ["recipes", "build", other or ref, *(word for text in filter(None, chosen) for word in ("--set", text))]
    return " ".join(map(shlex.quote, [*words, *(["--target", target] if target else [])]))


def _spelled(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _target(manifest: Mapping[str, Any]) -> str:
    return _word(manifest.get("target"))


def _computes(manifest: Mapping[str, Any]) -> list[str]:
    """Compute capabilities that the engine is for; none if it is for something else."""
    return [compute for part in parts(_target(manifest)) if (compute := compute_of(part))]


def _gpus(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and compute capability of each GPU of the machine that built the engine."""
    listed = _table(manifest.get("machine")).get("gpus")
    tables = [_table(gpu) for gpu in listed] if isinstance(listed, list) else []
    return [(_word(gpu.get("name")), _word(gpu.get("compute"))) for gpu in tables if _word(gpu.get("name"))]


def _versions(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Distribution -> version, where the engine was built; what the engine's own library said wins."""
    found = {}
    for place in ("machine", "result"):
        for name, version in _table(_table(manifest.get(place)).get("versions")).items():
            if _word(name) and _word(version):
                found[distribution(_word(name))] = _word(version)
    return found


def _table(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str:
    """Text that can stand in one line of a message; empty for anything else."""
    return value[:_LONGEST] if isinstance(value, str) and value.isprintable() else ""
