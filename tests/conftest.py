"""Fixtures for all tests: nobody's own workspace, cache, registry or network is touched."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tiny
from engine_recipes import hookspecs, testing

TESTS = Path(__file__).parent
ROOT = TESTS.parent
HOOKS = [name for name, spec in vars(hookspecs).items() if hasattr(spec, f"{hookspecs.NAME}_spec")]


@cache
def docs_generate() -> ModuleType:
    """`docs/generate.py`, which belongs to no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For `pytest -n auto`: a worker needs up to 4 GB."""
    return min(os.cpu_count() or 1, 4)


@pytest.fixture(autouse=True)
def own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own home, and stands in an empty folder."""
    home = tmp_path / "home"
    (home / "here").mkdir(parents=True)
    for name in [n for n in os.environ if n.startswith(("RECIPES_", "HF_", "XDG_")) and n != "RECIPES_TEST_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("RECIPES_WORKSPACE", str(home / "workspace"))
    monkeypatch.chdir(home / "here")
    return home


@pytest.fixture
def workspace(own_world: Path) -> Path:
    """The workspace of this test; not created yet."""
    return own_world / "workspace"


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy package is installed, here and in child processes."""
    install(monkeypatch, TESTS / "data" / "toy")


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a folder with packages and their dist-info on the path, as `pip install --target` would."""
    for module in [m for m in sys.modules if (folder / m.partition(".")[0]).is_dir()]:
        monkeypatch.delitem(sys.modules, module)  # another test's package of the same name
    monkeypatch.syspath_prepend(folder)
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), before])))


def package(folder: Path, name: str, registry: str, **modules: str) -> Path:
    """Write a third-party package with its dist-info; returns the folder to `install`."""
    module = name.replace("-", "_")
    (folder / module).mkdir(parents=True)
    (folder / module / "__init__.py").write_text("raise RuntimeError('listing must not import this')\n")
    if modules:
        (folder / module / "__init__.py").write_text("")
    for stem, text in modules.items():
        (folder / module / f"{stem}.py").write_text(text)
    (folder / module / "registry.toml").write_text(registry)
    info = folder / f"{module}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[engine_recipes]\n{module} = {module}\n")
    return folder


@pytest.fixture
def toy_model(toy: None, own_world: Path) -> Path:
    """A checkpoint of the toy family, in the current folder under `toy-model`."""
    folder = tiny.write(own_world / "here" / "toy-model", "llama", architectures=["ToyForCausalLM"])
    return testing.write_tokenizer(folder)


#: Read before tests lose the environment.
BROWSER_WANTED = bool(os.environ.get("RECIPES_TEST_BROWSER"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine, one for all tests: playwright starts once in a process.

    Without one tests are skipped, or fail if RECIPES_TEST_BROWSER is set.
    """
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        found = None
    if found is None:
        assert not BROWSER_WANTED, "no chromium or no playwright here"
        pytest.skip("needs chromium and playwright")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=quiet)
        yield chromium
        chromium.close()


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as the one JSON document it must be."""
        return json.loads(self.out)

    @property
    def error(self) -> list[str]:
        """The error's two lines, checked to be two."""
        lines = self.err.splitlines()
        first = next(i for i, line in enumerate(lines) if line.startswith("error: "))
        assert "Traceback" not in self.err
        assert len(lines) - first == 2, self.err
        return [lines[first].removeprefix("error: "), lines[first + 1].strip()]


Recipes = Callable[..., Ran]


@pytest.fixture
def recipes() -> Recipes:
    """Runs `recipes` in a process of its own."""

    def run(*arguments: str | Path, stdin: str = "", timeout: float = 120) -> Ran:
        environment = {"HF_HUB_OFFLINE": "1", **os.environ}
        done = subprocess.run(
            command(*arguments),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            env=environment,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


def command(*arguments: str | Path) -> list[str]:
    """The command line that starts `recipes` with this interpreter."""
    return [sys.executable, "-c", "from engine_recipes.cli import main; main()", *map(str, arguments)]
