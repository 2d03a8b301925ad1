"""The tutorial, typed as it stands: every command and every change of a file, in order."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import ROOT, command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TUTORIAL = ROOT / "docs" / "tutorial.md"


#: Judging random weights takes as long as judging real ones. A little of it is enough here.
QUICK = """\
[engines.onnxruntime.settings]
"gate.window" = 32
"gate.max_tokens" = 8
"gate.reference" = "onnxruntime"
"""


#: The packages' own tests, and the cases that the edits could break. All of them take minutes on a busy machine.
CASES = "test_a_ or test_rows or describes or unshard or stays"


class Reader:
    """Somebody who types what the page says. `pip` is played, as it needs a network; CI runs it, see `.ci/run`."""

    def __init__(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here, self.installed = here, here / "site-packages"
        self.installed.mkdir()
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(self.installed), *sys.path])))

    def type(self, line: str) -> str:
        """Run one line of a shell; what it printed."""
        program, *words = shlex.split(line)
        if program == "cd":
            self.here = (self.here / words[0]).resolve()
            return ""
        if program == "pip":
            return self.install()
        call = {
            "recipes": command(*words),
            "python": [sys.executable, *words],
            "pytest": [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "-k", CASES, *words],
        }[program]
        done = subprocess.run(call, cwd=self.here, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self) -> str:
        """As `pip install -e .` leaves it: a link to the package, and what it advertises."""
        project = tomllib.loads((self.here / "pyproject.toml").read_text())["project"]
        name, version = project["name"], project["version"]
        ((point, module),) = project["entry-points"]["engine_recipes"].items()
        (self.installed / module).symlink_to(self.here / module)
        info = self.installed / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[engine_recipes]\n{point} = {module}\n")
        return str(name)

    def change(self, diff: str) -> None:
        """Put the lines after + in place of those after -, in the file that the first line names."""
        first, *lines = diff.splitlines()
        file = self.here / first.removeprefix("# ")
        old, new = ("".join(line[1:] + "\n" for line in lines if line[0] == sign) for sign in "-+")
        text = file.read_text()
        assert text.count(old) == 1, diff
        file.write_text(text.replace(old, new))

    def edit(self, code: str) -> None:
        """Put a function in place of another, as the first line of the code says."""
        path, name = re.fullmatch(r"# (\S+), in place of (\w+)", code.splitlines()[0]).groups()  # type: ignore[union-attr]
        file = self.here / path
        lines = file.read_text().splitlines()
        (old,) = [node for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == name]
        start = min([old.lineno, *(decorator.lineno for decorator in old.decorator_list)])  # type: ignore[attr-defined]
        lines[start - 1 : old.end_lineno] = code.splitlines()[1:]
        file.write_text("\n".join(lines) + "\n")


def steps() -> Iterator[tuple[str, str]]:
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL.read_text(encoding="utf-8"), flags=re.M | re.S):
        yield from [(language, line) for line in text.splitlines()] if language == "sh" else [(language, text)]


def test_the_tutorial_works_as_it_is_written(tmp_path: Path, own_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_world / "config" / "engine-recipes").mkdir(parents=True)
    (own_world / "config" / "engine-recipes" / "registry.toml").write_text(QUICK)
    (tmp_path / "tutorial").mkdir()
    reader = Reader(tmp_path / "tutorial", monkeypatch)
    said = []
    for language, text in steps():
        if language == "sh":
            said.append((text, reader.type(text)))
        else:
            {"python": reader.edit, "diff": reader.change}[language](text)
    outputs = dict(said)
    assert "engine-recipes-acme 0.1.0" in outputs["recipes plugins"]
    (printed,) = [output for line, output in said if line.startswith("recipes run")]
    assert re.search(r"[!-~]{2}", printed), f"a reader would see nothing: {printed!r}"
    assert "acme-bits" in outputs["recipes compare"]
    family, precision = (output for line, output in said if line == "pytest")
    assert int(re.findall(r"(\d+) passed", family)[0]) >= 4, family
    assert int(re.findall(r"(\d+) passed", precision)[0]) >= 6, precision
    assert clean(tmp_path / "tutorial"), "the edits leave an import that nothing uses"


def clean(folder: Path) -> bool:
    if not find_spec("ruff"):
        return True
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "E,F,I", str(folder)]
    return subprocess.run(ruff, capture_output=True, check=False).returncode == 0
