from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_recipes import Ref, RequestError
from engine_recipes.facts import Facts, Gpu
from engine_recipes.planning import Plan, make
from engine_recipes.registry import Registry, load
from engine_recipes.sources import Located, parse

ADA = Gpu("RTX 6000 Ada", "8.9", 48 << 30, "580.1")
CPU = Facts(versions={"numpy": "2.4", "ml-dtypes": "0.6", "onnx": "1.23", "onnxruntime": "1.31", "tokenizers": "0.23"})
CPU = replace(CPU, versions={**CPU.versions, "jinja2": "3.1.6"})
HERE = Located(parse("hf:HuggingFaceTB/SmolLM2-135M-Instruct"), Path("/hf/snapshot"), "c" * 40)


@pytest.fixture
def registry(toy: None) -> Registry:
    return load()


def plan(registry: Registry, text: str = "smollm2-135m", facts: Facts = CPU, **more: Any) -> Plan:
    from engine_recipes.refs import parse as read

    ref = read(text)
    located = more.pop("located", HERE)
    return make(ref, registry, facts, registry.models[ref.model], located, **more)


def test_what_was_left_out_is_chosen_and_said(registry: Registry) -> None:
    made = plan(registry)
    assert str(made.ref) == "smollm2-135m:fp16@onnxruntime"
    assert made.chosen == ("precision fp16", "engine onnxruntime", "target cpu")
    assert made.blocked is None
    assert [stage.name for stage in made.stages] == ["resolve", "stage1", "stage2", "validate"]


def test_a_gpu_is_the_target_only_where_the_engine_can_use_it(registry: Registry) -> None:
    with_gpu = replace(CPU, gpus=(ADA,))
    assert plan(registry, facts=with_gpu).target == "cpu"
    with_cuda = replace(with_gpu, versions={**CPU.versions, "onnxruntime-gpu": "1.31"})
    assert plan(registry, facts=with_cuda).target == "sm89"


def test_keys_depend_on_what_they_should_and_on_nothing_else(registry: Registry) -> None:
    base = plan(registry)

    def same(other: Plan) -> list[bool]:
        return [a.key == b.key for a, b in zip(base.stages, other.stages, strict=True)]

    assert same(plan(registry)) == [True] * 4
    assert same(plan(registry, facts=replace(CPU, cpus=99, memory_bytes=1, python="3.13"))) == [True] * 4
    assert same(plan(registry, settings={"tp_size": "2"})) == [True, False, False, False]
    assert same(plan(registry, settings={"build.max_seq_len": "512"})) == [True, True, False, False]
    assert same(plan(registry, target="sm89")) == [True, True, False, False]
    newer = replace(CPU, versions={**CPU.versions, "onnxruntime": "1.32"})
    assert same(plan(registry, facts=newer)) == [True, True, False, False]
    elsewhere = replace(HERE, folder=Path("/other"))
    assert same(plan(registry, located=elsewhere)) == [True] * 4
    other_commit = replace(HERE, revision="d" * 40)
    assert same(plan(registry, located=other_commit)) == [False] * 4


def test_a_setting_may_spell_out_the_default_without_changing_the_key(registry: Registry) -> None:
    assert plan(registry).stages == plan(registry).stages
    assert plan(registry).stage("stage1").key == plan(registry, settings={"tp_size": "1"}).stage("stage1").key


def test_the_split_is_in_the_folders_name(registry: Registry) -> None:
    slot = plan(registry, settings={"tp_size": "2", "pp_size": "3"}).stage("stage1").slot
    assert slot is not None
    assert slot.label == "smollm2-135m-fp16-tp2-pp3"


def test_without_a_checkpoint_the_plan_is_blocked_and_says_how_much_to_fetch(registry: Registry) -> None:
    made = plan(registry, located=None)
    assert made.blocked is not None
    assert "recipes fetch smollm2-135m` (about 269 MB)" in made.blocked.hint
    assert {stage.key for stage in made.stages} == {""}


def test_a_missing_package_blocks_with_what_to_install(registry: Registry) -> None:
    bare = Facts(versions={"numpy": "2.4", "ml-dtypes": "0.6"})
    blocked = plan(registry, facts=bare).blocked
    assert blocked is not None
    assert "onnxruntime needs onnxruntime>=1.23" in blocked.message
    assert blocked.hint == "pip install 'engine-recipes[cpu]'"


def test_what_only_a_gpu_needs_is_named_by_itself(registry: Registry) -> None:
    blocked = plan(registry, "smollm2-135m@onnxruntime", target="sm89").blocked
    assert blocked is not None
    assert blocked.hint == "pip install 'onnxruntime-gpu>=1.23'"


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("smollm2-135m:fp61", {}, "no precision named 'fp61'\ndid you mean fp16?"),
        ("smollm2-135m@onnxruntim", {}, "no engine named 'onnxruntim'\ndid you mean onnxruntime?"),
        ("smollm2-135m", {"settings": {"tp": "2"}}, "no option 'tp' here\ndid you mean tp_size?"),
        ("smollm2-135m", {"settings": {"tp_size": "two"}}, "--set tp_size=two: must be a whole number"),
        ("smollm2-135m", {"settings": {"tp_size": "0"}}, "tp_size = 0: must be at least 1"),
        ("smollm2-135m:plain@echo", {"settings": {"style": "odd"}}, "style = 'odd': must be one of short, long"),
        ("smollm2-135m:plain@echo", {"settings": {"scale": "nan"}}, "--set scale=nan: must be a number"),
        ("smollm2-135m:plain@echo", {"settings": {"loud": "maybe"}}, "--set loud=maybe: must be true or false"),
        ("smollm2-135m:plain@echo", {"settings": {"tp_size": "9"}}, "tp_size = 9: must be at most 8"),
        ("smollm2-135m:plain@onnxruntime", {}, "onnxruntime takes trtllm-checkpoint, plain gives toy-checkpoint"),
        ("smollm2-135m:plain@echo", {"target": "sm90"}, "echo builds for cpu, sm8?, not sm90"),
        ("smollm2-135m:bf16", {"target": "sm75"}, "bf16 needs sm80 or newer, this is sm75"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(
    registry: Registry, text: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        plan(registry, text, **more)
    assert message in str(caught.value)
    assert caught.value.hint


def test_settings_come_from_model_user_and_command_line_and_say_so(registry: Registry) -> None:
    Path("registry.toml").write_text('[models."smollm2-135m".settings]\n"build.max_seq_len" = 1024\n')
    changed = load()
    setting = plan(changed).stage("stage2").settings["max_seq_len"]
    assert (setting.value, setting.origin) == (1024, "smollm2-135m (this project's registry.toml)")
    setting = plan(changed, settings={"build.max_seq_len": "99"}).stage("stage2").settings["max_seq_len"]
    assert (setting.value, setting.origin) == (99, "--set")


def test_a_setting_of_the_wrong_type_is_refused_with_whose_it_is(registry: Registry) -> None:
    Path("registry.toml").write_text('[models."smollm2-135m".settings]\ntp_size = "two"\n')
    with pytest.raises(RequestError, match=r"tp_size = 'two' in the settings of smollm2-135m \(this project's"):
        plan(load())


def test_plans_are_plain_data(registry: Registry) -> None:
    assert plan(registry) == plan(registry)
    assert plan(registry).ref == Ref("smollm2-135m", "fp16", "onnxruntime")


def test_a_calibration_is_a_stage_with_a_key_of_its_own(registry: Registry) -> None:
    base = plan(registry, "smollm2-135m:weighed@echo")
    assert [stage.name for stage in base.stages] == ["resolve", "calibrate", "stage1", "stage2", "validate"]
    calibrate = base.stage("calibrate")
    assert str(calibrate.provider).startswith("calibration weigh (engine-recipes-toy")
    assert calibrate.slot is not None and calibrate.slot.place == "calibrations"
    assert set(calibrate.options) == {"data", "pace", "tp_size"}

    def kept(other: Plan) -> bool:
        assert other.stage("stage1").key != base.stage("stage1").key
        return other.stage("calibrate").key == calibrate.key

    assert kept(plan(registry, "smollm2-135m:weighed@echo", settings={"style": "long"}))
    assert kept(plan(registry, "smollm2-135m:weighed-twice@echo"))
    assert not kept(plan(registry, "smollm2-135m:weighed@echo", settings={"tp_size": "2"}))
    fast = plan(registry, "smollm2-135m:weighed@echo", settings={"calib.pace": "9"})
    assert fast.stage("stage1").key == base.stage("stage1").key
    assert fast.given == {"calib.pace": 9}


def test_what_counts_of_data_is_its_content(registry: Registry, tmp_path: Path) -> None:
    def key(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        made = plan(registry, "smollm2-135m:weighed@echo", settings={"calib.data": str(tmp_path / name)})
        return made.stage("calibrate").key

    assert key("a.txt", "words") == key("b.txt", "words") != key("c.txt", "other words")


def test_data_that_cannot_be_had_blocks_and_data_that_is_none_is_refused(registry: Registry) -> None:
    blocked = plan(registry, "smollm2-135m:weighed@echo", settings={"calib.data": "hf:org/not-here"})
    assert blocked.blocked is not None and "calib.data: " in blocked.blocked.message
    assert blocked.stage("calibrate").key == blocked.stage("stage1").key == ""
    with pytest.raises(RequestError, match=r"calib\.data: .*nowhere\.txt"):
        plan(registry, "smollm2-135m:weighed@echo", settings={"calib.data": "nowhere.txt"})
    with pytest.raises(RequestError, match=r"no option 'calib\.data' here"):
        plan(registry, "smollm2-135m:plain@echo", settings={"calib.data": "nowhere.txt"})


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({}, "needs nvidia-modelopt>=0.47,<0.49, not installed here"),
        ({"nvidia-modelopt": "0.37.0"}, "needs nvidia-modelopt>=0.47,<0.49, here is 0.37.0"),
        ({"nvidia-modelopt": "0.49.0"}, "needs nvidia-modelopt>=0.47,<0.49, here is 0.49.0"),
    ],
)
def test_a_modelopt_that_is_missing_or_of_another_version_is_said_with_the_command_that_installs_it(
    registry: Registry, versions: dict[str, str], message: str
) -> None:
    rest = {"torch": "2.13", "transformers": "5.23", "accelerate": "1.15"}
    made = plan(registry, "smollm2-135m:fp8", facts=replace(CPU, versions={**CPU.versions, **rest, **versions}))
    assert made.blocked is not None
    assert message in made.blocked.message and "fp8 (calibration amax)" in made.blocked.message
    assert made.blocked.hint == "pip install 'engine-recipes[modelopt]'"


def test_a_calibration_that_nobody_has_is_an_error_with_a_suggestion(registry: Registry) -> None:
    lost = replace(registry.precisions["weighed"], calibration="weight")
    entries = {**registry.precisions.entries, "weighed": lost}
    broken = replace(registry, precisions=replace(registry.precisions, entries=entries))
    with pytest.raises(RequestError, match="no calibration named 'weight'") as caught:
        plan(broken, "smollm2-135m:weighed@echo")
    assert "weigh" in caught.value.hint


def test_what_an_engine_cannot_run_on_a_gpu_is_refused_before_it_is_calibrated(registry: Registry) -> None:
    made = plan(registry, "smollm2-135m:fp8@onnxruntime", target="sm90")
    error = made.lacks(["resolve", "calibrate", "stage1", "stage2"])
    assert isinstance(error, RequestError) and made.blocked is error, "before any package that is missing"
    assert error.message.endswith("cannot be built: onnxruntime does not run fp8 (FP8) on sm90")
    assert error.hint == "choose fp16 or @tensorrt-llm"
    with_cuda = replace(CPU, gpus=(ADA,), versions={**CPU.versions, "onnxruntime-gpu": "1.31"})
    assert plan(registry, "smollm2-135m:fp16", facts=with_cuda).target == "sm89"
    assert plan(registry, "smollm2-135m:fp8", facts=with_cuda).target == "cpu"


def test_a_checkpoint_can_be_made_that_no_engine_here_runs(registry: Registry) -> None:
    entries = {**registry.precisions.entries, "odd": replace(registry.precisions["fp16"], name="odd", algorithm="ODD")}
    odd = replace(registry, precisions=replace(registry.precisions, entries=entries))
    for text in ("smollm2-135m:odd@onnxruntime", "smollm2-135m:odd"):
        made = plan(odd, text)
        assert made.target == "cpu" and made.engine.name == "onnxruntime"
        assert made.lacks(["resolve", "stage1"]) is None
        error = made.lacks(["resolve", "stage1", "stage2"])
        assert error is not None and "onnxruntime does not run odd (ODD) on cpu" in error.message
        assert error.hint


def test_the_layers_that_stay_at_16_bits_are_read_from_the_option(registry: Registry) -> None:
    assert plan(registry).excluded == ()
    assert plan(registry, "smollm2-135m:fp8@onnxruntime", settings={"exclude": " a.*, ,b"}).excluded == ("a.*", "b")


def test_what_a_gpu_is_too_old_for_is_refused_with_the_nearest_that_works(registry: Registry) -> None:
    with pytest.raises(RequestError) as caught:
        plan(registry, "smollm2-135m:fp8@tensorrt-rtx", target="sm86")
    assert "fp8 needs sm89 or newer, this is sm86" in caught.value.message
    assert caught.value.hint == "choose int4-awq or fp16"


def test_one_engine_for_several_targets_is_one_engine_whatever_their_order(registry: Registry) -> None:
    made = plan(registry, "smollm2-135m:plain@tool", target="sm89,sm86")
    assert made.target == "sm86+sm89"
    assert made.stage("stage2").key == plan(registry, "smollm2-135m:plain@tool", target="sm86+sm89").stage("stage2").key
    with pytest.raises(RequestError, match="echo builds for one target at a time"):
        plan(registry, "smollm2-135m:plain@echo", target="sm89,sm86")
    with pytest.raises(RequestError, match="tool builds for cpu, sm86, sm89, not sm99"):
        plan(registry, "smollm2-135m:plain@tool", target="sm89,sm99")


def test_an_engine_that_cannot_be_for_this_machine_asks_what_it_is_for(registry: Registry) -> None:
    with pytest.raises(RequestError, match="this machine has no NVIDIA GPU\nname what it is for: --target sm89"):
        plan(registry, "smollm2-135m:fp16@tensorrt-rtx")
    hopper = replace(CPU, gpus=(Gpu("H100", "9.0", 80 << 30, "580.1"),))
    with pytest.raises(RequestError, match="this machine has sm90"):
        plan(registry, "smollm2-135m:fp16@tensorrt-rtx", facts=hopper)


def test_what_compiles_on_its_own_gpu_needs_that_gpu(registry: Registry) -> None:
    made = plan(registry, "smollm2-135m:fp16@tensorrt-llm", target="sm90", facts=replace(CPU, gpus=(ADA,)))
    assert "compiles for sm90 on such a GPU alone, and here is RTX 6000 Ada (sm89)" in made.lacking["stage2"].message
    assert made.lacks(["resolve", "stage1"]) is None, "the checkpoint can be made anywhere"


def test_a_program_that_is_missing_is_named_and_so_is_the_other_way_to_run_it(registry: Registry) -> None:
    missing = plan(registry, "smollm2-135m:plain@tool", target="cpu").blocked
    assert missing is not None
    assert missing.message == "tool needs the program toy-tool, not found here"
    assert missing.hint == "install toy-tool 2.0, or --runtime docker"
    there = replace(CPU, programs={"toy-tool": "/usr/bin/toy-tool"})
    assert plan(registry, "smollm2-135m:plain@tool", target="cpu", facts=there).blocked is None
    docker = plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"build.runtime": "docker"}).blocked
    assert docker is not None and "docker" in docker.message


def test_options_of_another_version_of_the_tool_are_no_options(registry: Registry) -> None:
    with pytest.raises(RequestError, match=r"no option 'build\.old' of tool 2\.0"):
        plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"build.old": "3"})
    older = {"build.old": "3", "build.version": "1.5"}
    assert plan(registry, "smollm2-135m:plain@tool", target="cpu", settings=older).settings["build.old"].value == "3"
    with pytest.raises(RequestError, match="is no version"):
        plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"build.version": "newest"})
    with pytest.raises(RequestError, match=r"did you mean build\.fuse"):
        plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"build.fuze": "enable"})


def test_forbidden_combinations_are_refused_when_planned_also_through_what_is_left_unset(registry: Registry) -> None:
    with pytest.raises(RequestError) as caught:
        plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"scale": "3"})
    assert caught.value.message.endswith("cannot be built: toy-tool 2 cannot fuse a scale of 3 or more")
    assert caught.value.hint == "choose --set build.fuse=disable"
    plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"scale": "3", "build.fuse": "disable"})
    plan(registry, "smollm2-135m:plain@tool", target="cpu", settings={"scale": "3", "build.version": "1.9"})
    with pytest.raises(RequestError, match="do not fit into sm86"):
        plan(registry, "smollm2-135m:plain@tool", target="sm89,sm86", settings={"style": "long"})


def test_how_a_tool_is_run_is_in_no_key(registry: Registry) -> None:
    there = replace(CPU, programs={"toy-tool": "/usr/bin/toy-tool", "docker": "/usr/bin/docker"})
    local = plan(registry, "smollm2-135m:plain@tool", target="cpu", facts=there)
    other = {"build.runtime": "docker", "build.python": "/opt/bin/python"}
    changed = plan(registry, "smollm2-135m:plain@tool", target="cpu", facts=there, settings=other)
    assert [stage.key for stage in changed.stages] == [stage.key for stage in local.stages]


def test_folders_count_by_what_is_in_them(registry: Registry, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    there = replace(CPU, programs={"toy-tool": "/usr/bin/toy-tool"})

    def key(**more: str) -> str:
        settings = {"build.extra": str(adapter), **more}
        made = plan(registry, "smollm2-135m:plain@tool", target="cpu", facts=there, settings=settings)
        return made.stage("stage2").key

    with pytest.raises(RequestError, match="there is no folder"):
        key()
    adapter.mkdir()
    (adapter / "weights").write_text("one")
    first = key()
    assert key() == first
    (adapter / "weights").write_text("two")
    assert key() != first
    other = adapter.rename(tmp_path / "elsewhere")
    assert key(**{"build.extra": str(other)}) == key(**{"build.extra": f" {other} "})


def test_an_engines_own_lack_stops_none_of_the_stages_before_it(registry: Registry) -> None:
    made = plan(registry, "smollm2-135m:plain@tool", target="cpu")
    assert set(made.lacking) == {"stage2"}
    assert made.lacks(["resolve", "stage1", "validate"]) is None
    bare = plan(registry, "smollm2-135m:fp16@onnxruntime", facts=Facts(versions={"numpy": "2.4", "ml-dtypes": "0.6"}))
    assert set(bare.lacking) == {"stage2", "validate"}, "an engine whose packages are missing is not judged either"


def test_an_engine_in_two_parts_does_not_run_on_one_gpu(registry: Registry) -> None:
    def why(gpus: int, **settings: str) -> str:
        facts = replace(CPU, gpus=(ADA,) * gpus)
        return plan(
            registry, "smollm2-135m:fp16@tensorrt-llm", target="sm89", facts=facts, settings=settings
        ).cannot_run

    assert why(1) == ""
    assert why(2, tp_size="2") == ""
    assert why(1, tp_size="2", pp_size="2") == "this engine is split over 4 GPUs, this machine has 1 for sm89"
