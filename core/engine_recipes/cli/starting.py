"""`new`: a plugin package of one's own."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from .. import scaffold
from ..registry import load
from .common import json_option, print_json


@click.command("new")
@click.argument("kind", type=click.Choice(scaffold.KINDS))
@click.argument("name")
@click.option("--folder", metavar="DIR", type=click.Path(path_type=Path), help="default: engine-recipes-NAME")
@click.option("--architecture", metavar="CLASS", help="of a family: as in config.json; default: NameForCausalLM")
@json_option
def new_command(kind: str, name: str, folder: Path | None, architecture: str | None, as_json: bool) -> None:
    """Write a package that adds a family, a precision or an engine, or models and settings alone (registry).

    It installs, passes its own tests and builds as it is: change it from there. NAME is what it adds, `acme`.
    """
    made = scaffold.package(kind, name, architecture, load())
    folder = Path(os.path.expanduser(folder or made.distribution))
    files = scaffold.write(made, folder)
    if as_json:
        print_json({"schema": 1, "folder": str(folder.absolute()), "package": made.distribution, "files": files})
        return
    click.echo(f"wrote {folder}")
    for file in files:
        click.echo(f"  {file}")
    click.echo("next:")
    for line in (f"cd {shlex.quote(str(folder))}", *made.commands):
        click.echo(f"  {line}")
