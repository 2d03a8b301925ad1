from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Recipes, install, package


def test_list_shows_every_combination_with_a_computed_status(toy: None, recipes: Recipes) -> None:
    rows = {row["ref"]: row for row in recipes("list", "--json").json["recipes"]}
    assert len(rows) == 22 * 9 * 5
    fp16 = rows["qwen2.5-7b:fp16@onnxruntime"]
    assert fp16 == {
        "ref": "qwen2.5-7b:fp16@onnxruntime",
        "model": "qwen2.5-7b",
        "target": "cpu",
        "family": "qwen",
        "precision": "fp16",
        "engine": "onnxruntime",
        "owner": "engine-recipes",
        "status": "missing",
        "reason": "checkpoint not fetched",
        "source": "hf:Qwen/Qwen2.5-7B-Instruct",
        "built": False,
    }
    pair = rows["qwen2.5-7b:plain@onnxruntime"]
    assert (pair["status"], pair["owner"]) == ("unsupported", "engine-recipes-toy")
    assert pair["reason"] == "onnxruntime takes trtllm-checkpoint, plain gives toy-checkpoint: fp8 or fp16 or @echo"


def test_the_status_follows_what_is_fetched_installed_and_built(toy_model: Path, recipes: Recipes) -> None:
    Path("registry.toml").write_text('[models.mine]\nfamily = "toy"\nsource = "./toy-model"\n')
    (row,) = (r for r in recipes("list", "--json", "--ready").json["recipes"] if r["ref"] == "mine:plain@echo")
    assert (row["ref"], row["status"], row["built"]) == ("mine:plain@echo", "ready", False)
    assert recipes("build", "mine:plain@echo").code == 0
    (row,) = (r for r in recipes("list", "--json", "--ready").json["recipes"] if r["ref"] == "mine:plain@echo")
    assert row["built"] is True
    table = recipes("list", "--model", "mine").out
    assert "mine:plain@echo" in table
    assert "built" in table
    assert "qwen" not in table
    Path("registry.toml").write_text(
        '[models.mine]\nfamily = "toy"\nsource = "./toy-model"\n[precisions.plain]\nrequires = "not-there>=2"\n'
    )
    rows = recipes("list", "--json", "--model", "mine").json["recipes"]
    (row,) = (r for r in rows if r["precision"] == "plain" and r["engine"] == "echo")
    assert (row["status"], row["reason"]) == ("missing", "plain needs not-there>=2, not installed here")


def test_show_says_where_every_setting_comes_from(recipes: Recipes) -> None:
    shown = recipes("show", "smollm2", "--set", "tp_size=3", "--json").json
    assert shown["ref"] == "smollm2-135m:fp16@onnxruntime"
    assert shown["sizes"]["checkpoint"] == 2 * shown["parameters"]
    assert shown["source"]["specs"][0] == "hf:HuggingFaceTB/SmolLM2-135M-Instruct"
    settings = {row["key"]: row for row in shown["settings"]}
    assert (settings["tp_size"]["value"], settings["tp_size"]["origin"]) == (3, "--set")
    assert settings["build.max_seq_len"]["origin"].startswith("engine-recipes ")
    text = recipes("show", "smollm2", "--set", "tp_size=3").out
    assert "tp_size = 3  (--set)" in text
    assert "license   apache-2.0" in text


def test_plugins_shows_what_each_package_adds_and_what_is_wrong_with_it(
    toy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipes: Recipes
) -> None:
    install(monkeypatch, package(tmp_path / "p", "acme-broken", '[precisions.odd]\nmodul = "x"\n'))
    rows = {row["package"]: row for row in recipes("plugins", "--json").json["plugins"]}
    assert rows["engine-recipes-toy"]["families"] == ["toy"]
    assert rows["engine-recipes-toy"]["engines"] == ["echo", "tool"]
    assert rows["acme-broken"]["problems"][0] == "precisions.odd.modul: unknown; did you mean module?"
    ran = recipes("plugins")
    assert "acme-broken 0.3" in ran.out
    assert "did you mean module?" in ran.out
    listed = recipes("list", "--model", "smollm2-135m")
    assert listed.code == 0
    assert "warning: acme-broken 0.3: precisions.odd.modul: unknown" in listed.err


def test_a_model_that_nothing_is_named_like_is_said(recipes: Recipes) -> None:
    ran = recipes("list", "--model", "qwen9")
    assert ran.code == 2
    assert ran.error[0] == "no model's name holds 'qwen9'"
    assert recipes("list", "--model", "qwen3", "--ready").code == 0, "there are such, none of them ready"


@pytest.mark.parametrize("source", ["file:~nosuch-user/x", f"file:/{'x' * 5000}", "there"])
def test_a_folder_that_cannot_be_is_one_that_is_not_there(source: str, recipes: Recipes) -> None:
    Path("registry.toml").write_text(f'[models.mine]\nfamily = "llama"\nsource = "{source}"\n')
    rows = recipes("list", "--json", "--model", "mine").json["recipes"]
    assert "checkpoint not fetched" in {row["reason"] for row in rows}
    ran = recipes("build", "mine:fp16@onnxruntime")
    assert ran.code == 3
    assert ran.error[0] == "the checkpoint of mine is not on this machine"
    assert "recipes fetch" not in ran.error[1]
    assert "change models.mine.source" in ran.error[1]


def test_a_python_of_nobody_is_not_there(recipes: Recipes) -> None:
    Path("registry.toml").write_text('[engines.tensorrt-llm]\npython = "~nosuch-user/x"\n')
    for command in ("list", "doctor"):
        assert "Traceback" not in recipes(command).err
