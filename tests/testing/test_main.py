from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import engine_recipes
from conftest import package


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine_recipes.testing", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_tiny_model_is_written_as_its_family_describes_it(architecture: str) -> None:
    ran = made("tiny", "--architecture", architecture)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"wrote tiny: a tiny {architecture} with random weights\n"
    assert json.loads(Path("tiny/config.json").read_text())["architectures"] == [architecture]
    assert [path.name for path in Path().iterdir()] == ["tiny"]
    plan = engine_recipes.plan("./tiny:fp16@onnxruntime")
    assert plan.located
    assert plan.blocked is None


def test_a_folder_that_is_there_is_left_alone() -> None:
    Path("tiny").mkdir()
    ran = made("tiny")
    assert ran.returncode == 2
    assert ran.stderr == "error: tiny is there already\n       choose another folder, or remove it\n"
    assert not list(Path("tiny").iterdir())


def test_a_place_that_cannot_be_written_is_named() -> None:
    Path("file").write_text("")
    ran = made("file/tiny")
    assert ran.returncode == 3
    assert ran.stderr == "error: file/tiny cannot be written: Not a directory\n       choose another folder\n"


def test_an_architecture_without_a_family_is_refused() -> None:
    ran = made("tiny", "--architecture", "OtherForCausalLM")
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: no installed family knows the architecture OtherForCausalLM\n")
    assert len(ran.stderr.splitlines()) == 2
    assert not list(Path().iterdir())


def test_a_family_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = '[families.bad]\nmodule = "bad_family.hooks"\narchitectures = ["BadForCausalLM"]\n'
    folder = package(tmp_path / "site", "bad-family", registry, hooks="raise ImportError('no such thing')\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    ran = made("tiny", "--architecture", "BadForCausalLM")
    assert ran.returncode == 3
    assert "family bad (bad-family 0.3) cannot be used: ImportError: no such thing" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not list(Path().iterdir())
