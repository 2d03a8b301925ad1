from __future__ import annotations

import subprocess
import sys

import pytest

from conftest import Recipes, command
from engine_recipes import __version__
from engine_recipes.cli import COMMANDS

HEAVY = (
    "numpy",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "tokenizers",
    "huggingface_hub",
    "gguf",
    "rich",
    "pluggy",
)


def test_help_names_every_command_and_imports_none(recipes: Recipes) -> None:
    ran = recipes("--help")
    assert ran.code == 0
    assert all(f"  {name} " in ran.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(recipes: Recipes, name: str) -> None:
    ran = recipes(name, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"Usage: recipes {name}")


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["list", "--json"], ["engines"], ["plugins"]])
def test_nothing_heavy_is_imported_to_look_around(toy: None, arguments: list[str]) -> None:
    code = (
        "import sys, engine_recipes.cli\n"
        f"try: engine_recipes.cli.main({arguments!r})\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert "engine_recipes_toy" not in done.stderr


def test_the_version_is_the_packages(recipes: Recipes) -> None:
    assert recipes("--version").out == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "first", "second"),
    [
        (["buidl"], "no command 'buidl'", "did you mean build?"),
        (["build"], "Missing argument 'REF...'.", "see `recipes build --help`"),
        (["build", "--fast", "x"], "No such option", "see `recipes build --help`"),
        (["build", "x", "--until", "never"], "Invalid value for '--until'", "see `recipes build --help`"),
        (["run", "x", "y", "--max-tokens", "0"], "Invalid value for '--max-tokens'", "see `recipes run --help`"),
    ],
)
def test_a_wrong_command_line_is_two_lines_and_exit_2(
    recipes: Recipes, arguments: list[str], first: str, second: str
) -> None:
    ran = recipes(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.error[0].startswith(first)
    assert ran.error[1] == second


def test_a_reader_that_stops_early_is_no_error() -> None:
    reader = subprocess.Popen(command("list"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.close()
    assert reader.stderr is not None
    assert reader.stderr.read() == b""
    assert reader.wait() == 0
    reader.stderr.close()


def test_an_output_that_is_full_or_closed_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("list"), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith("error: no space left on the device that the output goes to\n")
    closed = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command("list")], capture_output=True, text=True, check=False
    )
    assert (closed.returncode, closed.stderr) == (0, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(recipes: Recipes, shell: str) -> None:
    assert "_RECIPES_COMPLETE" in recipes("completion", shell).out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("recipes bu", ["build"]),
        ("recipes build smollm2-3", ["smollm2-360m"]),
        ("recipes build smollm2-360m:b", ["smollm2-360m:bf16"]),
        ("recipes build smollm2-360m:fp16@on", ["smollm2-360m:fp16@onnxruntime"]),
    ],
)
def test_references_complete(
    recipes: Recipes, monkeypatch: pytest.MonkeyPatch, words: str, expected: list[str]
) -> None:
    monkeypatch.setenv("_RECIPES_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert recipes().out.splitlines() == [f"plain,{word}" for word in expected]
