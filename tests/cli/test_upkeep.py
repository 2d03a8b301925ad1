from __future__ import annotations

import shutil
from pathlib import Path

from conftest import Recipes
from engine_recipes.api import open_setup

REF = "./toy-model:plain@echo"
PLAIN = "toy-model-plain-echo-cpu"


def engines(recipes: Recipes) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = recipes("engines", "--json").json["engines"]
    return rows


def test_engines_shows_verdicts_and_what_the_plain_name_points_to(toy_model: Path, recipes: Recipes) -> None:
    assert recipes("engines").code == 0
    recipes("build", REF)
    recipes("build", REF, "--set", "loud=true")
    recipes("build", REF, "--set", "scale=2", "--no-validate")
    rows = engines(recipes)
    assert sorted((str(row["status"]), row["published"]) for row in rows) == [
        ("rejected", False),
        ("unverified", False),
        ("verified", True),
    ]
    table = recipes("engines").out
    assert f"{REF}" in table
    assert "verified" in table


def test_rm_removes_one_and_moves_the_plain_name_back(toy_model: Path, recipes: Recipes, workspace: Path) -> None:
    first = recipes("build", REF, "--json").json["builds"][0]["engine_dir"]
    second = recipes("build", REF, "--set", "scale=2", "--json").json["builds"][0]["engine_dir"]
    plain = workspace / "engines" / PLAIN
    assert plain.resolve() == Path(second)
    ran = recipes("rm", PLAIN)
    assert ran.code == 2
    assert ran.error[1] == "add -y to say it beforehand"
    assert recipes("rm", Path(second).name, "-y").code == 0
    assert not Path(second).exists()
    assert plain.resolve() == Path(first)
    assert recipes("rm", PLAIN, "-y").code == 0
    assert not plain.is_symlink()
    ran = recipes("rm", PLAIN, "-y")
    assert ran.code == 2
    assert ran.error[0] == f"no engine named '{PLAIN}'"


def test_an_engine_built_again_without_a_verdict_loses_the_plain_name(
    toy_model: Path, recipes: Recipes, workspace: Path
) -> None:
    recipes("build", REF)
    recipes("build", REF, "--force", "--no-validate")
    (row,) = engines(recipes)
    assert (row["status"], row["published"]) == ("unverified", False)
    assert not (workspace / "engines" / PLAIN).is_symlink()


def test_rm_does_not_pull_an_engine_from_under_a_build(toy_model: Path, recipes: Recipes) -> None:
    name = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"]).name
    slot = open_setup().plan(REF).stage("stage2").slot
    assert slot is not None
    with open_setup().store.lock(slot, lambda: None):
        ran = recipes("rm", name, "-y")
    assert (ran.code, ran.error[0]) == (3, f"{name} is being built or judged")


def test_gc_removes_garbage_and_what_no_engine_was_built_from(
    toy_model: Path, recipes: Recipes, workspace: Path
) -> None:
    recipes("build", REF)
    recipes("build", REF, "--set", "scale=3", "--until", "stage1")
    weighed = REF.replace("plain", "weighed")
    recipes("build", weighed)
    recipes("build", weighed, "--set", "tp_size=2", "--until", "calibrate")
    half = workspace / "engines" / ".tmp-half-0123"
    half.mkdir()
    (half / "model.bin").write_bytes(b"x" * 1000)
    dry = recipes("gc", "--dry-run", "--json").json
    assert dry["removed"] is False
    assert half.exists()
    assert len(dry["folders"]) == 3
    assert recipes("gc", "-y").code == 0
    assert not half.exists()
    assert len(list((workspace / "checkpoints").iterdir())) == 2
    assert len(list((workspace / "calibrations").iterdir())) == 1
    assert recipes("build", REF).err.count("there already") == 5
    assert recipes("build", weighed).err.count("there already") == 6
    for folder in (workspace / "engines").iterdir():
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
    recipes("gc", "-y")
    for place in ("checkpoints", "calibrations", "sources", "baselines"):
        assert not list((workspace / place).iterdir())
