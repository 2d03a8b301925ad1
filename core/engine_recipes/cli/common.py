"""What commands share: options, completion of references, tables and JSON on stdout."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import click

from ..api import open_setup
from ..errors import RequestError
from . import style

F = TypeVar("F", bound=Callable[..., Any])


def complete_ref(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """References that begin with what was typed: models first, then precisions, then engines."""
    from ..registry import load

    registry = load()
    before, at, engine = incomplete.rpartition("@")
    if at:
        return [f"{before}@{name}" for name in registry.engines.entries if name.startswith(engine)]
    model, colon, precision = incomplete.rpartition(":")
    if colon:
        return [f"{model}:{name}" for name in registry.precisions.entries if name.startswith(precision)]
    return [name for name in (*registry.models.entries, *registry.aliases) if name.startswith(incomplete)]


def complete_engine(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Engines that begin with what was typed."""
    from ..registry import load

    return [name for name in load().engines.entries if name.startswith(incomplete)]


def place_options(function: F) -> Any:
    """`--workspace` and `--registry`; the command gets them as `setup`."""

    @wraps(function)
    def command(*arguments: Any, workspace: str | None, project: str | None, **more: Any) -> Any:
        return function(*arguments, setup=open_setup(workspace, project), **more)

    return _with_options(
        command,
        click.option("--workspace", metavar="DIR", type=click.Path(file_okay=False), help="where builds are kept"),
        click.option("--registry", "project", type=click.Path(dir_okay=False), help="a project's registry.toml"),
    )


def recipe_options(function: F) -> Any:
    """Options that choose what is built; the command gets them as `choices` for `setup.plan`, and `setup`."""

    @wraps(function)
    def command(
        *arguments: Any,
        engine: str | None,
        target: str | None,
        runtime: str | None,
        settings: tuple[str, ...],
        **more: Any,
    ) -> Any:
        if runtime:
            settings = (*settings, f"build.runtime={runtime}")
        choices = {"engine": engine, "target": target, "settings": read_settings(settings)}
        return function(*arguments, choices=choices, **more)

    return _with_options(
        place_options(command),
        click.option("--engine", metavar="NAME", shell_complete=complete_engine, help="as @ENGINE in the reference"),
        click.option("--target", metavar="NAME", help="cpu, sm89, sm86+sm89 …; default: this machine"),
        click.option("--runtime", metavar="NAME", help="local, docker or podman, for engines with tools of their own"),
        click.option("--set", "settings", metavar="KEY=VALUE", multiple=True, help="an option of the recipe"),
    )


def _with_options(function: Callable[..., Any], *options: Callable[[Any], Any]) -> Any:
    for option in reversed(options):
        function = option(function)
    return function


json_option = click.option("--json", "as_json", is_flag=True, help="one JSON document on stdout")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="errors only")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="also what the stages log")
yes_option = click.option("-y", "--yes", is_flag=True, help="do not ask")


def read_settings(pairs: Sequence[str]) -> dict[str, str]:
    """`--set` pairs as a mapping. Raises RequestError for one without `=`, or two values for one key."""
    settings: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise RequestError(f"--set {pair}: no KEY=VALUE", "for example --set tp_size=2")
        if settings.get(key, value) != value:
            raise RequestError(f"--set gives {key} twice: {settings[key]} and {value}", "give it once")
        settings[key] = value
    return settings


def print_json(value: Mapping[str, Any]) -> None:
    """The one document on stdout. JSON has no NaN and no infinity: null stands for them."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns on stdout, as wide as their widest cell; the last one is not padded."""
    table = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    form = "  ".join([*(f"{{:{width}}}" for width in widths[:-1]), "{}"])
    first, *others = (form.format(*row).rstrip() for row in table)
    click.echo("\n".join([style(first, bold=True), *others]))


def confirm(text: str, yes: bool) -> bool:
    """Ask on stderr. Without a terminal nobody can answer: that is an error, not a hang."""
    import sys

    if yes:
        return True
    if not sys.stdin.isatty():
        raise RequestError(f"{text}: nobody is there to say yes", "add -y to say it beforehand")
    return click.confirm(text, err=True)
