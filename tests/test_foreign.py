from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import lowered
from conftest import Recipes
from engine_recipes import testing

FAST = ("--set", "gate.reference=onnxruntime", "--set", "gate.window=32", "--set", "gate.max_tokens=8")


@pytest.fixture
def model(own_world: Path) -> Path:
    """A tiny Llama with a tokenizer, in the current folder."""
    return testing.write_tokenizer(lowered.write_lively(own_world / "here" / "model"))


@pytest.fixture
def checkpoint(model: Path, recipes: Recipes, tmp_path: Path) -> Path:
    """A TensorRT-LLM checkpoint of that model as somebody else would leave it: no manifest."""
    (build,) = recipes("build", "./model:bf16", "--until", "stage1", "--json").json["builds"]
    folder = Path(shutil.copytree(build["checkpoint_dir"], tmp_path / "theirs"))
    (folder / "manifest.json").unlink()
    return folder


def failed(build: dict[str, Any]) -> set[str]:
    return {check["name"] for check in build["validation"]["checks"] if check["verdict"] == "fail"}


def test_a_checkpoint_made_elsewhere_is_lowered_and_judged(model: Path, recipes: Recipes, checkpoint: Path) -> None:
    ran = recipes("validate", checkpoint, "--source", "./model", *FAST, "--json")
    assert ran.code == 0, ran.err
    (build,) = ran.json["builds"]
    assert build["ref"] == "./model:fp16@onnxruntime"  # unquantised, so the default precision's limits
    assert build["checkpoint_dir"] == str(checkpoint)
    assert build["validation"]["metrics"]["mean_kl"] < 1e-3
    assert build["validation"]["metrics"]["weight_rounding"] == 0
    statuses = {stage["name"]: stage["status"] for stage in build["stages"]}
    assert statuses == {"resolve": "cached", "stage1": "cached", "stage2": "run", "baseline": "run", "validate": "run"}
    again = recipes("validate", checkpoint, "--source", "./model", *FAST, "--json").json["builds"][0]
    assert {stage["status"] for stage in again["stages"]} == {"cached"}
    assert not (checkpoint / "validation.json").exists()


def test_a_checkpoint_with_another_rope_base_is_rejected_whatever_it_says(
    model: Path, recipes: Recipes, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "rotary_base": 20000.0}))
    ran = recipes("validate", checkpoint, "--source", "./model:bf16", *FAST, "--json")
    assert ran.code == 5
    assert "settings equal the source's" in failed(ran.json["builds"][0])
    assert "rope" in ran.error[1]


def test_a_malformed_checkpoint_is_rejected_before_anything_runs(
    model: Path, recipes: Recipes, checkpoint: Path
) -> None:
    weights = checkpoint / "rank0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    ran = recipes("validate", checkpoint, "--source", "./model")
    assert ran.code == 5
    assert "rank0.safetensors" in ran.error[0]


def test_a_checkpoint_of_another_algorithm_needs_a_precision_that_makes_it(
    model: Path, recipes: Recipes, checkpoint: Path
) -> None:
    assert "--source MODEL" in recipes("validate", checkpoint).error[1]
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization"]["quant_algo"] = "NVFP4"
    (checkpoint / "config.json").write_text(json.dumps(config))
    ran = recipes("validate", checkpoint, "--source", "./model")
    assert ran.code in (2, 5)
    assert "NVFP4" in ran.error[0]


ODD = """
[precisions.odd]
module = "engine_recipes_precisions.plain"
algorithm = "ODD"
bits = 16
"""


def test_a_checkpoint_that_no_engine_runs_is_checked_as_far_as_it_can_be(
    model: Path, recipes: Recipes, checkpoint: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization"]["quant_algo"] = "ODD"
    (checkpoint / "config.json").write_text(json.dumps(config))
    Path("registry.toml").write_text(ODD)
    ran = recipes("validate", checkpoint, "--source", "./model:odd")
    assert ran.code == 2
    assert ran.error[0].endswith("is well-formed, and no engine here runs ODD: it was not judged further")
    weights = checkpoint / "rank0.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64] + b"\xff" * 64)
    ran = recipes("validate", checkpoint, "--source", "./model:odd")
    assert ran.code == 5 and "holds NaN" in ran.error[0]


def test_our_own_checkpoint_says_itself_what_it_was_made_from(model: Path, recipes: Recipes) -> None:
    (built,) = recipes("build", "./model:bf16", "--until", "stage1", "--json").json["builds"]
    (build,) = recipes("validate", built["checkpoint_dir"], *FAST, "--json").json["builds"]
    assert build["ref"] == "./model:bf16@onnxruntime"
    assert build["validation"]["verdict"] == "pass"


def test_a_manifest_that_came_along_proves_nothing(model: Path, recipes: Recipes, tmp_path: Path) -> None:
    (built,) = recipes("build", "./model:bf16", *FAST, "--json").json["builds"]
    copy = Path(shutil.copytree(built["checkpoint_dir"], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rotary_base": 20000.0}))
    ran = recipes("validate", copy, *FAST, "--json")
    assert ran.code == 5
    assert "settings equal the source's" in failed(ran.json["builds"][0])


def test_judging_somebody_elses_checkpoint_does_not_take_our_engines_name(
    model: Path, recipes: Recipes, checkpoint: Path
) -> None:
    (built,) = recipes("build", "./model:bf16", *FAST, "--json").json["builds"]
    assert recipes("validate", checkpoint, "--source", "./model:bf16", *FAST).code == 0
    engines = {e["path"]: e["published"] for e in recipes("engines", "--json").json["engines"]}
    assert len(engines) == 2 and engines[built["engine_dir"]]
    (theirs,) = (path for path in engines if path != built["engine_dir"])
    assert recipes("validate", theirs, *FAST, "--force").code == 0  # nor when it is judged again by its folder
    assert recipes("rm", Path(built["engine_dir"]).name, "-y").code == 0  # nor when ours is gone
    assert [e["published"] for e in recipes("engines", "--json").json["engines"]] == [False]


def test_without_its_checkpoint_an_engine_is_judged_with_a_warning_and_again_when_it_is_back(
    model: Path, recipes: Recipes
) -> None:
    (built,) = recipes("build", "./model:bf16", *FAST, "--json").json["builds"]
    folder = Path(built["checkpoint_dir"])
    folder.rename(folder.with_name("away"))
    (alone,) = recipes("validate", "./model:bf16", *FAST, "--json").json["builds"]
    (warning,) = [c for c in alone["validation"]["checks"] if c["verdict"] == "warn"]
    assert warning["name"] == "weights compared" and "is not here" in warning["note"]
    assert any(c["name"] == "tokenizer equals the source's" for c in alone["validation"]["checks"])
    folder.with_name("away").rename(folder)
    (again,) = recipes("build", "./model:bf16", *FAST, "--json").json["builds"]
    assert "weight_rounding" in again["validation"]["metrics"]


def test_an_engine_that_no_longer_loads_is_rejected_and_loses_its_name(model: Path, recipes: Recipes) -> None:
    (built,) = recipes("build", "./model:bf16", *FAST, "--json").json["builds"]
    onnx = Path(built["engine_dir"]) / "model.onnx"
    onnx.write_bytes(bytes(200) + onnx.read_bytes()[200:])
    ran = recipes("validate", "./model:bf16", *FAST, "--force", "--json")
    assert ran.code == 5
    assert "engine loads" in failed(ran.json["builds"][0])
    (engine,) = recipes("engines", "--json").json["engines"]
    assert (engine["status"], engine["published"]) == ("rejected", False)
