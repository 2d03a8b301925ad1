"""What this machine is: GPUs, versions, disk, memory. Imports no engine and starts nothing heavy."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `compute` is its compute capability, `8.9`; memory in bytes."""

    name: str
    compute: str
    memory_bytes: int
    driver: str

    @property
    def target(self) -> str:
        """`sm89` for compute capability 8.9."""
        return "sm" + self.compute.replace(".", "")


@dataclass(frozen=True)
class Facts:
    """A machine, as far as plans depend on it. Tests make their own."""

    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    machine: str = ""
    cpus: int = 1
    memory_bytes: int = 0

    @property
    def target(self) -> str:
        """The first GPU's target, or `cpu`."""
        return self.gpus[0].target if self.gpus else "cpu"

    def meets(self, requirement: str) -> bool:
        """Whether one alternative of `onnxruntime>=1.23 | onnxruntime-gpu>=1.23` is installed."""
        return any(self._has(alternative) for alternative in requirement.split("|"))

    def missing(self, requirements: Iterable[str]) -> list[str]:
        """The requirements that are not met, first alternatives only."""
        return [r.partition("|")[0].strip() for r in requirements if not self.meets(r)]

    def described(self, missing: Iterable[str]) -> str:
        """Requirements that are not met, and what there is instead."""
        there = {requirement: self.versions.get(distribution(requirement)) for requirement in missing}
        absent = ", ".join(requirement for requirement, version in there.items() if not version)
        other = [f"{requirement}, here is {version}" for requirement, version in there.items() if version]
        return "; ".join([f"{absent}, not installed here"] * bool(absent) + other)

    def tools(self, requirements: Iterable[str]) -> dict[str, str]:
        """Distribution -> version, for what is installed of the requirements."""
        names = {distribution(a) for r in requirements for a in r.split("|")}
        return {name: self.versions[name] for name in sorted(names) if name in self.versions}

    def _has(self, requirement: str) -> bool:
        name = distribution(requirement)
        version = self.versions.get(name)
        return version is not None and within(version, requirement.strip()[len(name) :])


def within(version: str, wanted: str) -> bool:
    """Whether a version meets a specifier such as `>=1.23,<2` (PEP 440); pre-releases count."""
    bounds = re.fullmatch(r"\s*>=\s*(\d+(?:\.\d+)*)\s*(?:,\s*<\s*(\d+(?:\.\d+)*)\s*)?", wanted)
    if bounds and re.fullmatch(r"\d+(\.\d+)*", version):  # nearly always: no need to import a parser for `list`
        have, low, high = (tuple(int(n) for n in (text or "0").split(".")) for text in (version, bounds[1], bounds[2]))
        length = max(len(have), len(low), len(high))
        have, low, high = (numbers + (0,) * (length - len(numbers)) for numbers in (have, low, high))
        return have >= low and (bounds[2] is None or have < high)
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def distribution(requirement: str) -> str:
    """`onnxruntime` from `onnxruntime >= 1.23`."""
    requirement = requirement.strip()
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "._-")), len(requirement))
    return requirement[:end].lower().replace("_", "-")


def read(requirements: Iterable[str] = ()) -> Facts:
    """Look at this machine. `requirements` name the distributions whose versions are wanted."""
    import platform

    names = {distribution(a) for r in requirements for a in r.split("|")}
    versions = {name: version for name in names if (version := _version(name))}
    return Facts(
        gpus=tuple(gpus()),
        versions=versions,
        python=platform.python_version(),
        machine=platform.machine(),
        cpus=cpus(),
        memory_bytes=memory_bytes(),
    )


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory; 0 if it cannot be told."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def gpus() -> list[Gpu]:
    """NVIDIA GPUs, through NVML if nvidia-ml-py is installed, else nvidia-smi. Empty without a driver."""
    if sys.platform == "linux" and not Path("/proc/driver/nvidia/version").exists():
        return []
    try:
        return _by_nvml()
    except ImportError:
        return _by_nvidia_smi()


def _by_nvml() -> list[Gpu]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            device = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(device).total
            found.append(Gpu(pynvml.nvmlDeviceGetName(device), f"{major}.{minor}", memory, driver))
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _by_nvidia_smi() -> list[Gpu]:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """GPUs from `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader,nounits`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit():
            found.append(Gpu(parts[0], parts[1], int(parts[2]) << 20, parts[3]))
    return found
