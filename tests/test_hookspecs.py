from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

import engine_recipes
from conftest import HOOKS, ROOT, TESTS, docs_generate

#: Where code lies that comes in by the stranger's door.
PLUGINS = [ROOT / name for name in ("recipes", "plugins", "engines", "examples", "core/engine_recipes/templates")]
MODULES = {f"engine_recipes.{name}" for name in engine_recipes._MODULES}


def test_the_hooks_are_the_promised_ones() -> None:
    assert set(HOOKS) == {
        "resolve_checkpoint",
        "check_decoder",
        "calibrate",
        "stage1",
        "stage2",
        "command",
        "simulate",
        "validate",
        "load_engine",
        "load_source",
        "fallbacks",
    }


def test_every_hook_has_a_test_of_its_example() -> None:
    """That the example is called, the fixture `called` of those tests sees to."""
    tree = ast.parse((TESTS / "docs" / "test_examples.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    tests = [f.name for f in functions if any(isinstance(node, ast.Assert) for node in ast.walk(f))]
    assert [name for name in HOOKS if not [test for test in tests if test.startswith(f"test_{name}_")]] == []


def imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Absolute modules that a file imports anywhere, and which names of them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", tuple(alias.name for alias in node.names)


@lru_cache
def offered(module: str) -> frozenset[str]:
    """What the API page lists of a module of ours."""
    file = Path(getattr(engine_recipes, module.partition(".")[2]).__file__)
    return frozenset(docs_generate().public_names(ast.parse(file.read_text(encoding="utf-8"))))


def private_names(file: Path) -> Iterator[str]:
    """What a plugin takes from us that is not offered."""
    own = {folder.name for folder in file.parents} | {p.name for p in file.parent.parent.glob("engine_recipes_*")}
    for module, names in imports(file):
        if not module.startswith("engine_recipes") or module.partition(".")[0] in own - {"engine_recipes"}:
            continue
        if module == "engine_recipes":
            yield from (name for name in names if name not in engine_recipes.__all__)
        elif module in MODULES:
            yield from (f"{module}.{name}" for name in names if name not in offered(module))
        else:
            yield module
    ours = {name for module, names in imports(file) if module == "engine_recipes" for name in names} & set(
        engine_recipes._MODULES
    )
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            of = ast.unparse(node.value)
            if of == "engine_recipes" and node.attr not in engine_recipes.__all__:
                yield f"{of}.{node.attr}"
            if of in ours or of in MODULES:
                module = f"engine_recipes.{of.rpartition('.')[2]}"
                yield from [f"{module}.{node.attr}"] if node.attr not in offered(module) else []


@pytest.mark.parametrize("root", PLUGINS, ids=lambda root: root.name)
def test_plugins_come_in_by_the_strangers_door(root: Path) -> None:
    files = [file for file in root.rglob("*.py") if ".venv" not in file.parts]
    assert files
    assert {str(file.relative_to(root)): found for file in files if (found := list(private_names(file)))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from engine_recipes.registry import load",
        "import engine_recipes.store",
        "from engine_recipes import _HOME",
        "from engine_recipes.stepping import _private",
        "from engine_recipes.stepping import RequestError",
        "from engine_recipes.calibration import Tokenizer",
        "from engine_recipes import checkpoint\ncheckpoint._secret",
        "from engine_recipes import checkpoint\ncheckpoint.reader",
        "from engine_recipes import stepping\nstepping.closing",
        "import engine_recipes\nengine_recipes.registry",
        "import engine_recipes.checkpoint\nengine_recipes.checkpoint.safetensors",
        "from engine_recipes_engines import lowering",
    ],
)
def test_another_door_would_be_noticed(tmp_path: Path, line: str) -> None:
    (tmp_path / "mod.py").write_text(line)
    assert list(private_names(tmp_path / "mod.py"))


@pytest.mark.parametrize(
    "line",
    [
        "from engine_recipes import Decoder, Value, events\nevents.warn",
        "from engine_recipes.stepping import Floats, Integers",
        "from engine_recipes import checkpoint\ncheckpoint.convert",
        "import engine_recipes\nengine_recipes.build",
    ],
)
def test_the_doors_of_the_api_page_are_open(tmp_path: Path, line: str) -> None:
    (tmp_path / "mod.py").write_text(line)
    assert list(private_names(tmp_path / "mod.py")) == []


def test_core_knows_no_model_precision_or_engine() -> None:
    for file in (ROOT / "core").rglob("*.py"):
        for module, _ in imports(file):
            assert not module.startswith(
                ("engine_recipes_models", "engine_recipes_precisions", "engine_recipes_engines")
            )


def test_tests_mirror_the_source() -> None:
    core = {file.stem for file in (ROOT / "core" / "engine_recipes").glob("*.py")}
    tested = {file.stem.removeprefix("test_") for file in TESTS.glob("test_*.py")}
    assert tested - core == {"bad_input"}
