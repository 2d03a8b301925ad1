from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import engine_recipes
from conftest import HOOKS, ROOT
from engine_recipes import entries, hookspecs
from engine_recipes.cli import COMMANDS, cli

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REFERENCE = ROOT / "docs" / "reference"
OUR_REGISTRY = Path(engine_recipes.__file__).parent / "registry.toml"
#: Of these only what their docstrings name is for others; the rest of their fields and methods is ours.
OPAQUE = {"Plan", "testing.Case", "checkpoint.ConvertStats"}


def test_what_the_code_says_is_what_the_pages_say(generate: ModuleType) -> None:
    assert {page.name for page in generate.pages()} == {"api.md", "hooks.md", "options.md", "registry.md"}
    for page in generate.pages():
        text = page.read_text(encoding="utf-8")
        assert generate.filled(text) == text, f"{page} is out of date: run `python docs/generate.py`"


def test_a_page_that_is_out_of_date_is_noticed(generate: ModuleType) -> None:
    text = (REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert generate.filled(text.replace("Say what the model is.", "Say what it is.")) == text


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_all_that_its_author_needs(generate: ModuleType, name: str) -> None:
    spec = generate.hook_specs()[name]
    doc, signature = generate.Doc(spec), inspect.signature(spec)
    assert generate.lacking(spec) == []
    assert ("Returns" in doc.sections) is (signature.return_annotation != "None")
    assert all(error in engine_recipes.__all__ for error in doc.items("Raises"))
    assert f"@hookimpl\ndef {name}(" in doc.example
    assert len(doc.summary) < 120


@pytest.mark.parametrize("section", ["Called:", "Args:", "Returns:", "Example:", "On the family", "config:"])
def test_a_hook_that_says_too_little_ends_in_a_sentence(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    spec = hookspecs.resolve_checkpoint
    monkeypatch.setattr(spec, "__doc__", (spec.__doc__ or "").replace(section, "Nothing"))
    with pytest.raises(SystemExit, match="the docstring of the hook resolve_checkpoint lacks") as ended:
        list(generate.hooks())
    assert len(str(ended.value).splitlines()) == 1


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_place_in_the_docs(name: str) -> None:
    arguments = ", ".join(inspect.signature(getattr(hookspecs, name)).parameters)
    text = (REFERENCE / "hooks.md").read_text(encoding="utf-8")
    assert f"\n## `{name}({arguments})`\n" in text
    assert f"\n| [`{name}({arguments})`](#" in text


def test_every_key_of_a_fragment_is_explained(generate: ModuleType) -> None:
    shown = {cls for _, cls in (*generate.TABLES, *generate.INNER)} | {entries.Defaults}
    classes = {
        thing for thing in vars(entries).values() if is_dataclass(thing) and thing.__module__ == entries.__name__
    }
    assert classes - shown == {entries.Owner, entries.Entry, entries.StageEntry, entries.Gate}
    rows = [line for cls in shown for line in generate._rows(cls) if line.startswith("| `")]
    assert len(rows) > 80
    assert [row for row in rows if row.endswith("|  |")] == []


def test_every_command_has_its_options_listed() -> None:
    text = (REFERENCE / "options.md").read_text(encoding="utf-8")
    assert re.findall(r"^## `recipes (\w+)`$", text, flags=re.M) == list(COMMANDS)


def unexplained(command: click.Command) -> list[str]:
    """The command's name if it has no help, and its options that have none."""
    options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
    return [command.name or ""] * (not (command.help or "").strip()) + [
        f"{command.name} {option.opts[0]}" for option in options if not (option.help or "").strip()
    ]


def test_every_command_and_option_has_its_help() -> None:
    context = click.Context(cli, info_name="recipes")
    commands = [cli, *filter(None, (cli.get_command(context, name) for name in COMMANDS))]
    assert len(commands) == len(COMMANDS) + 1
    assert [what for command in commands for what in unexplained(command)] == []
    assert [name for name, (_, line) in COMMANDS.items() if not line.strip()] == []


@pytest.mark.parametrize("text", [None, "", " "])
def test_a_command_or_option_without_help_would_be_noticed(text: str | None) -> None:
    option = click.Option(["--rows"], help=text, type=click.IntRange(min=1), default=1, show_default=True)
    assert unexplained(click.Command("measure", params=[option], help=text)) == ["measure", "measure --rows"]


def settings_without_help(table: Any, path: str = "") -> Iterator[str]:
    """Options of a registry file, wherever they stand, that do not say what they are."""
    for key, value in table.items() if isinstance(table, dict) else ():
        for name, option in value.items() if key == "options" else ():
            if not isinstance(option, dict) or not str(option.get("help", "")).strip():
                yield f"{path}{key}.{name}"
        yield from settings_without_help(value, f"{path}{key}.")


def test_every_option_and_metric_of_our_registry_is_explained() -> None:
    ours = tomllib.loads(OUR_REGISTRY.read_text(encoding="utf-8"))
    assert list(settings_without_help(ours)) == []
    assert list(settings_without_help({"gate": {"options": {"window": {"default": 1}}}})) == ["gate.options.window"]
    assert list(settings_without_help({"options": {"a": 1, "b": {"help": " "}}})) == ["options.a", "options.b"]
    rows = re.findall(r"^\| `(\w+)` \|", (REFERENCE / "metrics.md").read_text(encoding="utf-8"), flags=re.M)
    assert len(ours["metrics"]) > 15
    assert set(rows) == set(ours["metrics"])
    assert all(metric["help"].strip() for metric in ours["metrics"].values())


def test_no_table_of_the_reference_ends_in_an_empty_cell(generate: ModuleType) -> None:
    for page in generate.pages():
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
        assert [row for row in rows if re.search(r"\|\s*\|$", row)] == [], page


def test_every_public_name_is_in_the_api_reference(generate: ModuleType) -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    directives = re.findall(r"^(?:<!-- )?::: engine_recipes\.([\w.]+)(?: -->)?$", text, flags=re.M)
    named = set(directives)
    assert directives == generate.api_names()
    assert set(engine_recipes._HOME) <= named
    assert "checkpoint.convert" in named
    assert {name.partition(".")[0] for name in named if "." in name} == set(engine_recipes._MODULES)
    for name in named:
        owner, _, last = name.rpartition(".")
        assert hasattr(getattr(engine_recipes, owner) if owner else engine_recipes, last), name


def test_names_of_every_kind_are_public_unless_they_begin_with_an_underscore(generate: ModuleType) -> None:
    source = "\n".join(
        [
            "LIMIT: int = 3",
            "lower_thing = 4",
            "Kind = int | str",
            "_hidden = 5",
            "_also: int = 5",
            "async def wait(): ...",
            "def run(): ...",
            "class Thing: ...",
            "if TYPE_CHECKING:",
            "    Floats = list[float]",
            "else:",
            "    Floats = Any",
        ]
    )
    names = ["LIMIT", "lower_thing", "Kind", "wait", "run", "Thing", "Floats"]
    assert generate.public_names(ast.parse(source)) == names
    assert generate.public_names(ast.parse(f"{source}\n__all__ = ['run']")) == ["run"]
    assert generate.public_names(ast.parse(f"{source}\n__all__: list[str] = ['run']")) == ["run"]


def undocumented(found: Any) -> list[str]:
    """Of a public name and its members those that say nothing of themselves."""
    return [thing.signature for thing in (found, *found.members) if not thing.doc.strip()]


def unknown_types(found: Any, known: set[str]) -> set[str]:
    """Names in annotations that are neither public, nor Python's own, nor numpy's or pytest's."""
    tree = ast.parse(found.file.read_text(encoding="utf-8"))
    modules = {*sys.stdlib_module_names, "numpy", "pytest"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known = known | {a.asname or a.name for a in node.names if a.name.partition(".")[0] in modules}
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] in modules:
            known = known | {a.asname or a.name for a in node.names}
    functions = [thing.node for thing in (found, *found.members)]
    functions += [n for n in getattr(found.node, "body", ()) if getattr(n, "name", "") == "__init__"]
    written = [field.annotation for field in found.fields]
    for node in functions:
        if isinstance(node, ast.AnnAssign):
            written.append(node.annotation)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            written += [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg) and arg.annotation]
            written += [node.returns] if node.returns else []
    return {name for annotation in written for name in names_in(annotation)} - known


def names_in(annotation: ast.expr) -> Iterator[str]:
    """Names of an annotation, also of one that is quoted."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            yield node.id
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        yield from names_in(ast.parse(annotation.value, mode="eval").body)


def test_every_public_name_and_member_says_what_it_is(generate: ModuleType) -> None:
    found = {name: undocumented(generate.definition(name)) for name in generate.api_names()}
    assert {name: things for name, things in found.items() if things} == {}


def test_every_type_of_the_public_api_can_be_imported_from_it(generate: ModuleType) -> None:
    known = {name.rpartition(".")[2] for name in generate.api_names()} | set(dir(builtins))
    shown = [name for name in generate.api_names() if name not in OPAQUE]
    found = {name: unknown_types(generate.definition(name), known) for name in shown}
    assert {name: types for name, types in found.items() if types} == {}


@pytest.mark.parametrize(
    ("source", "silent", "strange"),
    [
        ("def public(a: Inner) -> int:\n    return a", ["public(a: Inner) -> int"], {"Inner"}),
        ("async def public() -> 'Inner': ...", ["public() -> 'Inner'"], {"Inner"}),
        ("class public:\n    'Said.'\n    def method(self): ...\n    def _own(self): ...", ["method()"], set()),
        ("class public:\n    'Said.'\n    @property\n    def size(self) -> int: ...", ["size -> int"], set()),
        (
            "class public:\n    'Said.'\n    field: list[Inner]\n    def __init__(self, a: More): ...",
            [],
            {"Inner", "More"},
        ),
        ("public: Inner = 3", ["public = 3"], {"Inner"}),
        ("public = 3  # said to nobody", ["public = 3"], set()),
        ("#: Said.\npublic = 3", [], set()),
        ("from pathlib import Path\ndef public(path: Path):\n    'Said.'", [], set()),
        ("from .inside import Path\ndef public(path: Path):\n    'Said.'", [], {"Path"}),
    ],
)
def test_what_is_not_said_or_not_public_would_be_noticed(
    generate: ModuleType, tmp_path: Path, source: str, silent: list[str], strange: set[str]
) -> None:
    (tmp_path / "mod.py").write_text(source)
    node = next(n for n in ast.parse(source).body if generate._defined(n) == "public")
    found = generate.Definition(node, tmp_path / "mod.py")
    assert undocumented(found) == silent
    assert unknown_types(found, set(dir(builtins))) == strange


def test_a_name_that_lies_nowhere_is_said(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(engine_recipes._HOME, "Nothing", "types")
    with pytest.raises(LookupError, match=r"engine_recipes\.Nothing is not defined in"):
        list(generate.api())


def test_a_changed_docstring_makes_the_api_page_out_of_date(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REFERENCE / "api.md").read_text(encoding="utf-8")
    monkeypatch.setattr(generate, "_first_line", lambda text: "Changed.")
    assert generate.filled(text) != text
