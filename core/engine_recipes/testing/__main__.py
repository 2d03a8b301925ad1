"""`python -m engine_recipes.testing FOLDER`: a tiny random model to try recipes on, without code or downloads."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from .. import registry
from ..cli import report
from ..decoder import Decoder
from ..errors import MachineError, RecipesError, RequestError
from ..host import Host
from ..stages import provider
from ..types import StageContext
from .tiny import tiny_config, write_checkpoint


def write_model(folder: Path, architecture: str) -> None:
    """Write a tiny random checkpoint, as the installed family of that architecture describes it.

    Raises:
        RequestError: the folder is there already, or no family knows the architecture.
        MachineError: the family cannot be used, or the folder cannot be written.
    """
    if os.path.lexists(folder):
        raise RequestError(f"{folder} is there already", "choose another folder, or remove it")
    config = tiny_config(architecture)
    family = provider("family", registry.load().family_of(architecture))
    beside = folder.absolute().with_name(f".tmp-{folder.absolute().name}-{os.urandom(4).hex()}")
    try:
        context = StageContext(str(folder), "resolve", {}, (), beside)
        decoder: Decoder = Host().resolve_checkpoint(family, context, config)
        write_checkpoint(beside, config, decoder)
        beside.rename(folder)
    except OSError as error:
        raise MachineError(f"{folder} cannot be written: {error.strerror or error}", "choose another folder") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--architecture", metavar="CLASS", default="LlamaForCausalLM", show_default=True, help="of an installed family"
)
def main(folder: Path, architecture: str) -> None:
    """Write a tiny random model into FOLDER, in the Hugging Face layout: for `recipes build ./FOLDER`."""
    folder = Path(os.path.expanduser(folder))
    try:
        write_model(folder, architecture)
    except RecipesError as error:
        report(error)
        sys.exit(error.exit_code)
    click.echo(f"wrote {folder}: a tiny {architecture} with random weights")


if __name__ == "__main__":
    main(prog_name="python -m engine_recipes.testing")
