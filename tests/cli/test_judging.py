from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Recipes
from engine_recipes import api

REF = "./toy-model:plain@echo"


def test_validate_judges_a_built_engine_and_builds_nothing(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("validate", REF)
    assert ran.code == 3
    assert "is not built" in ran.error[0] and "recipes build" in ran.error[1]
    recipes("build", REF, "--no-validate")
    (engine,) = recipes("engines", "--json").json["engines"]
    assert engine["status"] == "unverified" and not engine["published"]
    ran = recipes("validate", REF)
    assert ran.code == 0
    assert "perplexity_ratio" in ran.out and "limit" in ran.out
    (engine,) = recipes("engines", "--json").json["engines"]
    assert engine["status"] == "verified" and engine["published"]
    assert {stage["status"] for stage in recipes("validate", REF, "--json").json["builds"][0]["stages"]} == {"cached"}
    assert recipes("build", REF, "--json").json["builds"][0]["status"] == "cached"


def test_validate_takes_the_folder_of_an_engine(toy_model: Path, recipes: Recipes, tmp_path: Path) -> None:
    engine = api.build(REF).path("stage2")
    assert engine is not None
    (build,) = recipes("validate", engine, "--json").json["builds"]
    assert build["engine_dir"] == str(engine)
    carried = tmp_path / "carried"
    engine.rename(carried)
    ran = recipes("validate", carried, "--json")
    assert ran.code == 0 and ran.json["builds"][0]["validation"]["verdict"] == "pass"
    # what came along with it is not believed
    words = (carried / "engine.txt").read_text()
    (carried / "engine.txt").write_text(words.replace('"loud": false', '"loud": true '))
    assert recipes("validate", carried).code == 5


def test_a_failing_engine_gets_exit_code_5_and_a_table_with_the_reason(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    ran = recipes("validate", REF, "--set", "gate.perplexity_ratio.fail=0.5")
    assert ran.code == 5
    assert ran.out.splitlines()[0].split()[:2] == ["fail", "perplexity_ratio"]
    assert "perplexity_ratio" in ran.error[0]
    ran = recipes("validate", REF, "--set", "gate.perplexity_ratio.fail=0.5", "--accept", "a demo")
    assert ran.code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("nonsense!",), 2, "is no model's name"),
        (("./empty",), 2, "holds no engine of ours"),
        (("./carried",), 2, "holds no engine of ours"),
        ((REF, "--source", "smollm2-135m"), 2, "--source says what a folder was made from"),
        ((REF, "--accept", " "), 2, "--accept needs a reason"),
        (("DAMAGED",), 2, "manifest.json is damaged"),
        (("ENGINE", "--source", "smollm2-135m"), 2, "this workspace knows what"),
        (("ENGINE", "--target", "sm89"), 2, "is an engine already"),
        ((REF, "--set", "gate.nothing=1"), 2, "no option 'gate.nothing'"),
        ((REF, "--set", "gate.reference=nobody"), 2, "no reference named 'nobody'"),
        ((REF, "--set", "gate.texts=/nowhere.jsonl"), 2, "gate.texts: there is no file /nowhere.jsonl"),
        ((REF, "--set", "gate.mean_kl.fail=much"), 2, "must be a number"),
    ],
)
def test_bad_requests_are_refused_in_two_lines(
    toy_model: Path, recipes: Recipes, arguments: tuple[str, ...], code: int, message: str
) -> None:
    Path("empty").mkdir()
    Path("carried").mkdir()  # an engine without its manifest
    Path("carried/config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    Path("carried/rank0.engine").write_bytes(b"engine")
    if "ENGINE" in arguments:
        arguments = (str(api.build(REF).path("stage2")), *arguments[1:])
    if "DAMAGED" in arguments:
        Path("damaged").mkdir()
        Path("damaged/manifest.json").write_text('{"stage": "stage2", "ref": "a:b@c", "inputs": "abc", "set": [1]}')
        arguments = ("./damaged",)
    ran = recipes("validate", *arguments)
    assert ran.code == code
    assert message in ran.error[0]


def test_a_damaged_engine_is_refused(toy_model: Path, recipes: Recipes) -> None:
    engine = api.build(REF).path("stage2")
    assert engine is not None
    (engine / "engine.txt").write_text("")
    ran = recipes("validate", engine)
    assert ran.code == 2 and "is damaged" in ran.error[0]


def test_without_a_reference_nothing_is_compared_and_that_is_said(toy_model: Path, recipes: Recipes) -> None:
    (build,) = recipes("build", REF, "--set", "gate.reference=none", "--json").json["builds"]
    assert [stage["name"] for stage in build["stages"]] == ["resolve", "stage1", "stage2", "validate"]
    assert build["validation"]["verdict"] == "warn"
    (warning,) = [check for check in build["validation"]["checks"] if check["verdict"] == "warn"]
    assert "--set gate.reference=none" in warning["note"]
    assert "mean_kl" not in build["validation"]["metrics"] and "repetition" in build["validation"]["metrics"]
