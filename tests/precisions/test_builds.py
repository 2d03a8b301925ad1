"""From the command line to an engine that answers, for each precision that quantises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import Recipes
from engine_recipes import testing
from engine_recipes.checkpoint import open_checkpoint

LITTLE = ("--set", "calib.size=2", "--set", "calib.seq_len=32")


@pytest.fixture
def model(own_world: Path) -> Path:
    """A tiny Qwen3 whose layers can be split over two ranks, in whole groups of 64."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}
    return testing.write_tokenizer(tiny.write(own_world / "here" / "model", "qwen3", **sizes))


def build(recipes: Recipes, precision: str, *options: str | Path) -> dict[str, Any]:
    """One build; it must be usable."""
    ran = recipes("build", f"./model:{precision}", *options, "--json")
    assert ran.code == 0, ran.err
    (built,) = ran.json["builds"]
    if "--until" not in options:
        assert not [check for check in built["validation"]["checks"] if check["verdict"] == "fail"]
    return dict(built)


def statuses(stages: list[dict[str, Any]]) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in stages}


def test_one_calibration_serves_every_fp8_build(model: Path, recipes: Recipes) -> None:
    ref = "./model:fp8"
    planned = recipes("plan", ref, *LITTLE, "--json").json["stages"]
    assert set(statuses(planned).values()) == {"to run"}
    built = build(recipes, "fp8", *LITTLE)
    assert statuses(built["stages"]) == dict.fromkeys(statuses(planned), "run")
    assert [stage["key"] for stage in built["stages"]] == [stage["key"] for stage in planned]
    assert recipes("run", ref, *LITTLE, "abc", "--max-tokens", "4", "--json").json["generated_tokens"] > 0

    other = ("--set", "kv_cache=fp8", "--set", "tp_size=2")
    planned = recipes("plan", ref, *LITTLE, *other, "--json").json["stages"]
    wanted = {"resolve": "cached", "calibrate": "cached", "stage1": "to run", "stage2": "to run", "validate": "to run"}
    wanted["baseline"] = "cached"
    assert statuses(planned) == wanted
    built = build(recipes, "fp8", *LITTLE, *other)
    assert statuses(built["stages"]) == {name: status.replace("to run", "run") for name, status in wanted.items()}
    with open_checkpoint(Path(built["checkpoint_dir"])) as opened:
        assert (len(opened.ranks), opened.scheme.algorithm, opened.scheme.cache) == (2, "FP8", "FP8")
    again = build(recipes, "fp8", *LITTLE, "--set", "device=cpu")
    assert set(statuses(again["stages"]).values()) == {"cached"}  # where it is measured is not what is measured


@pytest.mark.parametrize("precision", ["fp8", "int4-awq"])
def test_layers_can_be_excluded_without_calibrating_again(model: Path, recipes: Recipes, precision: str) -> None:
    build(recipes, precision, *LITTLE, "--until", "calibrate")
    exclude = ("--set", "exclude=transformer.layers.1.mlp.proj, *.0.attention.*", "--set", "kv_cache=int8")
    built = build(recipes, precision, *LITTLE, *exclude, "--until", "stage2")
    assert [stage["status"] for stage in built["stages"]] == ["cached", "cached", "run", "run"]
    with open_checkpoint(Path(built["checkpoint_dir"])) as opened:
        at = "transformer.layers."
        assert opened.scheme.excluded == (f"{at}0.attention.qkv", f"{at}0.attention.dense", f"{at}1.mlp.proj")
        assert f"{at}0.attention.kv_cache_scaling_factor" in opened.names()
        assert opened.info(f"{at}1.mlp.proj.weight")[0] == opened.dtype


def test_int4_awq_gives_the_same_bytes_everywhere(model: Path, recipes: Recipes, tmp_path: Path) -> None:
    one = build(recipes, "int4-awq", *LITTLE)
    two = build(recipes, "int4-awq", *LITTLE, "--workspace", tmp_path / "elsewhere", "--until", "stage1")
    for stage, file in (("calibrate", "statistics.safetensors"), ("stage1", "rank0.safetensors")):
        first, second = (
            next(Path(s["path"], file) for s in built["stages"] if s["name"] == stage) for built in (one, two)
        )
        assert first != second
        assert first.read_bytes() == second.read_bytes()
    ran = recipes("run", "./model:int4-awq", *LITTLE, "abc", "--max-tokens", "4", "--json")
    assert ran.json["generated_tokens"] > 0


@pytest.mark.parametrize(("precision", "algorithm"), [("int8-wo", "W8A16"), ("int4-wo", "W4A16")])
def test_weight_only_needs_no_calibration(model: Path, recipes: Recipes, precision: str, algorithm: str) -> None:
    built = build(recipes, precision)
    assert list(statuses(built["stages"])) == ["resolve", "stage1", "stage2", "baseline", "validate"]
    with open_checkpoint(Path(built["checkpoint_dir"])) as opened:
        assert opened.scheme.algorithm == algorithm
    ran = recipes("run", f"./model:{precision}", "abc", "--max-tokens", "4", "--json")
    assert ran.json["generated_tokens"] > 0
