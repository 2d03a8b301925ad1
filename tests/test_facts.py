from __future__ import annotations

from hypothesis import given, strategies as st
from packaging.specifiers import SpecifierSet

from engine_recipes.facts import Facts, Gpu, distribution, parse_nvidia_smi, read, within

# Recorded on a machine with one H100 and driver 580.159.04.
H100 = "NVIDIA H100 80GB HBM3, 9.0, 81559, 580.159.04\n"


def test_a_gpu_is_read_from_nvidia_smi() -> None:
    (gpu,) = parse_nvidia_smi(H100)
    assert gpu == Gpu("NVIDIA H100 80GB HBM3", "9.0", 81559 << 20, "580.159.04")
    assert gpu.target == "sm90"


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


def test_this_machine_can_be_read() -> None:
    facts = read(["pluggy>=1", "not-a-package"])
    assert set(facts.versions) == {"pluggy"}
    assert facts.cpus >= 1
    assert facts.memory_bytes > 0


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
