"""Stage 2 against a stand-in that parses trtllm-build's recorded command line and demands what its loaders demand."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from engine_recipes import MachineError, RequestError, StageContext, StageFailed, events
from engine_recipes_engines import tensorrt_llm
from engine_recipes_engines.tensorrt_llm import building, process, timing
from engines.tensorrt_llm.conftest import Context, Make

CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp16": ("float16", {}),
    "bf16": ("bfloat16", {}),
    "fp8": ("FP8", {}),
    "fp8-kv": ("FP8", {"kv_cache": "fp8"}),
    "fp8-excluded": ("FP8", {"exclude": ["transformer.layers.*.mlp.*"]}),
    "int4-awq": ("W4A16_AWQ", {"group_size": 64}),
    "int8-wo": ("W8A16", {}),
    "int4-wo": ("W4A16", {}),
}


def build(context: StageContext) -> dict[str, Any]:
    return dict(tensorrt_llm.stage2(context))


def engine(context: StageContext) -> dict[str, Any]:
    return json.loads((context.out / "config.json").read_text())


@pytest.mark.parametrize("split", [1, 2], ids=["whole", "tp2-pp2"])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_every_checkpoint_has_just_what_the_loaders_demand(kind: str, split: int, make: Make, context: Context) -> None:
    algorithm, options = CHECKPOINTS[kind]
    of = context(make(algorithm, "llama", tp_size=split, pp_size=split, **options))
    assert build(of) == {"versions": {"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}}
    ranks = {f"rank{rank}.engine" for rank in range(split * split)}
    assert {path.name for path in of.out.iterdir()} == {"config.json", building.LOG, *ranks}
    log = (of.out / building.LOG).read_text()
    # joined into kv_cache_scaling_factor as they are loaded
    assert not re.findall(r"Provided but not required tensors: (?!.*attention\.[kv]_cache_scaling_factor)", log)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("kind", "tp_size"), [("fp16", 4), ("fp8-kv", 2), ("int4-awq", 1)])
def test_qwen_loads_with_its_biases_and_norms(arch: str, kind: str, tp_size: int, make: Make, context: Context) -> None:
    algorithm, options = CHECKPOINTS[kind]
    build(context(make(algorithm, arch, tp_size=tp_size, **options)))


def test_a_tied_table_that_is_stored_once_is_no_short_engine(make: Make, context: Context) -> None:
    of = context(make("float16", config={"tie_word_embeddings": True, "vocab_size": 4096, "num_hidden_layers": 1}))
    build(of)
    assert (of.out / "rank0.engine").stat().st_size < 0.7 * (
        of.input("trtllm-checkpoint").path / "rank0.safetensors"
    ).stat().st_size


def test_what_was_set_reaches_the_engine(make: Make, context: Context) -> None:
    of = context(make(), max_batch_size=3, max_seq_len=77, gather_context_logits=True, use_paged_context_fmha="disable")
    build(of)
    built = engine(of)["build_config"]
    assert (built["max_batch_size"], built["max_seq_len"], built["max_num_tokens"]) == (3, 77, 4096)
    assert built["gather_context_logits"] is True
    assert built["plugin_config"]["use_paged_context_fmha"] is False
    assert built["plugin_config"]["gemm_plugin"] == "auto"


def test_a_tensor_that_is_missing_is_named_before_anything_is_compiled(make: Make, context: Context) -> None:
    folder = make("float16", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageFailed, match=r"lacks tensors that TensorRT-LLM wants: transformer\.layers") as caught:
        build(context(folder))
    assert "Required but not provided tensors" in caught.value.output


def test_a_damaged_checkpoint_is_found_before_the_tool_runs(make: Make, context: Context) -> None:
    folder = make()
    data = (folder / "rank0.safetensors").read_bytes()
    (folder / "rank0.safetensors").write_bytes(data[: len(data) // 2])
    of = context(folder)
    with pytest.raises(RequestError, match=r"rank0\.safetensors"):
        build(of)
    assert not list(of.out.iterdir())


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        ("oom", "the GPU's memory is too small: 24793579520 bytes", "max_num_tokens"),
        ("SIGKILL", "trtllm-build was killed by SIGKILL", "memory runs out"),
        ("SIGSEGV", "trtllm-build was killed by SIGSEGV", ""),
        ("lie", "said that all went well, and config.json is missing", ""),
        ("keys", "said that all went well, and config.json has no build_config", ""),
        ("half", "said that all went well, and rank1.engine of 2 is missing", ""),
        ("short", "rank0.engine has .* bytes, where its weights alone take", ""),
    ],
)
def test_failures_are_two_lines(
    kind: str, message: str, hint: str, make: Make, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", kind)
    with pytest.raises(StageFailed, match=message) as caught:
        build(context(make(tp_size=2)))
    assert hint in caught.value.hint
    assert "TensorRT-LLM version: 1.2.1" in caught.value.output


def test_no_gpu_is_said(make: Make, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_GPUS", "0")
    with pytest.raises(StageFailed, match="sees no GPU"):
        build(context(make()))


def test_a_tool_that_hangs_is_stopped_with_its_children(
    make: Make, context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pids = tmp_path / "pids"
    monkeypatch.setenv("STAND_IN_FAILS", "hang")
    monkeypatch.setenv("STAND_IN_PIDS", str(pids))
    monkeypatch.setattr(building, "_MINUTE", 1.0)
    monkeypatch.setattr(process, "_GRACE", 0.5)
    before = time.monotonic()
    with pytest.raises(StageFailed, match="took more than 2 minutes, and was stopped"):
        build(context(make(), timeout=2))
    assert time.monotonic() - before < 20
    for pid in pids.read_text().split():
        assert not is_running(int(pid))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_another_version_is_refused_with_the_setting_that_fits(make: Make, context: Context) -> None:
    with pytest.raises(MachineError, match=r"has TensorRT-LLM 1.2.1, and 1.1.0 is asked for") as caught:
        build(context(make(), version="1.1.0"))
    assert "build.version=1.2.1" in caught.value.hint


# --- the timing cache -----------------------------------------------------------------------------------------------


def caches(context: StageContext) -> list[Path]:
    return list(context.cache.glob("*.cache"))


def built_once(make: Make, context: Context) -> tuple[Path, StageContext, Path]:
    """A checkpoint that was built before, the context of its next build, and the timing cache that is kept of it."""
    folder = make()
    build(context(folder))
    of = context(folder)
    (kept,) = caches(of)
    return folder, of, kept


def test_the_timing_cache_grows_from_build_to_build(make: Make, context: Context) -> None:
    folder = make()
    for number in (1, 2, 3):
        of = context(folder)
        build(of)
        (kept,) = caches(of)
        assert kept.read_bytes() == b"ptrt%d" % number
        assert not (of.out / "timing.cache").exists()
    assert kept.name == "tensorrt-llm-1.2.1-tensorrt-10.14.1.48-sm89.cache"
    build(context(folder, target="sm90"))
    assert len(caches(of)) == 2  # another GPU measures for itself


def test_a_corrupt_timing_cache_is_replaced(make: Make, context: Context) -> None:
    _, of, kept = built_once(make, context)
    kept.write_bytes(b"nonsense")
    build(of)
    assert kept.read_bytes() == b"ptrt1"
    assert "Invalid timing cache" in (of.out / building.LOG).read_text()


def test_a_timing_cache_that_kills_the_tool_is_thrown_away(
    make: Make, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, of, kept = built_once(make, context)
    kept.write_bytes(b"nonsense")
    monkeypatch.setenv("STAND_IN_FAILS", "cache")
    said: list[dict[str, Any]] = []
    with events.sink(said.append):
        build(of)
    assert kept.read_bytes() == b"ptrt1"
    assert any(event["event"] == "warn" and "again without it" in event["text"] for event in said)
    assert (of.out / building.LOG).read_text().count("--checkpoint_dir") == 2


def test_a_failure_of_another_kind_leaves_the_timing_cache_alone(
    make: Make, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, of, kept = built_once(make, context)
    for failure, cache in (("oom", b"ptrt1"), ("oom", b"nonsense"), ("SIGKILL", b"nonsense")):
        kept.write_bytes(cache)
        monkeypatch.setenv("STAND_IN_FAILS", failure)
        of = context(folder)
        with pytest.raises(StageFailed):
            build(of)
        assert kept.read_bytes() == cache
        assert (of.out / building.LOG).read_text().count("--checkpoint_dir") == 1


def test_a_cache_that_cannot_be_kept_fails_no_build(make: Make, context: Context) -> None:
    of = context(make())
    of.cache.parent.mkdir(parents=True)
    of.cache.write_text("a file where the folder should be")
    build(of)
    assert os.listdir(of.out).count("timing.cache") == 0


def test_a_build_does_not_wait_for_ever_for_a_cache_that_others_hold(
    make: Make, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_LOCK_SECONDS", 0.1)
    _, of, kept = built_once(make, context)
    said: list[dict[str, Any]] = []
    with FileLock(f"{kept}.lock"), events.sink(said.append):
        build(of)
    assert kept.read_bytes() == b"ptrt1"
    assert "timing.cache" not in os.listdir(of.out)
    assert any("is not used" in event["text"] for event in said if event["event"] == "warn")


# --- what is shown --------------------------------------------------------------------------------------------------


def test_the_output_is_shown_and_the_bar_moves(make: Make, context: Context, capfd: pytest.CaptureFixture[str]) -> None:
    said: list[dict[str, Any]] = []
    with events.sink(said.append):
        build(context(make(tp_size=2)))
    shown = [event["text"] for event in said if event["event"] == "output"]
    assert any("Total time of building all engines" in text for text in shown)
    assert "Total time of building all engines" in capfd.readouterr().err
    bar = [(event["done"], event["total"]) for event in said if event.get("unit") == "steps"]
    assert bar[0] == (0, 6)
    assert bar[-1] == (6, 6)
    assert bar == sorted(bar)
