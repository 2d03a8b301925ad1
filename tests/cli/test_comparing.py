from __future__ import annotations

import os
from pathlib import Path

import side_by_side
from conftest import Recipes
from engine_recipes.store import Store

REF = "./toy-model:plain@echo"


def test_compare_shows_the_source_first_and_says_what_is_missing(toy_model: Path, recipes: Recipes) -> None:
    built = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"])
    ran = recipes("compare", REF)
    assert ran.code == 0
    model, header, source, engine = ran.out.splitlines()
    assert model == "toy-model"
    assert " ".join(header.split()) == "RECIPE VERDICT SIZE ×SRC BUILD LOAD FIRST TOK/S KL PPL× TOP-1"
    assert source.startswith("source    ")
    assert engine.split()[:2] == ["plain@echo", "pass"]
    assert ran.err.splitlines()[0] == "- : speed was not measured; `recipes bench REF` does that"
    (group,) = recipes("compare", built.name, "--json").json["models"]
    assert [(engine["path"], engine["verdict"]) for engine in group["engines"]] == [(str(built), "pass")]


def test_compare_of_what_is_not_built_is_two_lines(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("compare", REF)
    assert (ran.code, ran.out) == (3, "")
    assert ran.error == [f"{REF} for cpu is not built", f"run `recipes build {REF}`"]
    assert recipes("compare", "no-such-model").code == 2


def test_compare_of_an_empty_workspace_says_so(recipes: Recipes, workspace: Path) -> None:
    ran = recipes("compare")
    assert (ran.code, ran.out, ran.err) == (0, "", f"nothing built yet in {workspace}\n")
    assert recipes("compare", "--json").json == {"schema": 1, "models": []}


def test_the_table_fits_a_terminal(recipes: Recipes, workspace: Path) -> None:
    findings = side_by_side.judged(0.3214, 1.1642, 0.711)
    folder = side_by_side.engine(
        Store(workspace), "int4-awq@tensorrt-llm", 999, findings=findings, given={"kv_cache": "int8"}, calibrated=500
    )
    side_by_side.timed(folder, 1234)
    ran = recipes("compare")
    assert all(len(line) <= 110 for line in ran.out.splitlines()[:-1])
    assert ran.out.splitlines()[-1] == f"[1] {folder.name}  kv_cache=int8"
    *name, verdict, size, unit, _ = ran.out.splitlines()[3].split()[:6]
    assert (*name, verdict, size, unit) == ("int4-awq@tensorrt-llm", "[1]", "warn", "1.0", "MB")
    assert ran.out.splitlines()[3].endswith("8 min  0.40 s  50 ms  1234   0.3214  1.164  71.1%")
    assert ran.err == ""


def test_compare_writes_a_page_or_says_why_not(recipes: Recipes, workspace: Path) -> None:
    side_by_side.engine(Store(workspace), "fp8@toy", 20)
    ran = recipes("compare", "--html", "page.html", "--json")
    assert (ran.code, ran.err) == (0, "wrote page.html\n")
    assert len(ran.json["models"]) == 1
    assert "fp8@toy" in Path("page.html").read_text(encoding="utf-8")
    ran = recipes("compare", "--html", "no/page.html")
    assert (ran.code, ran.out) == (2, "")
    assert ran.error == ["no does not exist", "make the folder, or choose another for --html"]
    os.mkfifo("pipe")
    ran = recipes("compare", "--html", "pipe")
    assert (ran.code, ran.error[0]) == (2, "pipe is there and is no file")
