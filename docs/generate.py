"""Writes the parts of the reference that the code says better than anyone: hooks, registry keys, options, the API.

    python docs/generate.py            # after changing a docstring, an option or a public name
    python docs/generate.py --check    # exit code 1 if a page is out of date

A part stands between two comments in a page, `<!-- generated: hooks -->` and `<!-- end -->`; what is around is written
by hand. The result is committed, so that the pages can be read where the repository is.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import click

import engine_recipes
from engine_recipes import entries, hookspecs, registry
from engine_recipes.cli import COMMANDS, cli

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", flags=re.S)
_SECTION = re.compile(r"^(Called|Args|Returns|Raises|Attributes|Example):\n((?:(?:    .*)?\n?)+)", flags=re.M)
_CALLED = re.compile(r"On (?P<whom>.+), in (?P<where>[^,]+), (?P<when>.+)\.")

#: What each kind of table is in a fragment, and where its tables stand.
TABLES = (
    ("families", entries.Family),
    ("models", entries.Model),
    ("calibrations", entries.Calibration),
    ("precisions", entries.Precision),
    ("engines", entries.Engine),
    ("references", entries.Reference),
    ("metrics", entries.Metric),
)
#: Tables inside those.
INNER = (
    ("options", entries.Option),
    ("costs", entries.Costs),
    ("limits", entries.Limit),
    ("needs", entries.Needs),
    ("refuses", entries.Refusal),
)


class Doc:
    """A docstring in Google's style: its first line, its sections by name, and the rest."""

    def __init__(self, thing: Any) -> None:
        text = inspect.cleandoc(thing.__doc__ or "") + "\n"
        self.sections = {name: inspect.cleandoc("\n" + body) for name, body in _SECTION.findall(text)}
        self.summary, _, rest = _SECTION.sub("", text).partition("\n")
        self.text = _joined(rest.strip())

    def items(self, section: str) -> dict[str, str]:
        """`name: text` of a section, with the lines of each joined; names that share a text are apart."""
        found: dict[str, str] = {}
        for item in re.split(r"\n(?! )", self.sections.get(section, "")):
            names, _, text = item.partition(": ")
            found.update(dict.fromkeys(names.split(", "), " ".join(text.split())) if text else {})
        return found

    @property
    def called(self) -> dict[str, str]:
        """On `whom` a hook is called, `where` and `when`."""
        match = _CALLED.fullmatch(" ".join(self.sections.get("Called", "").split()))
        return match.groupdict() if match else {}

    @property
    def example(self) -> str:
        """The code of the example."""
        return self.sections.get("Example", "").removeprefix("```python\n").removesuffix("```")


def _joined(text: str) -> str:
    """Paragraphs, one line each: Markdown on some hosts keeps line ends."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def hook_specs() -> dict[str, Callable[..., Any]]:
    """All hooks in the order in which a build meets them."""
    return {name: spec for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.NAME}_spec")}


def hooks() -> Iterator[str]:
    """A table of all hooks, then a section for each."""
    titles = {name: f"{name}({', '.join(inspect.signature(spec).parameters)})" for name, spec in hook_specs().items()}
    yield "| hook | called on | in | when |\n|---|---|---|---|"
    for name, spec in hook_specs().items():
        if lacks := lacking(spec):
            sys.exit(
                f"the docstring of the hook {name} lacks {', '.join(lacks)}: see hookspecs.py for those that have all"
            )
        called = Doc(spec).called
        link = re.sub(r"[(),]", "", titles[name]).replace(" ", "-")
        yield f"| [`{titles[name]}`](#{link}) | {called['whom']} | {called['where']} | {called['when']} |"
    for name, spec in hook_specs().items():
        yield f"\n## `{titles[name]}`"
        yield from _hook(Doc(spec), inspect.signature(spec))


def lacking(spec: Callable[..., Any]) -> list[str]:
    """What a hook's docstring should have and has not, in words."""
    doc, signature = Doc(spec), inspect.signature(spec)
    demands = {
        "a first line": doc.summary,
        "`Called:` with `On WHOM, in WHERE, WHEN.`": doc.called,
        f"`Args:` with {', '.join(signature.parameters)}": list(doc.items("Args")) == list(signature.parameters),
        "`Returns:`": "Returns" in doc.sections or signature.return_annotation == "None",
        "`Example:` with a block of Python": doc.example and "```" not in doc.example,
    }
    return [what for what, is_there in demands.items() if not is_there]


def _hook(doc: Doc, signature: inspect.Signature) -> Iterator[str]:
    yield f"\n{doc.summary}\n\n**Called** {_lowered(_joined(doc.sections['Called']))}\n\n{doc.text}\n\n**Arguments**\n"
    for name, text in doc.items("Args").items():
        yield f"- `{name}` (`{signature.parameters[name].annotation}`): {text}"
    if "Returns" in doc.sections:
        yield f"\n**Returns** `{signature.return_annotation}`: {_lowered(_joined(doc.sections['Returns']))}"
    if "Raises" in doc.sections:
        yield "\n**Raises**\n"
    for name, text in doc.items("Raises").items():
        yield f"- `{name}`: {text}"
    yield f"\n**Example**\n\n```python\n{doc.example}```"


def _lowered(text: str) -> str:
    return text[0].lower() + text[1:] if text[:2] != text[:2].upper() else text


def registry_keys() -> Iterator[str]:
    """A section for each kind of table, a row for each key."""
    for name, cls in TABLES:
        yield f"### `[{name}.NAME]`\n\n{_about(cls)}\n"
        yield from _rows(cls)
    for name, inner in INNER:
        yield f"### `{name}`\n\n{_about(inner)}\n"
        yield from _rows(inner)
    yield f"### `[defaults]`\n\n{_about(entries.Defaults)}\n"
    yield from _rows(entries.Defaults)


def _about(cls: type) -> str:
    doc = Doc(cls)
    return f"{doc.summary}\n\n{doc.text}" if doc.text else doc.summary


def _rows(cls: Any) -> Iterator[str]:
    yield "| key | type | default | is |\n|---|---|---|---|"
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        meanings.update(Doc(base).items("Attributes"))
    for field in sorted(fields(cls), key=lambda f: not _required(f)):
        if field.metadata.get("toml", True):
            kind = _kind(cast("str", field.type)).replace("|", "\\|")
            meaning = meanings.get(field.name, "").replace("|", "\\|")
            yield f"| `{field.name}` | {kind} | {_default(field)} | {meaning} |"
    yield ""


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _default(field: Field[Any]) -> str:
    if _required(field):
        return "must be given"
    value = field.default if field.default is not MISSING else cast("Any", field.default_factory)()
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if is_dataclass(value) or value in ("", (), {}, None):
        return ""
    if isinstance(value, tuple):
        return "`[" + ", ".join(f'"{v}"' for v in value) + "]`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


_KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "Value": "text, number, true or false",
    "Option": "a table, or its default",
    **{cls.__name__: f"[table](#{name})" for name, cls in INNER if cls is not entries.Option},
}


def _kind(annotation: str) -> str:
    """A field's type in the words of TOML."""
    if annotation.endswith(" | None"):
        return _kind(annotation.removesuffix(" | None"))
    if annotation.startswith("tuple["):
        return f"list: {_kind(annotation[6:].removesuffix(', ...]'))}"
    if annotation.startswith("Mapping["):
        return f"table: {_kind(annotation[8:-1].partition(', ')[2])}"
    if annotation.startswith("Literal["):
        return " or ".join(f"`{value}`" for value in ast.literal_eval(annotation[7:]))
    return _KINDS[annotation]


def commands() -> Iterator[str]:
    """A section for each command: its usage and its options, as `--help` has them."""
    context = click.Context(cli, info_name="recipes")
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        of = click.Context(command, info_name=name, parent=context)
        yield f"## `recipes {name}`\n\n{_joined(inspect.cleandoc(command.help or ''))}\n"
        yield f"```text\n{' '.join([of.command_path, *command.collect_usage_pieces(of)])}\n```\n"
        rows = [option.get_help_record(of) for option in command.params if isinstance(option, click.Option)]
        shown = [row for row in rows if row]
        if shown:
            yield "| option | does |\n|---|---|"
        for option, text in shown:
            option, text = (re.sub(r"([|<>])", r"\\\1", cell) for cell in (option, text))
            yield f"| `{option}` | {' '.join(text.split())} |".replace("`" + option, "`" + option.replace("\\", ""))
        yield ""


def api() -> Iterator[str]:
    """For each module a line for each public name and member, then directives that the site shows docstrings for.

    See https://mkdocstrings.github.io/python. Imports none of them.
    """
    for name in engine_recipes._HOME:
        yield from listed(name)
    yield ""
    yield from (f"<!-- ::: engine_recipes.{name} -->" for name in engine_recipes._HOME)
    for module in engine_recipes._MODULES:
        tree = ast.parse(_source(module).read_text(encoding="utf-8"))
        yield f"\n## `engine_recipes.{module}`\n\n{_first_line(ast.get_docstring(tree))}\n"
        for member in public_names(tree):
            yield from listed(f"{module}.{member}")
        yield ""
        yield from (f"<!-- ::: engine_recipes.{module}.{member} -->" for member in public_names(tree))


def listed(name: str) -> Iterator[str]:
    """A name and the first line of what it says of itself; under a class the same for its members."""
    found = definition(name)
    for line in (found, *found.members):
        indent = "" if line is found else "  "
        yield f"{indent}- `{line.signature}`" + (f": {line.doc}" if line.doc else "")


def api_names() -> list[str]:
    """All public names, as they stand behind `engine_recipes.`."""
    modules = {m: ast.parse(_source(m).read_text(encoding="utf-8")) for m in engine_recipes._MODULES}
    return [*engine_recipes._HOME, *(f"{m}.{name}" for m, tree in modules.items() for name in public_names(tree))]


_Node = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Definition(NamedTuple):
    """Where a public name comes from: the statement, and the file with it."""

    node: _Node
    file: Path

    @property
    def name(self) -> str:
        """The name that the statement defines."""
        return _defined(self.node)

    @property
    def doc(self) -> str:
        """The first line of its docstring; of a constant, the first sentence of the `#:` comment above it."""
        if isinstance(self.node, (*_FUNCTIONS, ast.ClassDef)):
            return _first_line(ast.get_docstring(self.node))
        lines = self.file.read_text(encoding="utf-8").splitlines()[: self.node.lineno - 1]
        comment: list[str] = []
        while lines and (line := lines.pop().strip()).startswith("#:"):
            comment.insert(0, line.removeprefix("#:").strip())
        return re.split(r"(?<=[.:]) ", " ".join(comment))[0].rstrip(":")

    @property
    def members(self) -> list[Definition]:
        """The public methods and properties that a class itself defines."""
        body = self.node.body if isinstance(self.node, ast.ClassDef) else []
        return [Definition(n, self.file) for n in body if isinstance(n, _FUNCTIONS) and not n.name.startswith("_")]

    @property
    def fields(self) -> list[ast.AnnAssign]:
        """The public attributes that a class declares."""
        body = self.node.body if isinstance(self.node, ast.ClassDef) else []
        return [n for n in body if isinstance(n, ast.AnnAssign) and not _defined(n).startswith("_")]

    @property
    def signature(self) -> str:
        """How it is called, or what it is, in Python."""
        node = self.node
        if isinstance(node, ast.ClassDef):
            return f"class {self._class(node)}"
        if not isinstance(node, _FUNCTIONS):
            value = ast.unparse(node.value) if node.value else "…"
            return f"{self.name} = {value}" if len(value) <= 80 else self.name
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        if any(ast.unparse(d) in ("property", "cached_property") for d in node.decorator_list):
            return f"{self.name}{returns}"
        return f"{self.name}({_arguments(node)}){returns}"

    def _class(self, node: ast.ClassDef) -> str:
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init:
            return f"{node.name}({_arguments(init)})"
        if any(ast.unparse(decorator).startswith("dataclass") for decorator in node.decorator_list):
            return f"{node.name}({', '.join(ast.unparse(field) for field in self.fields)})"
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"{node.name}({bases})" if bases else node.name


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return re.sub(r"^(self|cls)(, |$)", "", ast.unparse(node.args))


def _defined(node: ast.AST) -> str:
    """The name that a statement defines; empty if it defines none."""
    if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target if isinstance(node, ast.AnnAssign) else 0
    return target.id if isinstance(target, ast.Name) else ""


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


def definition(name: str) -> Definition:
    """The statement that defines a public name, through all modules that only pass it on.

    Raises:
        LookupError: there is none.
    """
    module, _, last = name.rpartition(".")
    file = _source(module or engine_recipes._HOME[last])
    while True:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in _statements(tree):
            if _defined(node) == last:
                return Definition(cast("_Node", node), file)
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
        passed = [node for node in froms if last in [alias.asname or alias.name for alias in node.names]]
        if not passed:
            raise LookupError(f"engine_recipes.{name} is not defined in {file}")
        folder = file.parents[passed[0].level - 1]
        file = _source((passed[0].module or "").replace(".", "/"), folder)


def _source(module: str, folder: Path = Path(engine_recipes.__file__).parent) -> Path:
    path = folder / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """A module's statements, also those for type checkers alone: of an alias they have the exact type."""
    for node in module.body:
        yield node
        if isinstance(node, ast.If):
            yield from node.body


def public_names(module: ast.Module) -> list[str]:
    """What a module's `__all__` says, or all that it defines without an underscore."""
    names: list[str] = []
    for node in _statements(module):
        name = _defined(node)
        if name == "__all__":
            return list(ast.literal_eval(cast("ast.Assign", node).value))
        names += [name] if name and not name.startswith("_") else []
    return list(dict.fromkeys(names))


PARTS: dict[str, Callable[[], Iterator[str]]] = {
    "hooks": hooks,
    "registry": registry_keys,
    "commands": commands,
    "api": api,
}


def filled(text: str) -> str:
    """A page with its generated parts as they should be."""
    return _PART.sub(lambda m: f"{m[1]}{_tidy(PARTS[m[2]]())}{m[3]}", text)


def _tidy(parts: Iterator[str]) -> str:
    fenced = "\n".join(parts).split("```")
    fenced[::2] = [re.sub(r"\n{3,}", "\n\n", text) for text in fenced[::2]]
    return "```".join(fenced).strip("\n") + "\n"


def pages() -> list[Path]:
    """All pages that have a generated part."""
    return [page for page in sorted(DOCS.rglob("*.md")) if _PART.search(page.read_text(encoding="utf-8"))]


def main() -> None:
    """Write what has changed, or say it."""
    assert API_IS_SAID in (DOCS / "reference" / "registry.md").read_text(encoding="utf-8")
    stale = [page for page in pages() if filled(text := page.read_text(encoding="utf-8")) != text]
    for page in stale:
        print(f"{page.relative_to(DOCS)}: {'out of date' if '--check' in sys.argv else 'written'}")
        if "--check" not in sys.argv:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
    sys.exit(bool(stale) and "--check" in sys.argv)


#: The page says which API this is; a new one needs new words there.
API_IS_SAID = f"`api = {registry.API}`"


if __name__ == "__main__":
    main()
