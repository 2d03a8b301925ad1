"""What the pages and the READMEs show can be typed as it stands."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import ROOT
from engine_recipes import merging, registry
from engine_recipes.cli import COMMANDS, cli
from engine_recipes.entries import Owner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.M | re.S)


def blocks(page: str, language: str) -> Iterator[str]:
    for indent, name, text in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        if name == language:
            yield textwrap.dedent(text) if indent else text


def commands(text: str) -> Iterator[list[str]]:
    """Every call of `recipes` in a block of shell."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|(?![\w])", line):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"\w+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["recipes"]:
                yield words[1:]


@pytest.mark.parametrize("page", NAMES)
def test_every_block_says_what_it_is(page: str) -> None:
    found = {name for _, name, _ in _BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))}
    assert found <= {"", "sh", "python", "toml", "json", "jsonl", "text", "diff"}


@pytest.mark.parametrize("page", NAMES)
def test_python_compiles(page: str) -> None:
    for text in blocks(page, "python"):
        compile(text, page, "exec")


@pytest.mark.parametrize("page", NAMES)
def test_toml_parses_and_fragments_are_accepted(page: str) -> None:
    ours = registry._read(Owner("engine-recipes", "0", ROOT / "core" / "engine_recipes" / "registry.toml"))
    for text in blocks(page, "toml"):
        table = tomllib.loads(text)
        if "project" in table:  # of a pyproject.toml
            continue
        assert table.pop("api", 1) == registry.API
        mine = registry.Fragment(Owner("engine-recipes-acme", "1"), table)
        merged = merging.merge([ours, mine])
        assert merged.problems == ()
        assert all(not names.unusable for names in merged.kinds)


@pytest.mark.parametrize("page", NAMES)
def test_commands_exist_with_their_options(page: str) -> None:
    context = click.Context(cli, info_name="recipes")
    for text in blocks(page, "sh"):
        for name, *arguments in commands(text):
            assert name in COMMANDS or name.startswith("-"), f"recipes {name}"
            command = cli.get_command(context, name)
            assert command is not None
            command.make_parser(click.Context(command)).parse_args(list(arguments))


def test_a_wrong_command_would_be_noticed() -> None:
    context = click.Context(cli, info_name="recipes")
    ((name, *arguments),) = commands("RECIPES_TRACE=1 recipes build m:fp16 --fallbak # typo\n")
    command = cli.get_command(context, name)
    assert command is not None
    with pytest.raises(click.NoSuchOption):
        command.make_parser(click.Context(command)).parse_args(arguments)


@pytest.mark.parametrize("page", [name for name in NAMES if name.startswith("docs/")])
def test_every_page_of_the_site_says_what_it_is_about(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    described = re.match(r"---\n(?:title: [^\n]+\n)?description: ([^\n]{30,200})\n---\n", text)
    assert described, "a page begins with a description, for search engines and link previews"
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", text, flags=re.S), flags=re.M)) == 1


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_to_files_and_headings_of_the_repository(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor and file.suffix == ".md" and file.name != "api.md":  # whose headings are made with the site
            assert anchor in headings(file), f"{target}#{anchor}"


def test_pages_that_code_speaks_of_are_there() -> None:
    folders = [ROOT / name for name in ("core", "recipes", "plugins", "engines", "examples", "benchmarks")]
    named = {}
    for file in (file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".toml", ".md")):
        for page in re.findall(r"(?<![\w/.])docs/[\w/-]+\.(?:md|py|svg)", file.read_text(encoding="utf-8")):
            named[page] = file
    assert len(named) > 5
    assert {page: file for page, file in named.items() if not (ROOT / page).is_file()} == {}


def headings(file: Path) -> set[str]:
    """Anchors of a page, as repositories and the site make them."""
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.S)
    plain = (re.sub(r"[`*]", "", line).strip().lower() for line in re.findall(r"^#+ (.*)$", text, flags=re.M))
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in plain}
