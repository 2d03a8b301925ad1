from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from engine_recipes import portability
from engine_recipes.entries import Engine
from engine_recipes.facts import Facts, Gpu
from engine_recipes.registry import Registry, load

L40S = Gpu("NVIDIA L40S", "8.9", 48 << 30, "580.159.04")
A10 = Gpu("NVIDIA A10", "8.6", 24 << 30, "580.95")
HOPPER = Gpu("NVIDIA H100", "9.0", 80 << 30, "580.95")
ENGINE = Engine(
    name="swift",
    module="swift",
    takes=("trtllm-checkpoint",),
    gives="swift-engine",
    targets=("sm86", "sm89"),
    combines=True,
    requires=("swift-lib>=1",),
    algorithms={"sm*": ("FP8", "W4A16_AWQ")},
    binds=("swift_lib",),
    min_driver="580",
)
THERE = Facts(gpus=(L40S,), cuda="13.0", versions={"swift-lib": "1.7.1"})


def manifest(**more: Any) -> dict[str, Any]:
    """As a build on the L40S leaves it, read back from its file."""
    made = {
        "ref": "smollm2-135m:fp8@swift",
        "target": "sm89",
        "set": {"build.max_seq_len": 512, "calib.data": "my text.txt", "build.paged": True},
        "machine": portability.describe(THERE, ENGINE.requires),
        "result": {"versions": {"swift-lib": "1.7.1"}},
        **more,
    }
    read: dict[str, Any] = json.loads(json.dumps(made))
    return read


@functools.cache
def registry() -> Registry:
    return load()


def test_an_engine_runs_where_it_was_built_and_on_a_gpu_of_the_same_kind() -> None:
    assert portability.check(manifest(), THERE, ENGINE) is None
    mixed = Facts(gpus=(A10, L40S), versions=THERE.versions)
    assert portability.check(manifest(), mixed, ENGINE) is None
    assert portability.check(manifest(target="sm86+sm89"), Facts(gpus=(A10,)), ENGINE) is None


def test_another_gpu_is_named_with_the_command_that_builds_for_it() -> None:
    error = portability.check(manifest(), Facts(gpus=(A10,)), ENGINE)
    assert error is not None
    assert error.message == "this engine is for sm89 (NVIDIA L40S), this machine has sm86 (NVIDIA A10)"
    assert error.hint == (
        "build one for this machine: recipes build smollm2-135m:fp8@swift --set build.max_seq_len=512 "
        "--set 'calib.data=my text.txt' --set build.paged=true --target sm86"
    )
    assert error.exit_code == 3


def test_the_command_names_a_precision_that_this_gpu_can_run() -> None:
    error = portability.check(manifest(), Facts(gpus=(A10,)), ENGINE, registry())
    assert error is not None
    assert error.hint == "build one for this machine: recipes build smollm2-135m:int4-awq@swift --target sm86"


def test_where_the_engine_builds_nothing_another_one_is_left_to_be_chosen() -> None:
    no_gpu = portability.check(manifest(), Facts(), ENGINE)
    assert no_gpu is not None
    assert no_gpu.message == "this engine is for sm89 (NVIDIA L40S), this machine has no NVIDIA GPU"
    assert no_gpu.hint.endswith("or build one for this machine: recipes build smollm2-135m:fp8")
    hopper = portability.check(manifest(target="sm86+sm89"), Facts(gpus=(HOPPER,)), ENGINE)
    assert hopper is not None
    assert hopper.message.startswith("this engine is for sm86+sm89 (NVIDIA L40S), this machine has sm90 (NVIDIA H100)")


def test_an_engine_compiled_for_a_gpu_that_was_not_there_names_no_gpu() -> None:
    assert portability.runs_here(manifest(target="sm86"), THERE) == (
        "this engine is for sm86, this machine has sm89 (NVIDIA L40S)"
    )


def test_an_engine_for_a_cpu_runs_everywhere() -> None:
    for facts in (Facts(), THERE):
        assert portability.runs_here(manifest(target="cpu"), facts) == ""
        assert portability.check(manifest(target="cpu"), facts, ENGINE) is None


def test_another_version_of_the_library_is_named_before_it_is_loaded() -> None:
    newer = Facts(gpus=(L40S,), versions={"swift-lib": "1.8.0"})
    error = portability.check(manifest(), newer, ENGINE)
    assert error is not None
    assert error.message == "this engine was built with swift-lib 1.7.1, this machine has 1.8.0"
    assert error.hint.startswith(
        "install swift-lib 1.7.1, or build it again: recipes build smollm2-135m:fp8@swift --set"
    )
    assert error.hint.endswith("--target sm89")
    assert portability.check(manifest(), Facts(gpus=(L40S,)), ENGINE) is None  # another environment's, or not installed


def test_what_the_engines_own_library_said_counts_more_than_what_was_installed() -> None:
    said = manifest(result={"versions": {"Swift_Lib": "1.8.0"}})
    assert portability.check(said, Facts(gpus=(L40S,), versions={"swift-lib": "1.8.0"}), ENGINE) is None
    assert portability.check(said, THERE, ENGINE) is not None


def test_a_driver_that_is_too_old_is_named() -> None:
    old = Gpu("NVIDIA L40S", "8.9", 48 << 30, "575.57.08")
    error = portability.check(manifest(), Facts(gpus=(old,), versions=THERE.versions), ENGINE)
    assert error is not None
    assert error.message == "swift needs NVIDIA driver 580 or newer, this machine has 575.57.08"


@pytest.mark.parametrize(
    ("version", "least", "is_older"),
    [
        ("575.57.08", "580", True),
        ("580", "580", False),
        ("580.159.04", "580.65", False),
        ("99.1", "580", True),
        ("", "580", False),
        ("580", "", False),
        ("unknown", "580", False),
    ],
)
def test_drivers_are_compared_by_number(version: str, least: str, is_older: bool) -> None:
    assert portability.older(version, least) is is_older


def test_a_manifest_from_elsewhere_cannot_put_commands_into_the_hint() -> None:
    sly = manifest(ref="x; rm -rf ~", set={"a\nb": 1, "key": "$(reboot)", "b": "x\ny", "list": [1]})
    error = portability.check(sly, Facts(gpus=(A10,)), ENGINE)
    assert error is not None
    assert error.hint == ("build one for this machine: recipes build 'x; rm -rf ~' --set 'key=$(reboot)' --target sm86")
    noisy = manifest(machine={"gpus": [{"name": "L40S\n\x1b[2J", "compute": "8.9"}]})
    assert portability.runs_here(noisy, Facts()) == "this engine is for sm89, this machine has no NVIDIA GPU"


FIELDS = [(), ("ref",), ("target",), ("set",), ("machine",), ("machine", "gpus"), ("machine", "versions"), ("result",)]
FIELDS += [("result", "versions"), ("result", "versions", "swift-lib")]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(FIELDS[1:]), anything, st.sampled_from([Facts(), THERE, Facts(gpus=(A10, HOPPER))]))
def test_a_manifest_from_elsewhere_may_hold_anything(path: tuple[str, ...], value: Any, facts: Facts) -> None:
    odd = copy.deepcopy(manifest())
    place = odd
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    error = portability.check(odd, facts, ENGINE, registry())
    for text in (portability.runs_here(odd, facts), *((error.message, error.hint) if error else ())):
        assert "\n" not in text


def test_the_machine_in_a_manifest_is_what_is_compared() -> None:
    here = portability.describe(Facts(gpus=(L40S, A10), cuda="13.0", versions={"a": "1", "b": "2"}), ["a>=1", "absent"])
    assert here["gpus"] == [
        {"name": "NVIDIA L40S", "compute": "8.9", "driver": "580.159.04"},
        {"name": "NVIDIA A10", "compute": "8.6", "driver": "580.95"},
    ]
    assert (here["cuda"], here["versions"]) == ("13.0", {"a": "1"})
    assert here["python"]
    assert here["system"]
