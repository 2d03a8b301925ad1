from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine_recipes
from conftest import ROOT, TESTS
from engine_recipes import hookspecs

HOOKS = {
    name: spec for name, spec in vars(hookspecs).items() if getattr(spec, f"{hookspecs.NAME}_spec", None) is not None
}
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


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test_that_runs_its_example(name: str) -> None:
    tree = ast.parse((TESTS / "docs" / "test_examples.py").read_text())
    tests = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [test for test in tests if test.startswith(f"test_{name}_")]


def imports(file: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Absolute modules that a file imports anywhere, and which names of them."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or "", tuple(alias.name for alias in node.names)


def offered(module: str) -> set[str]:
    """What a module of ours says it has, or defines without an underscore, types for annotations among them."""
    found = getattr(engine_recipes, module.partition(".")[2])
    defined: set[str] = set()
    for node in ast.walk(ast.parse(Path(found.__file__).read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return set(getattr(found, "__all__", [name for name in defined if not name.startswith("_")]))


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
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of = ast.unparse(node.value).removeprefix("engine_recipes.")
            yield from [f"{of}.{node.attr}"] if of in ("engine_recipes", *engine_recipes._MODULES) else []


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
        "from engine_recipes import checkpoint\ncheckpoint._secret",
        "from engine_recipes_engines import lowering",
    ],
)
def test_another_door_would_be_noticed(tmp_path: Path, line: str) -> None:
    (tmp_path / "mod.py").write_text(line)
    assert list(private_names(tmp_path / "mod.py"))


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
