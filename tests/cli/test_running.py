from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import Recipes, install, package

REF = "./toy-model:plain@echo"


def test_run_streams_text_to_stdout_and_chatter_to_stderr(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    ran = recipes("run", REF, "abc", "--raw")
    assert (ran.code, ran.out) == (0, "cba\n")
    assert "3 tokens" in ran.err
    assert recipes("run", REF, "abc", "--raw", "--max-tokens", "2", "-q").err == ""


def test_run_uses_the_chat_template_unless_told_otherwise(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    assert recipes("run", REF, "abc").out == f"{'[user] abc' + chr(10) + '> '}"[::-1] + "\n"


def test_run_json_has_the_promised_fields(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    data = recipes("run", REF, "abc", "--raw", "--json").json
    assert data["text"] == "cba"
    assert (data["prompt_tokens"], data["generated_tokens"]) == (3, 3)
    assert {"load_seconds", "first_token_seconds", "tokens_per_second"} <= set(data)


def test_run_of_what_is_not_built_names_the_command(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("run", REF, "abc")
    assert ran.code == 3
    assert ran.error == [f"{REF} for cpu is not built", f"run `recipes build {REF}`"]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["abc", "--temperature", "nan"], "--temperature is no number"),
        (["abc", "--temperature", "1", "--seed", "-1"], "Invalid value for '--seed'"),
        ([" "], "the prompt is empty"),
        (["\udcff"], "the prompt is no UTF-8 text"),
    ],
)
def test_arguments_that_cannot_be_are_two_lines(
    toy_model: Path, recipes: Recipes, arguments: list[str], first: str
) -> None:
    ran = recipes("run", REF, *arguments)
    assert ran.code == 2
    assert ran.error[0].startswith(first)


def test_an_engines_folder_is_no_reference_and_without_its_package_that_is_said(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipes("build", REF, "--json").json["builds"][0]["engine_dir"]
    ran = recipes("run", folder, "abc")
    assert (ran.code, ran.error[1]) == (2, f"run it as {REF}")
    monkeypatch.setenv("RECIPES_PLUGINS", "0")
    for words in (["run", folder, "abc"], ["validate", folder]):
        ran = recipes(*words)
        assert ran.code == 3
        assert "was built by engine-recipes-toy, which is not installed" in ran.error[0]


def test_a_module_that_ends_the_process_ends_not_ours(
    tmp_path: Path, toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes("build", REF)
    trap = tmp_path / "trap" / "sitecustomize.py"
    trap.parent.mkdir()
    trap.write_text(
        "import os, sys\n"
        "class Trap:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'engine_recipes_toy.echo': os._exit(9)\n"
        "sys.meta_path.insert(0, Trap())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{trap.parent}:{os.environ['PYTHONPATH']}")
    ran = recipes("run", REF, "abc")
    assert ran.code == 4
    assert "importing engine echo (engine-recipes-toy 1.0) ended with exit code 9" in ran.error[0]


def test_a_damaged_engine_is_said_to_be_one(toy_model: Path, recipes: Recipes) -> None:
    built = recipes("build", REF, "--json").json["builds"][0]
    Path(built["engine_dir"], "engine.txt").unlink()
    ran = recipes("run", REF, "abc")
    assert ran.code == 3
    assert "was built and is damaged" in ran.error[0]
    assert recipes("build", REF).code == 0
    assert recipes("run", REF, "abc", "--raw").out == "cba\n"


def test_an_engine_outlives_its_source(toy_model: Path, recipes: Recipes) -> None:
    Path("registry.toml").write_text('[models.mine]\nfamily = "toy"\nsource = "./toy-model"\n')
    assert recipes("build", "mine:plain@echo").code == 0
    toy_model.rename("elsewhere")
    assert recipes("run", "mine:plain@echo", "abc", "--raw").out == "cba\n"


EVIL = """
import ctypes
from engine_recipes import hookimpl

@hookimpl
def stage2(context):
    (context.out / "engine.txt").write_text("x")

@hookimpl
def load_engine(folder):
    print("from Python")
    ctypes.CDLL(None).puts(b"from C")
    return Engine()

class Engine:
    def generate(self, prompt, sampling, stop=frozenset()):
        print("while it generates")
        yield prompt[0]
        if len(prompt) > 1:
            raise ValueError("the rest")

    def close(self):
        print("at the end")
        if self.broken:
            raise SystemExit(0)
    broken = BROKEN
"""


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy_model: Path) -> Path:
    """The module of an engine that prints, and fails at every prompt but the shortest; told to, also when it closes."""
    registry = """
api = 1
[engines.evil]
module = "acme_evil.mod"
takes = ["toy-checkpoint"]
gives = "evil-engine"
targets = ["cpu"]
"""
    install(monkeypatch, package(tmp_path / "evil", "acme-evil", registry, mod=EVIL.replace("BROKEN", "False")))
    return tmp_path / "evil" / "acme_evil" / "mod.py"


def test_what_an_engine_prints_stays_out_of_the_document(evil: Path, recipes: Recipes) -> None:
    assert recipes("build", "./toy-model:plain@evil", "--no-validate").code == 0
    ran = recipes("run", "./toy-model:plain@evil", "a", "--raw", "--json")
    assert ran.json["text"] == "a"
    for text in ("from Python", "from C", "while it generates", "at the end"):
        assert text in ran.err


def test_an_engine_that_fails_while_it_generates_or_closes_is_two_lines(evil: Path, recipes: Recipes) -> None:
    assert recipes("build", "./toy-model:plain@evil", "--no-validate").code == 0
    ran = recipes("run", "./toy-model:plain@evil", "abc", "--raw", "--json")
    assert (ran.code, ran.out) == (4, "")
    assert ran.error[0] == "engine evil (acme-evil 0.3) cannot generate: ValueError: the rest"
    evil.write_text(EVIL.replace("BROKEN", "True"))
    assert "cannot be closed: SystemExit: 0" in recipes("run", "./toy-model:plain@evil", "a", "--raw").error[0]
    assert "cannot generate" in recipes("run", "./toy-model:plain@evil", "abc", "--raw").error[0], "the first is told"
