from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import engine_recipes
from conftest import ROOT, TESTS
from engine_recipes import hookspecs

HOOKS = {
    name: spec for name, spec in vars(hookspecs).items() if getattr(spec, f"{hookspecs.NAME}_spec", None) is not None
}


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
def test_every_hook_is_documented_with_its_exact_arguments(name: str) -> None:
    arguments = ", ".join(inspect.signature(HOOKS[name]).parameters)
    text = (ROOT / "docs" / "plugins.md").read_text()
    assert f"### `{name}({arguments})`" in text
    assert "@hookimpl" in (HOOKS[name].__doc__ or "")


@pytest.mark.parametrize("name", HOOKS)
def test_every_example_in_the_docs_compiles(name: str) -> None:
    text = (ROOT / "docs" / "plugins.md").read_text()
    section = text.split(f"### `{name}(")[1].split("###")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert f"def {name}(" in code
    compile(code, name, "exec")


def imports(file: Path) -> set[str]:
    """Absolute modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_built_in_plugins_come_in_by_the_strangers_door() -> None:
    for root in ("recipes", "plugins", "engines", "examples"):
        for file in (ROOT / root).rglob("*.py"):
            ours = {module for module in imports(file) if module.partition(".")[0].startswith("engine_recipes")}
            own = file.relative_to(ROOT / root).parts[-2]
            allowed = {"engine_recipes", *(f"engine_recipes.{name}" for name in engine_recipes._MODULES)}
            assert all(m in allowed or m.startswith((own, "engine_recipes_mistral")) for m in ours), file


def test_core_knows_no_model_precision_or_engine() -> None:
    for file in (ROOT / "core").rglob("*.py"):
        for module in imports(file):
            assert not module.startswith(
                ("engine_recipes_models", "engine_recipes_precisions", "engine_recipes_engines")
            )


def test_tests_mirror_the_source() -> None:
    core = {file.stem for file in (ROOT / "core" / "engine_recipes").glob("*.py")}
    tested = {file.stem.removeprefix("test_") for file in TESTS.glob("test_*.py")}
    assert tested - core == {"bad_input"}
