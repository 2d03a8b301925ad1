"""From a folder of Hugging Face's to a published engine, on a machine that seems to have the GPU: real workers, real
stage 1, and the stand-in for trtllm-build."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from engine_recipes import MachineError, RequestError, StageFailed, api, testing
from engine_recipes.facts import Facts, Gpu
from engine_recipes.runner import Build, How

GPU = Gpu("NVIDIA L4", "8.9", 24 << 30, "580.95.05")


@pytest.fixture
def model(python: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source, and a machine with a GPU and `trtllm-build` on the PATH."""
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    (python.with_name("python3")).symlink_to("python")
    seen = api.Setup.facts.func  # type: ignore[attr-defined]

    def facts(setup: api.Setup) -> Facts:
        return replace(seen(setup), gpus=(GPU,))

    monkeypatch.setattr(api.Setup, "facts", property(facts))
    tiny.write(Path("model"), hidden_size=128, num_attention_heads=4, vocab_size=103)
    testing.write_tokenizer(Path("model"), 103)
    return Path("model")


def build(*words: str, **more: Any) -> Build:
    settings = dict(word.split("=", 1) for word in words)
    return api.build("./model:fp16@tensorrt-llm", settings=settings, how=How(until="stage2", **more))


def test_the_engine_is_published_with_its_log_and_its_versions(model: Path) -> None:
    built = build("tp_size=2")
    assert built.error is None
    folder = built.path("stage2")
    assert folder is not None
    names = {path.name for path in folder.iterdir()}
    assert names >= {"rank0.engine", "rank1.engine", "config.json", "trtllm-build.log", "tokenizer.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["result"]["versions"] == {"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}
    assert build("tp_size=2", "build.workers=1", "build.timeout=5").status == "cached"  # how is not what


def test_a_failed_build_publishes_nothing_and_its_log_is_kept(
    model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "lie")
    with pytest.raises(StageFailed, match=r"config\.json is missing") as caught:
        build()
    assert list((workspace / "engines").iterdir()) == []
    (log,) = (workspace / "logs").glob("engines-*.log")
    assert caught.value.hint == f"its whole output: {log}"
    assert "Total time of building all engines" in log.read_text()
    monkeypatch.delenv("STAND_IN_FAILS")
    assert build().error is None


def test_what_cannot_be_combined_costs_no_stage(model: Path, workspace: Path) -> None:
    with pytest.raises(RequestError, match="exclude each other"):
        build("build.multiple_profiles=enable", "build.opt_num_tokens=64")
    with pytest.raises(RequestError, match=r"no option 'build.gem_plugin'") as caught:
        build("build.gem_plugin=auto")
    assert "build.gemm_plugin" in caught.value.hint
    assert not workspace.exists()


def test_an_environment_that_has_it_not_costs_no_stage(model: Path, workspace: Path) -> None:
    with pytest.raises(MachineError, match=r"has TensorRT-LLM 1\.2\.1, and 1\.1\.0 is asked for"):
        build("build.version=1.1.0")
    assert not (workspace / "checkpoints").exists() or not list((workspace / "checkpoints").glob("model-*"))


def test_of_two_kinds_of_gpu_the_tool_sees_the_one_that_the_engine_is_for(
    model: Path, python: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = python.parent / "seen"
    build_tool = python.with_name("trtllm-build")
    script = build_tool.read_text().replace("exec ", f'echo "$CUDA_VISIBLE_DEVICES" > {seen}\nexec ')
    build_tool.write_text(script)
    facts = api.Setup.facts.fget  # type: ignore[attr-defined]
    other = Gpu("NVIDIA H100", "9.0", 80 << 30, "580.95.05", 0, "GPU-hopper")
    ours = replace(GPU, uuid="GPU-ada")
    monkeypatch.setattr(api.Setup, "facts", property(lambda setup: replace(facts(setup), gpus=(other, ours))))
    built = api.build("./model:fp16@tensorrt-llm", target="sm89", how=How(until="stage2"))
    assert built.error is None
    assert seen.read_text() == "GPU-ada\n"
