"""Packages that misbehave, installed beside good ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from conftest import Recipes, install, package

REF = "./toy-model:plain@echo"
REGISTRY = """
api = 1
[precisions.rude]
module = "{module}.mod"
gives = "toy-checkpoint"
[precisions.fine]
module = "{module}.fine"
gives = "toy-checkpoint"
"""
FINE = "from engine_recipes import hookimpl\n@hookimpl\ndef stage1(context):\n    pass\n"
#: What a module does -> what is said of it.
SINS = {
    "def helper():\n    raise ValueError('no licence')\nhelper()\n": "ValueError: no licence",
    "import not_there\n": "ModuleNotFoundError: No module named 'not_there'",
    "raise SystemExit(3)\n": "SystemExit: 3",
    "import time\ntime.sleep(600)\n": "importing acme_rude.mod took more than 1 seconds",
    "while True:\n    pass\n": "importing acme_rude.mod took more than 1 seconds",
    "import os\nos._exit(5)\n": "ended with exit code 5",
    "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n": "was killed by SIGSEGV",
    "from engine_recipes import hookimpl\n@hookimpl\ndef stage_1(context): pass\n": "unknown hook 'stage_1'",
}


@pytest.fixture
def rude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    modules = {"mod": request.param, "fine": FINE}
    install(monkeypatch, package(tmp_path / "rude", "acme-rude", REGISTRY.format(module="acme_rude"), **modules))
    monkeypatch.setenv("RECIPES_IMPORT_SECONDS", "1")


@pytest.mark.parametrize(("rude", "said"), SINS.items(), indirect=["rude"], ids=list(SINS.values()))
def test_a_module_that_cannot_be_imported_hurts_only_who_names_it(
    rude: None, toy_model: Path, recipes: Recipes, said: str
) -> None:
    started = time.monotonic()
    rows = {row["package"]: row for row in recipes("plugins", "--json").json["plugins"]}
    (problem,) = rows["acme-rude"]["problems"]
    assert said in problem
    assert rows["engine-recipes-toy"]["problems"] == []
    assert "error" not in recipes("list").err
    refused = recipes("build", "./toy-model:rude@echo", "--no-validate")
    assert refused.code in (3, 4)
    assert "acme-rude 0.3" in refused.err
    assert said in refused.err
    assert time.monotonic() - started < 60
    assert recipes("plan", REF).code == 0


def test_a_hang_that_swallows_every_exception_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: Recipes
) -> None:
    stubborn = "import time\nwhile True:\n    try:\n        time.sleep(600)\n    except BaseException:\n        pass\n"
    modules = {"mod": stubborn, "fine": FINE}
    install(monkeypatch, package(tmp_path / "p", "acme-rude", REGISTRY.format(module="acme_rude"), **modules))
    monkeypatch.setenv("RECIPES_IMPORT_SECONDS", "1")
    rows = {row["package"]: row for row in recipes("plugins", "--json", timeout=60).json["plugins"]}
    (problem,) = rows["acme-rude"]["problems"]
    assert "mod.py" in problem
    assert "line 4" in problem


@pytest.mark.parametrize("rude", [next(iter(SINS))], indirect=True)
def test_plugins_shows_the_traceback_of_their_code_and_not_of_ours(rude: None, recipes: Recipes) -> None:
    ran = recipes("plugins")
    assert ran.code == 0
    assert "acme-rude 0.3" in ran.out
    assert 'mod.py", line 3, in <module>' in ran.out
    assert 'mod.py", line 2, in helper' in ran.out
    assert "importlib" not in ran.out
    assert "host.py" not in ran.out


@pytest.mark.parametrize("rude", [next(iter(SINS))], indirect=True)
def test_without_plugins_there_are_only_ours(
    rude: None, toy: None, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_PLUGINS", "0")
    assert [row["package"] for row in recipes("plugins", "--json").json["plugins"]] == ["engine-recipes"]
    assert {row["owner"] for row in recipes("list", "--json").json["recipes"]} == {"engine-recipes"}


def test_importing_a_package_may_not_change_what_was_built(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: Recipes, workspace: Path
) -> None:
    assert recipes("build", REF, "-q").code == 0
    wipe = f"import shutil\nshutil.rmtree({str(workspace / 'engines')!r})\n"
    install(monkeypatch, package(tmp_path / "p", "acme-rude", REGISTRY.format(module="acme_rude"), mod=wipe, fine=FINE))
    (problem,) = next(r for r in recipes("plugins", "--json").json["plugins"] if r["package"] == "acme-rude")[
        "problems"
    ]
    assert "would write to" in problem
    assert recipes("run", REF, "ab", "--raw").code == 0
