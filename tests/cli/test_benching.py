from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import tiny
from conftest import Recipes
from engine_recipes import testing
from engine_recipes.cli.benching import bench_command, unsteady

REF = "./toy-model:plain@echo"
SHORT = ("--prompt-tokens", "8", "--new-tokens", "4", "--repeat", "2")
FIELDS = {"ref", "engine_dir", "target", "engine", "precision", "settings", "metrics", "machine", "created"}
SPREAD = {"median", "min", "max", "iqr"}


def test_bench_shows_a_row_and_keeps_the_numbers(toy_model: Path, recipes: Recipes) -> None:
    engine = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"])
    ran = recipes("bench", REF, *SHORT, "-q")
    assert ran.code == 0
    header, row = ran.out.splitlines()
    assert header.split("  ")[0] == "REF"
    assert row.startswith(REF)
    assert row.count("±") == 4
    assert ran.err == ""
    (kept,) = json.loads((engine / "bench.json").read_text())["benches"]
    assert recipes("bench", REF, *SHORT, "--json").json["benches"][0]["settings"] == kept["settings"]
    assert len(json.loads((engine / "bench.json").read_text())["benches"]) == 1
    assert recipes("run", REF, "abc", "--raw").out == "cba\n"


def test_bench_json_has_the_promised_fields(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    data = recipes("bench", REF, *SHORT, "--warmup", "0", "--threads", "3", "--json").json
    (found,) = data["benches"]
    assert data["schema"] == 1
    assert set(found) == FIELDS
    assert (found["ref"], found["engine"], found["precision"], found["target"]) == (REF, "echo", "plain", "cpu")
    settings = {"batch": 1, "prompt_tokens": 8, "new_tokens": 4, "warmup": 0, "repeat": 2, "threads": 3}
    assert found["settings"] == settings
    metrics = found["metrics"]
    assert [set(value) for value in metrics.values() if isinstance(value, dict)] == [SPREAD] * 5
    assert metrics["decode_tokens_per_second"]["median"] > 0
    assert 0 < metrics["rss_after_load_bytes"] <= metrics["peak_rss_bytes"] < 1 << 30
    assert metrics["peak_gpu_bytes"] is None
    assert found["machine"]["cpu"]
    assert found["machine"]["cores"] >= 1


def test_what_is_not_built_is_said_before_anything_is_measured(toy_model: Path, recipes: Recipes) -> None:
    engine = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"])
    ran = recipes("bench", REF, "./toy-model:weighed@echo", "--json")
    assert (ran.code, ran.out) == (3, "")
    assert ran.error[1] == "run `recipes build ./toy-model:weighed@echo`"
    assert not (engine / "bench.json").exists()


def test_a_missing_package_is_said_with_what_installs_it(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    Path("registry.toml").write_text('[engines.echo]\nrequires = ["not-a-package>=2"]\ninstall = "get it"\n')
    ran = recipes("bench", REF)
    assert ran.code == 3
    assert ran.error == ["echo needs not-a-package>=2, not installed here", "get it"]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ([REF, "--repeat", "0"], "Invalid value for '--repeat'"),
        ([REF, "--batch", "0"], "Invalid value for '--batch'"),
        ([REF, "--new-tokens", "1"], "Invalid value for '--new-tokens'"),
        *(
            ([REF, option, "1000001"], f"Invalid value for '{option}'")
            for option in ("--batch", "--prompt-tokens", "--new-tokens", "--warmup", "--repeat")
        ),
        ([REF, "--threads", "100000"], "--threads 100,000 on a machine of "),
        (
            [REF, "--batch", "1000", "--prompt-tokens", "1001"],
            "--batch 1,000 of --prompt-tokens 1,001 are 1,001,000 tokens",
        ),
        (["no-such-model"], "no model named 'no-such-model'"),
    ],
)
def test_arguments_that_cannot_be_are_two_lines(recipes: Recipes, arguments: list[str], first: str) -> None:
    ran = recipes("bench", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.error[0].startswith(first)
    assert ran.error[1]


def test_what_the_engine_cannot_do_is_two_lines(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", REF)
    batch = recipes("bench", REF, "--batch", "2")
    assert (batch.code, batch.out) == (2, "")
    assert batch.error == ["echo generates one sequence at a time", "leave out --batch"]
    longer = recipes("bench", REF, "--prompt-tokens", "4", "--new-tokens", "5")
    assert (longer.code, longer.out) == (2, "")
    assert longer.error[0] == "echo generated 4 of 5 tokens after 4"


def test_a_rejected_engine_is_measured_and_said_to_be_one(toy_model: Path, recipes: Recipes) -> None:
    assert recipes("build", REF, "--set", "loud=true").code == 5
    ran = recipes("bench", REF, "--set", "loud=true", *SHORT)
    assert ran.code == 0
    assert f"warning: {REF} was rejected by the quality gate" in ran.err
    assert len(ran.out.splitlines()) == 2


def test_one_engine_that_cannot_do_it_does_not_cost_the_others(toy_model: Path, recipes: Recipes) -> None:
    testing.write_tokenizer(tiny.write(Path("small"), "llama"))
    other = "./small:fp16@onnxruntime"
    assert recipes("build", REF, other, "--no-validate").code == 0
    ran = recipes("bench", other, REF, *SHORT[2:], "--prompt-tokens", "257", "--json")
    assert ran.code == 2
    assert ran.error[0] == "the prompt has 257 tokens, this engine takes 256"
    assert [found["ref"] for found in ran.json["benches"]] == [REF]
    (batch,) = recipes("bench", other, *SHORT, "--batch", "3", "--json").json["benches"]
    assert batch["machine"]["packages"]["onnxruntime"]
    assert batch["metrics"]["decode_tokens_per_second"]["median"] > 0


def test_a_busy_machine_is_warned_about_once(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes("build", REF)
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
    ran = CliRunner().invoke(bench_command, [REF, REF, *SHORT])
    assert ran.exit_code == 0
    assert ran.stderr.count("load average 99.0") == 1


def test_numbers_that_spread_are_called_unsteady() -> None:
    steady = {"median": 10.0, "iqr": 0.9}
    metrics = {"load_seconds": steady, "first_token_seconds": steady, "decode_tokens_per_second": steady}
    assert unsteady(metrics) == []
    assert unsteady({**metrics, "load_seconds": {"median": 10.0, "iqr": 1.1}}) == ["load_seconds"]
