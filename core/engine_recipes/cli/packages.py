"""`recipes plugins`: whose names there are, and whose code is broken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from . import style
from .common import json_option, place_options, print_json

if TYPE_CHECKING:
    from ..api import Setup


@click.command("plugins")
@json_option
@place_options
def plugins_command(as_json: bool, setup: Setup) -> None:
    """Installed packages: what each adds, and what is wrong with them.

    Every module of other packages than ours is imported, each package in a process of its own; a traceback is shown
    where that fails. `RECIPES_PLUGINS=0` runs any command without them.
    """
    rows = describe(setup)
    if as_json:
        print_json({"schema": 1, "plugins": list(rows)})
        return
    for row in rows:
        click.echo(style(f"{row['package']} {row['version']}".strip(), bold=True) + f"  {row['path']}")
        for kind in ("families", "calibrations", "precisions", "engines", "references", "metrics", "models"):
            if row[kind]:
                click.echo(f"  {kind:<12} {', '.join(row[kind])}")
        for text in row["problems"]:
            first, *more = text.splitlines()
            click.echo("\n".join([f"  {style('problem', fg='red')}      {first}", *(f"    {line}" for line in more)]))


def describe(setup: Setup) -> Iterator[dict[str, Any]]:
    """One row a package, ours first; `problems` are texts, of several lines where there is a traceback."""
    from .. import imports

    registry = setup.registry
    ours, *others = registry.owners
    unread = {problem.owner: None for problem in registry.problems if problem.owner not in registry.owners}
    for owner in (ours, *others, *unread):
        adds = {
            names.kind: [name for name, entry in names.entries.items() if entry.owner == owner]
            for names in registry.kinds
        }
        problems = [problem.text for problem in registry.problems if problem.owner == owner]
        if owner != ours:
            problems += imports.problems(registry, owner, setup.store)
        yield {
            "package": owner.package,
            "version": owner.version,
            "path": str(owner.path),
            **adds,
            "problems": problems,
        }
