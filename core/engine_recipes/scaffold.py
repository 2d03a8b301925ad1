"""Writing a new plugin package: one of the templates, by another name. Knows names and files, no hook.

A template is a package that works as it is, of somebody called acme: `engine-recipes-acme`, `engine_recipes_acme`,
`AcmeForCausalLM`. A new package is a copy with these words replaced.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import MachineError, RequestError
from .registry import Names, Registry

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: What can be made, by the names of the templates.
KINDS = ("family", "precision", "engine", "registry")

_TEMPLATES = Path(__file__).with_name("templates")
#: Files of every package, by other names than their own: they would act on the templates.
_COMMON = {"gitignore": ".gitignore", "workflow.yml": ".github/workflows/test.yml"}
_PREFIX = "engine-recipes-"
#: A registry name that is also a distribution's, a bare TOML key and a part of a Python module's name.
_NAME = re.compile(r"[a-z]([a-z0-9_-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Package:
    """A package to be written.

    Attributes:
        kind: one of KINDS.
        name: of what it adds, `acme`.
        architecture: the class name in config.json that its family knows.
    """

    kind: str
    name: str
    architecture: str = ""

    @property
    def distribution(self) -> str:
        """What pip installs, `engine-recipes-acme`."""
        return _PREFIX + re.sub(r"[_-]+", "-", self.name)

    @property
    def module(self) -> str:
        """What Python imports, `engine_recipes_acme`."""
        return f"{_PREFIX}{self.name}".replace("-", "_")

    @property
    def files(self) -> dict[str, str]:
        """Path in the package -> text."""
        words = {
            "engine-recipes-acme": self.distribution,
            "engine_recipes_acme": self.module,
            "AcmeForCausalLM": self.architecture,
            "acme": self.name,
            ".[EXTRA]": ".[full]" if self.kind == "family" else ".[test]",  # what its workflow installs
        }
        pattern = re.compile("|".join(map(re.escape, words)))
        folder = _TEMPLATES / self.kind
        sources = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # what tools leave beside files: __pycache__, .ruff_cache
        sources = {name: path for name, path in sources.items() if not re.search(r"(^|/)(__pycache__|\.)", name)}
        sources |= {name: _TEMPLATES / "common" / stem for stem, name in _COMMON.items()}

        def renamed(text: str) -> str:
            return pattern.sub(lambda match: words[match[0]], text)

        return {renamed(name): renamed(path.read_text(encoding="utf-8")) for name, path in sources.items()}

    @property
    def fragment(self) -> dict[str, Any]:
        """Its registry.toml, parsed."""
        table: dict[str, Any] = tomllib.loads(self.files[f"{self.module}/registry.toml"])
        return table

    @property
    def commands(self) -> list[str]:
        """What to run next, as its README has it."""
        return self.files["README.md"].split("```sh\n")[1].split("```")[0].splitlines()


def package(kind: str, name: str, architecture: str | None, registry: Registry) -> Package:
    """What `recipes new` was asked for, if that can be made here.

    Args:
        name: `acme`; `engine-recipes-acme` is understood.
        architecture: of a family; by default made from the name, `AcmeForCausalLM`.
        registry: what is installed.

    Raises:
        RequestError: no such name, or something here has it already.
    """
    plain = name.removeprefix(_PREFIX)
    if not _NAME.fullmatch(plain) or "--" in plain:
        better = re.sub(r"[^a-z0-9_]+", "-", plain.lower()).strip("-_") if plain.isascii() else ""
        raise RequestError(
            f"{name!r} is no name for a package",
            f"did you mean {better}?"
            if _NAME.fullmatch(better)
            else "up to 40 lower-case letters, digits, '-' and '_', a letter first",
        )
    if architecture is not None and kind != "family":
        raise RequestError(f"--architecture is for a family, and this is a new {kind}", "leave it out")
    if architecture is None:
        architecture = "".join(map(str.capitalize, re.split("[_-]+", plain))) + "ForCausalLM"
    if not (architecture.isascii() and architecture.isidentifier()):
        raise RequestError(
            f"{architecture!r} is no class name", "give the one of `architectures` in the checkpoint's config.json"
        )
    made = Package(kind, plain, architecture)
    _refuse_taken(made, registry)
    return made


def _refuse_taken(made: Package, registry: Registry) -> None:
    """Raise RequestError if the package, or a name that it adds, is there already."""
    if find_spec(made.module):
        raise RequestError(f"there is a package {made.module} already", "choose another name")
    fragment = made.fragment
    for names in registry.kinds:
        for name in fragment.get(names.kind, {}):
            if name in names.entries or name in names.unusable:
                raise RequestError(
                    f"{names.kind}.{name} belongs to {_owner(names, name)}", "choose another name, or uninstall that"
                )
    for alias in fragment.get("aliases", {}):
        if alias in registry.aliases or alias in registry.models.entries:
            what = registry.aliases.get(alias, alias)
            raise RequestError(f"{alias!r} means {what} already", "choose another name")
    if made.kind == "family":
        known = [f for f in registry.families.entries.values() if made.architecture in f.architectures]
        if known:
            raise RequestError(
                f"{made.architecture} is known: it belongs to the family {known[0].name} of {known[0].owner}",
                f"for more models of it: recipes new registry {made.name}",
            )


def _owner(names: Names[Any], name: str) -> str:
    return str(names.entries[name].owner) if name in names.entries else "a package that cannot be used"


def write(made: Package, folder: Path) -> list[str]:
    """Write a package's files. The folder appears when all are written.

    Returns:
        The files, as paths in the folder, sorted.

    Raises:
        RequestError: the folder is there already.
        MachineError: it cannot be written.
    """
    if os.path.lexists(folder):
        raise RequestError(f"{folder} is there already", "choose another place: --folder DIR")
    files = made.files
    beside = folder.absolute().with_name(f".tmp-{folder.absolute().name}-{os.urandom(4).hex()}")
    try:
        for name, text in files.items():
            path = beside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        beside.rename(folder)
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be written: {error.strerror or error}", "choose another place: --folder DIR"
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(files)
