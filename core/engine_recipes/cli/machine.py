"""`doctor` and `completion`: this machine and this shell."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import click

from .. import __version__, availability
from ..api import Setup
from ..space import free_bytes, human_bytes
from . import style
from .common import json_option, place_options, print_json


@click.command("doctor")
@json_option
@place_options
def doctor_command(as_json: bool, setup: Setup) -> None:
    """This machine: GPU, disk, memory, versions; what can be built here and what to install for the rest."""
    checks = list(diagnose(setup))
    if as_json:
        print_json({"schema": 1, "checks": checks})
        return
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for check in checks:
        verdict = style(f"{check['verdict']:<8}", fg=colours[check["verdict"]])
        click.echo(f"{verdict} {check['name']:<22} {check['found']}")
        if check["hint"]:
            click.echo(f"{'':<31} {check['hint']}")


def diagnose(setup: Setup) -> Iterator[dict[str, Any]]:
    """One check after the other; none of them raises for what it finds."""
    facts = setup.facts
    yield _check("engine-recipes", "ok", f"{__version__}, Python {facts.python}, {platform.system()} {facts.machine}")
    yield _check("processors", "ok", f"{facts.cpus}")
    yield _check("memory", "ok" if facts.memory_bytes else "warn", human_bytes(facts.memory_bytes))
    for gpu in facts.gpus:
        found = f"{gpu.name}, compute capability {gpu.compute} ({gpu.target}), {human_bytes(gpu.memory_bytes)}"
        yield _check("GPU", "ok", f"{found}, driver {gpu.driver}")
    if not facts.gpus:
        yield _check("GPU", "warn", "no NVIDIA GPU or driver found", "engines for `cpu` are built and run without one")
    yield from _disks(setup)
    for entry in setup.registry.stage_entries:
        kind = type(entry).__name__.lower()
        missing = facts.missing(entry.requires)
        found = ", ".join(f"{name} {version}" for name, version in facts.tools(entry.requires).items())
        if missing:
            hint = entry.install or f"pip install {' '.join(repr(m) for m in missing)}"
            yield _check(f"{kind} {entry.name}", "missing", f"needs {facts.described(missing)}", hint)
        else:
            yield _check(f"{kind} {entry.name}", "ok", found or "needs nothing more")
    yield from _gpu_targets(setup)
    for problem in setup.registry.problems:
        yield _check(f"plugin {problem.owner.package}", "warn", problem.text, f"mend or uninstall {problem.owner}")


def _disks(setup: Setup) -> Iterator[dict[str, Any]]:
    from ..sources.local import hub_cache

    for name, folder in (("workspace", setup.store.workspace), ("Hugging Face cache", hub_cache())):
        free = free_bytes(folder)
        verdict, hint = ("ok", "") if free > 20e9 else ("warn", "a 7B model needs about 50 GB for all its stages")
        yield _check(name, verdict, f"{folder}, {human_bytes(free)} free", hint)


def _gpu_targets(setup: Setup) -> Iterator[dict[str, Any]]:
    """Engines that would use this machine's GPU if one more package were there."""
    facts = setup.facts
    for engine in setup.registry.engines.entries.values() if facts.gpus else ():
        missing = facts.missing(availability.requirements(engine, facts.target))
        if missing and not facts.missing(engine.requires):
            hint = f"pip install {' '.join(repr(m) for m in missing)}"
            yield _check(f"{engine.name} on {facts.target}", "missing", f"needs {', '.join(missing)}", hint)


def _check(name: str, verdict: str, found: str, hint: str = "") -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "found": found, "hint": hint}


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a completion script: `eval "$(recipes completion bash)"` in your shell's start-up file."""
    from click.shell_completion import get_completion_class

    from . import cli

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "recipes", "_RECIPES_COMPLETE").source())
