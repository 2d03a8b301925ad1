"""The command line of trtllm-build, against the recorded table of its options."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine_recipes.combinations import complete, refused
from engine_recipes.entries import Engine, Option
from engine_recipes.registry import load
from engine_recipes_engines import tensorrt_llm
from engine_recipes_engines.tensorrt_llm import arguments
from engines.tensorrt_llm.conftest import DATA, Context

RECORDED = {o["name"][2:]: o for o in json.loads((DATA / "options.json").read_text())["options"]}
OF_OLD = {"auto_parallel", "gpus_per_node", "cluster_key"}


@pytest.fixture(scope="module")
def details() -> Engine:
    """The engine with all its options: those of the registry, and those of the file it names."""
    return complete(load().engines["tensorrt-llm"])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def parsed(context: Context, folder: Path, **options: Any) -> dict[str, Any]:
    """What the stand-in's parser makes of the command."""
    words = arguments.command(context(folder, **options))
    code = "import json, sys, trtllm_build as t; print(json.dumps(vars(t.parser().parse_args(sys.argv[1:]))))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words[1:]], cwd=DATA, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout))


# --- the table ------------------------------------------------------------------------------------------------------


def test_the_table_has_every_recorded_option_and_no_other(details: Engine) -> None:
    assert details.options.keys() - arguments.OURS - OF_OLD == RECORDED.keys() - {"workers"}
    assert details.options.keys() >= arguments.OURS


def test_choices_and_defaults_are_the_recorded_ones(details: Engine) -> None:
    for name, recorded in RECORDED.items():
        option = details.options[name]
        if option.kind == "reserved":
            continue
        if recorded["type"] == "flag":
            assert option.default is False, name
        elif recorded["type"] == "int":
            assert isinstance(option.default, int), name
        elif recorded.get("choices") and not recorded.get("nargs"):
            assert set(option.choices) - {""} == set(recorded["choices"]), name
            assert option.default or option.unset == (recorded.get("default") or ""), name


def test_every_option_says_what_it_is(details: Engine) -> None:
    assert [name for name, option in details.options.items() if not option.help] == []


# --- the command ----------------------------------------------------------------------------------------------------


def test_what_is_always_passed(context: Context, checkpoint: Path) -> None:
    found = parsed(context, checkpoint, ranks=4)
    passed = {name: value for name, value in found.items() if value != RECORDED[name].get("default") and value}
    out = Path(passed.pop("output_dir"))
    assert passed.pop("input_timing_cache") == passed.pop("output_timing_cache") == str(out / "timing.cache")
    assert passed == {
        "checkpoint_dir": str(checkpoint),
        "workers": 4,
        "max_batch_size": 8,
        "max_num_tokens": 4096,
        "gemm_plugin": "auto",
        "kv_cache_type": "paged",
    }


def test_set_options_are_passed_as_the_parser_wants_them(context: Context, checkpoint: Path, tmp_path: Path) -> None:
    found = parsed(
        context,
        checkpoint,
        workers=1,
        strip_plan=True,
        multiple_profiles="enable",
        tokens_per_block=64,
        lora_plugin="auto",
        lora_target_modules="attn_q, attn_k",
        lora_dir=f"{tmp_path}/one,two",
    )
    assert (found["workers"], found["strip_plan"], found["multiple_profiles"]) == (1, True, "enable")
    assert (found["tokens_per_block"], found["lora_target_modules"]) == (64, ["attn_q", "attn_k"])
    assert found["lora_dir"] == [f"{tmp_path}/one", str(Path("two").absolute())]


def test_the_command_can_be_shown_before_there_is_a_checkpoint(context: Context, tmp_path: Path) -> None:
    of = context(tmp_path / "not made yet")
    words = tensorrt_llm.command(of)
    assert words[words.index("--workers") + 1] == "1"
    assert words == tensorrt_llm.command(of)


# --- what cannot be combined ----------------------------------------------------------------------------------------


def why(details: Engine, target: str = "sm90", **changes: Any) -> str:
    """Why a build is refused, as a plan asks; nothing if it is not."""
    values: dict[str, Any] = {"precision": "fp8", "algorithm": "FP8", "kv_cache": "none", "tp_size": 1, "pp_size": 1}
    values |= {f"build.{name}": _unset(option) for name, option in details.options.items()}
    values |= {f"build.{key}" if key in details.options else key: value for key, value in changes.items()}
    rule = refused(details.refuses, target, values)
    if rule:
        assert rule.instead
    return rule.why if rule else ""


def _unset(option: Option) -> Any:
    return option.unset if option.default == "" else option.default


@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120"])
@pytest.mark.parametrize("algorithm", ["", "FP8", "W4A16_AWQ", "W8A16", "W4A16"])
def test_defaults_are_refused_nowhere(details: Engine, target: str, algorithm: str) -> None:
    for precision in ("fp16", "bf16", "other"):
        assert why(details, target, algorithm=algorithm, precision=precision) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_cache": "fp8", "algorithm": "W4A16_AWQ"}, "FP8 KV cache without FP8 weights"),
        ({"kv_cache": "int8"}, "INT8 KV cache"),
        ({"kv_cache": "fp8", "algorithm": "W4A16_AWQ", "target": "sm86", "use_paged_context_fmha": "disable"}, "sm89"),
        ({"opt_num_tokens": 64, "multiple_profiles": "enable"}, "exclude each other"),
        ({"gather_context_logits": True, "max_draft_len": 4}, "exclude each other"),
        ({"target": "sm100", "low_latency_gemm_plugin": "fp8"}, "no low_latency_gemm_plugin for sm100"),
        ({"target": "sm103", "fp8_rowwise_gemm_plugin": "auto"}, "no fp8_rowwise_gemm_plugin for sm100"),
        ({"target": "sm89", "gemm_swiglu_plugin": "fp8"}, "for sm90 alone"),
        ({"streamingllm": "enable"}, "gave up streamingllm"),
        ({"gemm_plugin": "fp8", "algorithm": ""}, "needs an FP8 checkpoint"),
        ({"gemm_plugin": "nvfp4"}, "needs an NVFP4 checkpoint"),
        ({"gemm_plugin": "float16", "precision": "bf16", "algorithm": ""}, "does not fit a bfloat16"),
        ({"gpt_attention_plugin": "bfloat16", "dtype": "float16"}, "does not fit a float16"),
        ({"reduce_fusion": "enable"}, "tp_size is 1"),
        ({"user_buffer": "enable"}, "unless reduce_fusion"),
        ({"lora_target_modules": "attn_q"}, "needs build.lora_plugin"),
        ({"version": "1.3.0"}, "last release with trtllm-build"),
        ({"version": "0.16.0"}, "before 0.17"),
        ({"version": "0.19.0", "target": "sm120"}, "before 0.20"),
        ({"target": "sm75"}, "before sm80"),
        ({"output_dir": "/x"}, "set by engine-recipes itself"),
        ({"dry_run": True}, "builds no engine"),
    ],
)
def test_combinations_that_cannot_work_are_refused(details: Engine, changes: dict[str, Any], reason: str) -> None:
    assert reason in why(details, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_cache": "fp8"},
        {"kv_cache": "int8", "use_paged_context_fmha": "disable"},
        {"kv_cache": "fp8", "algorithm": "W4A16_AWQ", "use_paged_context_fmha": "disable"},
        {"gemm_swiglu_plugin": "fp8"},
        {"streamingllm": "enable", "version": "1.0.0"},
        {"reduce_fusion": "enable", "user_buffer": "enable", "tp_size": 2},
        {"gather_context_logits": True},
        {"gemm_plugin": "float16", "precision": "fp16", "algorithm": ""},
        {"version": "0.17.0"},
    ],
)
def test_what_works_is_not_refused(details: Engine, changes: dict[str, Any]) -> None:
    assert why(details, **changes) == ""


def test_rules_name_options_that_exist(details: Engine) -> None:
    known = {"target", "compute", "precision", "algorithm", "kv_cache", "dtype", "tp_size", "pp_size"}
    known |= {f"build.{name}" for name in details.options}
    assert {key for rule in details.refuses for key in rule.when} <= known
