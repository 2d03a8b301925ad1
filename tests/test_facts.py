from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from hypothesis import given, strategies as st
from packaging.specifiers import SpecifierSet

from engine_recipes import facts as machine
from engine_recipes.facts import Facts, Gpu, ask, distribution, memory, nvidia, parse_nvidia_smi, read, within

# As a machine with one H100 and driver 580.159.04 says it.
H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.159.04, 80994, GPU-1234\n"


def test_a_gpu_is_read_from_nvidia_smi() -> None:
    (gpu,) = parse_nvidia_smi(H100)
    assert gpu == Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 << 20, "580.159.04", 80994 << 20, "GPU-1234")
    assert gpu.target == "sm90"


def test_a_gpu_that_does_not_tell_its_memory_is_a_gpu() -> None:
    (gpu,) = parse_nvidia_smi("NVIDIA GB10, 12.1, [N/A], 580.95.05, [N/A], GPU-5\n")
    assert gpu == Gpu("NVIDIA GB10", "12.1", 0, "580.95.05", 0, "GPU-5")


def test_gpus_of_different_kinds_are_all_named() -> None:
    facts = Facts(gpus=(Gpu("A", "8.6", 0, "580.1"), Gpu("B", "8.9", 0, "580.1"), Gpu("A", "8.6", 0, "580.1")))
    assert (facts.target, facts.targets, facts.driver) == ("sm86", ("sm86", "sm89"), "580.1")
    assert (Facts().target, Facts().targets, Facts().driver) == ("cpu", (), "")


def test_noise_from_nvidia_smi_is_no_gpu() -> None:
    assert parse_nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver\n") == []


def test_requirements_have_alternatives() -> None:
    facts = Facts(versions={"onnxruntime-gpu": "1.24.0", "numpy": "2.0.0rc1"})
    assert facts.meets("onnxruntime>=1.23 | onnxruntime-gpu>=1.23")
    assert facts.meets("numpy>=1.26")
    assert not facts.meets("onnxruntime-gpu>=1.25")
    assert facts.missing(["onnx>=1.17 | onnx-gpu", "numpy"]) == ["onnx>=1.17"]
    assert facts.tools(["onnxruntime | onnxruntime-gpu", "absent"]) == {"onnxruntime-gpu": "1.24.0"}


def test_distribution_names_are_normalised() -> None:
    assert [distribution(r) for r in ("ML_dtypes >= 0.5", "onnx[reference]", "numpy")] == ["ml-dtypes", "onnx", "numpy"]


def test_this_machine_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "my-tool"
    tool.write_text("#!/bin/sh\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    facts = read(["pluggy>=1", "not-a-package"], ["my-tool", "no-such-tool"])
    assert set(facts.versions) == {"pluggy"}
    assert facts.cpus >= 1
    assert facts.memory_bytes >= facts.memory_available_bytes > 0
    assert facts.programs["my-tool"] == str(tool)
    assert "no-such-tool" not in facts.programs


releases = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(lambda numbers: ".".join(map(str, numbers)))


@given(
    releases,
    st.sampled_from(["", "rc1", ".post1", ".dev3", "+cu130"]),
    st.sampled_from([">=", "==", "<", "~="]),
    releases,
)
def test_versions_compare_as_pep_440_says(release: str, suffix: str, sign: str, wanted: str) -> None:
    if sign == "~=" and "." not in wanted:
        wanted += ".0"
    specifier = SpecifierSet(sign + wanted)
    assert within(release + suffix, sign + wanted) == specifier.contains(release + suffix, prereleases=True)


@given(releases, releases, releases)
def test_ranges_compare_as_pep_440_says(release: str, low: str, high: str) -> None:
    wanted = f">={low},<{high}"
    assert within(release, wanted) == SpecifierSet(wanted).contains(release, prereleases=True)


def test_what_is_not_met_says_what_there_is() -> None:
    facts = Facts(versions={"nvidia-modelopt": "0.37.0"})
    missing = ["torch>=2.8", "nvidia-modelopt>=0.47,<0.49", "onnx>=1"]
    said = "torch>=2.8, onnx>=1, not installed here; nvidia-modelopt>=0.47,<0.49, here is 0.37.0"
    assert facts.described(missing) == said
    assert facts.described(["onnx>=1"]) == "onnx>=1, not installed here"


# --- memory: of the machine and of control groups -------------------------------------------------------------------

GB = 1_000_000_000


def tree(root: Path, **files: str) -> Path:
    """A `/proc` and `/sys` of our own; the machine has 16 GB, 12 GB are available."""
    files = {"proc/meminfo": f"MemTotal: {16 * GB // 1024} kB\nMemAvailable:   {12 * GB // 1024} kB\n", **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(place: str, limit: str, used: int, cache: int, names: tuple[str, str, str]) -> dict[str, str]:
    """Files of one control group."""
    values = (limit, str(used), f"anon 1\n{names[2]} {cache}\nunevictable 0\n")
    return {f"sys/fs/cgroup/{place}{name}": v for name, v in zip((*names[:2], "memory.stat"), values, strict=True)}


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def test_without_a_limit_the_machines_memory_counts(tmp_path: Path) -> None:
    total, available = memory(tree(tmp_path))
    assert (total, available) == (16 * GB // 1024 * 1024, 12 * GB // 1024 * 1024)
    no_limit = group("job/", "max", 2 * GB, GB, V2)
    assert memory(tree(tmp_path, **{"proc/self/cgroup": "0::/job\n", **no_limit})) == (total, available)


def test_a_version_2_group_limits_memory_and_its_file_pages_are_free(tmp_path: Path) -> None:
    files = group("slice/job/", str(8 * GB), 5 * GB, 2 * GB, V2)
    assert memory(tree(tmp_path, **{"proc/self/cgroup": "0::/slice/job\n", **files})) == (8 * GB, 5 * GB)


def test_a_group_above_may_allow_less(tmp_path: Path) -> None:
    files = group("slice/job/", str(8 * GB), GB, 0, V2) | group("slice/", str(6 * GB), 5 * GB, 0, V2)
    assert memory(tree(tmp_path, **{"proc/self/cgroup": "0::/slice/job\n", **files})) == (6 * GB, GB)


def test_a_version_1_group_limits_memory_also_where_its_own_folder_is_out_of_sight(tmp_path: Path) -> None:
    inside = "5:cpu,cpuacct:/docker/abc\n4:hugetlb,memory:/docker/abc\n0::/\n"
    files = group("memory/", str(4 * GB), 3 * GB, GB, V1)
    assert memory(tree(tmp_path, **{"proc/self/cgroup": inside, **files})) == (4 * GB, 2 * GB)
    unlimited = group("memory/", "9223372036854771712", 3 * GB, GB, V1)
    assert memory(tree(tmp_path, **unlimited))[0] > 15 * GB


def test_a_group_that_is_full_leaves_hardly_anything(tmp_path: Path) -> None:
    files = group("", str(4 * GB), 4 * GB, 0, V2)
    total, available = memory(tree(tmp_path, **{"proc/self/cgroup": "0::/\n", **files}))
    assert total == 4 * GB
    assert 0 < available < 1000  # 0 would mean that it is not known


# --- the driver, through NVML ---------------------------------------------------------------------------------------


class Memory(NamedTuple):
    total: int
    free: int


class Nvml(ModuleType):
    """nvidia-ml-py's module over cards of our own. What a card has not is an error of the library."""

    class NVMLError(Exception):
        pass

    def __init__(self, cards: list[dict[str, Any]], broken: str = "") -> None:
        super().__init__("pynvml")
        self.cards, self.broken = cards, broken

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *arguments: self.answer(name, *arguments)

    def answer(self, name: str, *arguments: Any) -> Any:
        if name == self.broken:
            raise self.NVMLError("Driver/library version mismatch")
        if name == "nvmlDeviceGetHandleByIndex":
            return self.cards[arguments[0]]
        plain = {"nvmlSystemGetCudaDriverVersion_v2": 13000, "nvmlSystemGetDriverVersion": "580.1"}
        plain["nvmlDeviceGetCount"] = len(self.cards)
        if name in plain or not arguments:
            return plain.get(name)
        if name not in arguments[0]:
            raise self.NVMLError("Insufficient Permissions")
        return arguments[0][name]


def card(name: str, compute: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {"nvmlDeviceGetName": name, "nvmlDeviceGetCudaComputeCapability": compute, **more}


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's kernel module is loaded."""
    monkeypatch.setattr(machine, "DRIVER", tmp_path)


def test_gpus_and_cuda_are_read_through_nvml(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = card("NVIDIA L40S", (8, 9), nvmlDeviceGetMemoryInfo=Memory(48 << 30, 40 << 30))
    split = card("NVIDIA A100", (8, 0))  # in instances: its memory is not ours to see
    lost = {"nvmlDeviceGetName": "GPU is lost"}
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([split, lost, whole]))
    found, cuda = nvidia()
    assert found == [Gpu("NVIDIA A100", "8.0", 0, "580.1"), Gpu("NVIDIA L40S", "8.9", 48 << 30, "580.1", 40 << 30)]
    assert cuda == "13.0"


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount"])
def test_a_driver_that_fails_is_no_gpu(driver: None, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([card("NVIDIA L40S", (8, 9))], broken))
    assert nvidia()[0] == []


def test_an_old_driver_that_lacks_functions_still_has_gpus(driver: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ("nvmlSystemGetCudaDriverVersion_v2", "nvmlShutdown"):
        monkeypatch.setitem(sys.modules, "pynvml", Nvml([card("NVIDIA L40S", (8, 9))], broken))
        assert [gpu.target for gpu in nvidia()[0]] == ["sm89"]


def test_without_a_driver_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "absent")
    monkeypatch.setattr(machine, "_WSL", tmp_path / "absent")
    monkeypatch.setitem(sys.modules, "pynvml", Nvml([card("NVIDIA L40S", (8, 9))]))
    assert nvidia() == ([], "")


def test_without_nvidia_ml_py_nvidia_smi_is_asked(
    driver: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    monkeypatch.setenv("PATH", str(script(tmp_path, "nvidia-smi", f"echo '{H100.strip()}'").parent))
    assert [gpu.target for gpu in nvidia()[0]] == ["sm90"]
    script(tmp_path, "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    assert nvidia()[0] == []


# --- asking programs ------------------------------------------------------------------------------------------------


def script(folder: Path, name: str, body: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_a_program_is_asked_and_says_why_it_failed(tmp_path: Path) -> None:
    assert ask([str(script(tmp_path, "good", "echo 28.1; echo a warning >&2"))], 5) == ("28.1", "")
    failing = script(tmp_path, "bad", "echo first >&2; echo no daemon >&2; exit 1")
    assert ask([str(failing)], 5) == ("", "no daemon")
    assert ask([str(script(tmp_path, "mute", "exit 3"))], 5) == ("", "exit code 3")
    assert ask([str(tmp_path / "absent")], 5) == ("", "No such file or directory")


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "child"
    hanging = script(tmp_path, "hang", f"(sleep 1; touch '{mark}') & sleep 60")
    started = time.monotonic()
    assert ask([str(hanging)], 0.3) == ("", "no answer within 0.3 s")
    assert time.monotonic() - started < 5
    time.sleep(1)
    assert not mark.exists()


def test_a_local_version_meets_what_its_release_meets() -> None:
    assert within("2.13.0+cpu", ">=2.8")
    assert not within("2.13.0+cpu", ">=2.14")
    assert not within("2.13.0+cpu", ">=2.8,<2.13")


MIXED = (Gpu("L40S", "8.9", 0, "580.1", 0, "GPU-ada"), Gpu("H100", "9.0", 0, "580.1", 0, "GPU-hopper"))


def test_of_different_gpus_programs_see_those_that_the_engine_is_for() -> None:
    facts = Facts(gpus=(*MIXED, MIXED[0]))
    assert facts.visible("sm89") == "GPU-ada,GPU-ada"
    assert facts.visible("sm89+sm90") == "", "all of them: no need to choose"
    assert facts.visible("cpu") == facts.visible("sm80") == ""
    assert Facts(gpus=MIXED[:1]).visible("sm89") == ""
    nameless = Facts(gpus=(MIXED[0], Gpu("H100", "9.0", 0, "580.1")))
    assert nameless.visible("sm90") == "", "what cannot be named cannot be chosen"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["L40S", "H100"]),
        ("", []),
        ("-1", []),
        ("1", ["H100"]),
        ("1,0", ["H100", "L40S"]),
        ("GPU-hop", ["H100"]),
        ("0,7,1", ["L40S"]),
        ("MIG-3", []),
    ],
)
def test_gpus_that_cuda_visible_devices_hides_are_not_there(visible: str | None, expected: list[str]) -> None:
    assert [gpu.name for gpu in machine._allowed(list(MIXED), visible)] == expected
