"""`doctor` and `completion`: this machine and this shell."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from .. import __version__, availability, facts as machine, portability
from ..api import Setup
from ..entries import Engine, Precision
from ..errors import RequestError
from ..facts import Facts
from ..space import free_bytes, human_bytes
from . import style
from .common import json_option, place_options, print_json

_PATIENCE = 5.0  # seconds that a container engine gets to answer; an environment of somebody else's gets twice as long
#: How each container engine says the version of what runs the containers.
_CONTAINERS = {"docker": "{{.Server.Version}}", "podman": "{{.Client.Version}}"}
#: Where a GPU's description for containers lies, if the toolkit wrote one.
CDI = (Path("/etc/cdi"), Path("/var/run/cdi"))
_ASK_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


@click.command("doctor")
@json_option
@place_options
def doctor_command(as_json: bool, setup: Setup) -> None:
    """This machine: GPU, containers, disk, memory, versions; what can be built here and what to install for the rest.

    Ends with exit code 0, whatever it finds.
    """
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
    available = f", {human_bytes(facts.memory_available_bytes)} available" if facts.memory_available_bytes else ""
    memory = f"{human_bytes(facts.memory_bytes)}{available}" if facts.memory_bytes else "not known"
    yield _check("memory", "ok" if facts.memory_bytes else "warn", memory)
    yield from _gpus(setup)
    yield from _containers(facts)
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
    for engine in setup.registry.engines.entries.values():
        yield from _programs(engine, facts)
    for engine in setup.registry.engines.entries.values():
        yield _buildable(setup, engine)
    for problem in setup.registry.problems:
        yield _check(f"plugin {problem.owner.package}", "warn", problem.text, f"mend or uninstall {problem.owner}")


def _gpus(setup: Setup) -> Iterator[dict[str, Any]]:
    facts = setup.facts
    if not facts.gpus and machine.DRIVER.exists():
        hint = "`nvidia-smi` says why; after the driver was updated the machine has to start anew"
        yield _check("GPU", "warn", "an NVIDIA driver is loaded and no GPU answers", hint)
    elif not facts.gpus:
        yield _check("GPU", "warn", "no NVIDIA GPU or driver found", "engines for `cpu` are built and run without one")
    for index, gpu in enumerate(facts.gpus):
        name = f"GPU {index}" if len(facts.gpus) > 1 else "GPU"
        sizes = [human_bytes(gpu.memory_bytes)] if gpu.memory_bytes else []
        sizes += [f"{human_bytes(gpu.memory_free_bytes)} free"] if gpu.memory_free_bytes else []
        yield _check(name, "ok", ", ".join([gpu.name, f"compute capability {gpu.compute} ({gpu.target})", *sizes]))
    if len(facts.targets) > 1:
        hint = f"without --target engines are built for the first, {facts.target}"
        yield _check("GPUs", "warn", f"of different kinds: {', '.join(facts.targets)}", hint)
    if facts.gpus:
        engines = setup.registry.engines.entries.values()
        late = [e for e in engines if portability.older(facts.driver, e.min_driver)]
        need = ", ".join(f"{engine.name} needs {engine.min_driver} or newer" for engine in late)
        found = f"{facts.driver}, CUDA {facts.cuda or 'not known'}"
        yield _check("driver", "warn" if late else "ok", found, f"update the driver: {need}" if late else "")


def _containers(facts: Facts) -> Iterator[dict[str, Any]]:
    works = False
    for name, version in _CONTAINERS.items():
        if name not in facts.programs:
            yield _check(name, "ok" if works else "missing", "not installed", _why_containers(works))
            continue
        answer, why = machine.ask([facts.programs[name], "version", "--format", version], _PATIENCE)
        if why or not answer:
            yield _check(
                name, "warn", f"installed, but does not work: {why or 'it names no version'}", _mend(name, why)
            )
        else:
            works = True
            yield _check(name, "ok", answer.splitlines()[0])
    yield _toolkit(facts)


def _why_containers(works: bool) -> str:
    return "" if works else "needed only to run an engine's tools in a container"


def _mend(name: str, why: str) -> str:
    if "permission denied" in why.lower():
        return f"`sudo usermod -aG {name} $USER`, then log in again; or use podman"
    return f"start it: `sudo systemctl start {name}`" if name == "docker" else f"`{name} info` says more"


def _toolkit(facts: Facts) -> dict[str, Any]:
    """Whether containers can be given this machine's GPUs."""
    tools = [facts.programs[name] for name in ("nvidia-ctk", "nvidia-container-cli") if name in facts.programs]
    specs = [str(path) for folder in CDI for path in (sorted(folder.glob("*nvidia*")) if folder.is_dir() else ())]
    name, found = "container toolkit", ", ".join([*tools, *specs])
    if found:
        return _check(name, "ok", found)
    if not facts.gpus:
        return _check(name, "ok", "not installed, and no GPU that containers could be given")
    hint = "install nvidia-container-toolkit, then `sudo nvidia-ctk runtime configure --runtime=docker`"
    return _check(name, "missing", "not installed: containers do not see the GPU", hint)


def _disks(setup: Setup) -> Iterator[dict[str, Any]]:
    from ..sources.local import hub_cache

    for name, folder in (("workspace", setup.store.workspace), ("Hugging Face cache", hub_cache())):
        try:
            free = free_bytes(folder)
        except OSError as error:
            yield _check(name, "missing", f"{folder} cannot be looked at: {error.strerror}", "choose another place")
            continue
        verdict, hint = ("ok", "") if free > 20e9 else ("warn", "a 7B model needs about 50 GB for all its stages")
        yield _check(name, verdict, f"{folder}, {human_bytes(free)} free", hint)


def _programs(engine: Engine, facts: Facts) -> Iterator[dict[str, Any]]:
    """Programs of an engine's own, beside those for containers, and the versions of their environment."""
    for tool in engine.tools:
        name = availability.tool_name(tool)
        path = facts.programs.get(name, "")
        yield _check(
            name, "ok" if path else "missing", path or "not on the PATH", f"needed to build with {engine.name}"
        )
    for name in dict.fromkeys(name for names in engine.programs.values() for name in names):
        if name in machine.PROGRAMS:
            continue
        path = availability.program(name, engine.python, facts)
        if not path:
            where = f"not beside {engine.python}" if engine.python else "not on the PATH"
            yield _check(name, "missing", where, engine.install)
            continue
        versions, why = _versions_there(engine, Path(path))
        known = ", ".join(f"{distribution} {version}" for distribution, version in versions.items())
        hint = f"its environment does not say which version it is: {why}" if why else ""
        yield _check(name, "ok" if known else "warn", f"{path}, {known or 'version not known'}", hint)


def _versions_there(engine: Engine, program: Path) -> tuple[dict[str, str], str]:
    """Distributions that an engine binds to and their versions, asked of the environment that its program is in; and
    why that failed."""
    try:
        with program.open("rb") as file:
            shebang = file.readline(500).decode(errors="replace")
    except OSError:
        shebang = ""
    words = shebang[2:].split() if shebang.startswith("#!") else []  # `#!/usr/bin/env python3` has two
    python = engine.python or next((word for word in words if "python" in Path(word).name), "")
    if not python:
        return {}, f"{program} names no Python" if engine.binds else ""
    answer, why = machine.ask([os.path.expanduser(python), "-c", _ASK_VERSIONS, *engine.binds], 2 * _PATIENCE)
    try:
        versions = {} if why else dict(json.loads(answer))
    except (ValueError, TypeError):
        return {}, f"{python} gave no answer that can be read"
    return versions, why or ("" if versions else f"{python} has no {' or '.join(engine.binds)}")


def _buildable(setup: Setup, engine: Engine) -> dict[str, Any]:
    """What an engine can be built for here, or why not; and what stands in the way of the rest."""
    precisions = [p for p in setup.registry.precisions.entries.values() if p.gives in engine.takes]
    named = [target for target in engine.targets if "*" not in target]
    named.sort(key=lambda target: (len(target), target))
    targets = [t for t in dict.fromkeys([*setup.facts.targets, "cpu", *named]) if availability.is_target(engine, t)]
    able: dict[str, list[str]] = {}
    for target in targets:
        names = ", ".join(p.name for p in precisions if not _obstacle(setup, p, engine, target)[0])
        if names:
            able.setdefault(names, []).append(target)
    found = "; ".join(f"{', '.join(where)}: {names}" for names, where in able.items())
    wanted = next(iter(setup.facts.targets or targets), "cpu")
    obstacles: list[tuple[str, str]] = []  # one for each reason and each hint is enough
    for reason, hint in (_obstacle(setup, precision, engine, wanted) for precision in precisions):
        if reason and not any(reason == known or hint == what for known, what in obstacles):
            obstacles.append((reason, hint))
    if found:
        return _check(f"build {engine.name}", "ok", found, "; ".join(f"{why} ({hint})" for why, hint in obstacles))
    why, hint = (*obstacles, ("no precision gives what it takes", "install a package that adds one"))[0]
    return _check(f"build {engine.name}", "missing", why, hint)


def _obstacle(setup: Setup, precision: Precision, engine: Engine, target: str) -> tuple[str, str]:
    """Why a pair cannot be built here, and what to do; two empty strings if it can."""
    reason, hint = availability.why_not(setup.registry, precision, engine, target)
    if reason:
        return reason, hint
    try:
        calibration = setup.registry.calibration_of(precision)
    except RequestError as error:
        return error.message, error.hint
    lacking = availability.lacking(calibration, precision, engine, target, setup.facts)
    return next(((lack.message, lack.hint) for lack in lacking.values()), ("", ""))


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
