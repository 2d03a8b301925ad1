"""`compare`: engines side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from .. import compare, words
from ..api import Setup
from ..compare import Group
from . import style
from .common import complete_ref, json_option, place_options, print_json, print_table


@click.command("compare")
@click.argument("refs", metavar="[REF]...", nargs=-1, shell_complete=complete_ref)
@click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="also write one self-contained page with plots and sample texts; replaces FILE",
)
@json_option
@place_options
def compare_command(refs: tuple[str, ...], html: Path | None, as_json: bool, setup: Setup) -> None:
    """Engines side by side: size, time, speed and quality, by the source they were made from.

    A REF may also be an engine's name as `recipes engines` shows it. Without any REF: of each recipe the newest build
    and the one in use. ×SRC is the size over the source's, KL and PPL× are the distance from the source, 0 and 1 at
    best, TOP-1 is how often both find the same token likeliest.
    """
    groups = compare.collect(setup, refs)
    if html:
        from .. import page

        page.write(html, groups)
        click.echo(f"wrote {html}", err=True)
    if as_json:
        print_json({"schema": 1, "models": [group.as_json() for group in groups]})
        return
    if not groups:
        click.echo(f"nothing built yet in {setup.store.workspace}", err=True)
    for number, group in enumerate(groups):
        if number:
            click.echo()
        _print(group)
    _hint(groups)


def _print(group: Group) -> None:
    """A table, and below it what does not fit into one."""
    rows = [("source", *words.source_in_words(group.source))]
    footnotes: list[str] = []
    for engine in group.engines:
        name = engine.recipe
        if engine.given or len([other for other in group.engines if other.recipe == engine.recipe]) > 1:
            footnotes.append(f"[{len(footnotes) + 1}] {engine.folder.name}  {engine.given}".rstrip())
            name += f" [{len(footnotes)}]"
        rows.append((name, *words.in_words(engine, group.source)))
    click.echo(style(group.model, bold=True))
    print_table(("RECIPE", *words.COLUMNS), rows)
    for line in footnotes:
        click.echo(line)
    for note in group.notes:
        click.echo(f"note: {note}", err=True)


def _hint(groups: Sequence[Group]) -> None:
    engines = [engine for group in groups for engine in group.engines]
    for missing, command in _lacking(
        [not e.benches for e in engines], [e.report.verdict == "not run" for e in engines]
    ):
        click.echo(f"- : {missing}; `recipes {command} REF` does that", err=True)


def _lacking(slow: Sequence[bool], unjudged: Sequence[bool]) -> Iterator[tuple[str, str]]:
    if any(slow):
        yield "speed was not measured", "bench"
    if any(unjudged):
        yield "quality was not measured", "validate"
