"""What this machine is: GPUs, versions, programs, memory. Imports no engine and starts nothing heavy."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from . import requirements as pep508
from .targets import parts, target_of

#: Programs that are always looked for: what asks the driver, and what runs containers and gives them a GPU.
PROGRAMS = ("nvidia-smi", "docker", "podman", "nvidia-ctk", "nvidia-container-cli")
#: Is there on Linux where the driver's kernel module is loaded, whether or not it answers.
DRIVER = Path("/proc/driver/nvidia/version")
_WSL = Path("/dev/dxg")  # Windows' Linux has its driver outside
_QUERY = "name,compute_cap,memory.total,driver_version,memory.free,uuid"


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU. `compute` is its compute capability, `8.9`; memory in bytes, 0 if it is not known; `uuid` is how
    CUDA_VISIBLE_DEVICES names it, in whatever order the GPUs are."""

    name: str
    compute: str
    memory_bytes: int
    driver: str
    memory_free_bytes: int = 0
    uuid: str = ""

    @property
    def target(self) -> str:
        """`sm89` for compute capability 8.9."""
        return target_of(self.compute)


@dataclass(frozen=True)
class Facts:
    """A machine, as far as plans depend on it. Tests make their own.

    Attributes:
        versions: distribution -> version, of those that were asked for and are installed.
        memory_bytes: RAM of the machine, or of the control group that this process is in; 0 if it is not known.
        memory_available_bytes: how much of it can be had without swapping; 0 if it is not known.
        cuda: the newest CUDA version that the driver runs, `13.0`; empty without a driver.
        programs: name -> path, of those that were asked for and are there.
    """

    gpus: tuple[Gpu, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    machine: str = ""
    cpus: int = 1
    memory_bytes: int = 0
    memory_available_bytes: int = 0
    cuda: str = ""
    programs: Mapping[str, str] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The first GPU's target, or `cpu`."""
        return self.gpus[0].target if self.gpus else "cpu"

    @property
    def targets(self) -> tuple[str, ...]:
        """Every GPU's target, each once; nothing without a GPU."""
        return tuple(dict.fromkeys(gpu.target for gpu in self.gpus))

    def visible(self, target: str) -> str:
        """What CUDA_VISIBLE_DEVICES must be so that a program sees only GPUs that the target is for.

        Empty where it need not be anything: all GPUs are such, or none is.
        """
        fitting = [gpu.uuid for gpu in self.gpus if gpu.target in parts(target)]
        return ",".join(fitting) if all(fitting) and len(fitting) < len(self.gpus) else ""

    @property
    def driver(self) -> str:
        """The version of the NVIDIA driver, `580.159.04`; empty without a GPU."""
        return self.gpus[0].driver if self.gpus else ""

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
        wanted = pep508.parse(requirement)
        version = self.versions.get(distribution(requirement))
        return not wanted.applies or (version is not None and within(version, wanted.versions))


@cache
def within(version: str, wanted: str) -> bool:
    """Whether a version meets a specifier such as `>=1.23,<2` (PEP 440); pre-releases count."""
    bounds = re.fullmatch(r"\s*>=\s*(\d+(?:\.\d+)*)\s*(?:,\s*<\s*(\d+(?:\.\d+)*)\s*)?", wanted)
    release = version.partition("+")[0]  # a local part, `2.13.0+cpu`, changes nothing about these bounds
    if bounds and re.fullmatch(r"\d+(\.\d+)*", release):  # nearly always: no need to import a parser for `list`
        have, low, high = (tuple(int(n) for n in (text or "0").split(".")) for text in (release, bounds[1], bounds[2]))
        length = max(len(have), len(low), len(high))
        have, low, high = (numbers + (0,) * (length - len(numbers)) for numbers in (have, low, high))
        return have >= low and (bounds[2] is None or have < high)
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(wanted).contains(version, prereleases=True)
    except InvalidVersion:  # whatever its METADATA says: it is not what is wanted
        return False


@cache
def distribution(requirement: str) -> str:
    """`onnxruntime` from `onnxruntime >= 1.23`, in the one spelling of PEP 503."""
    requirement = requirement.strip()
    end = next((i for i, c in enumerate(requirement) if not (c.isalnum() or c in "._-")), len(requirement))
    return pep508.canonical(requirement[:end])


def read(requirements: Iterable[str] = (), programs: Iterable[str] = ()) -> Facts:
    """Look at this machine.

    Args:
        requirements: name the distributions whose versions are wanted.
        programs: to look for on the PATH, beside PROGRAMS. None is started.
    """
    import platform
    from shutil import which

    from . import distributions

    names = {distribution(a) for r in requirements for a in r.split("|")}
    found, cuda = nvidia()
    total, available = memory()
    return Facts(
        gpus=tuple(found),
        versions={name: version for name, version in distributions.versions(names).items() if version},
        python=platform.python_version(),
        machine=platform.machine(),
        cpus=cpus(),
        memory_bytes=total,
        memory_available_bytes=available,
        cuda=cuda,
        programs={name: path for name in (*PROGRAMS, *programs) if (path := which(name))},
    )


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """RAM in bytes: what there is, and what can be had without swapping. 0 for what cannot be told.

    A control group (a container, a batch system's job) may allow less than the machine has; then its numbers count.
    """
    try:
        total, available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), 0
    except (ValueError, OSError, AttributeError):
        total, available = 0, 0
    info = dict(re.findall(r"^(MemTotal|MemAvailable):\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    total, available = (int(info.get(k, 0)) << 10 or v for k, v in (("MemTotal", total), ("MemAvailable", available)))
    for limit, used in _limits(root):
        total = min(total or limit, limit)
        available = min(available or total, max(limit - used, 1))
    return total, available


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Bytes that the control groups of this process allow, and what is taken of them: file pages that can be dropped
    left out. Of each group and those above it, version 2 and 1."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            mount, limit, usage, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        group = Path(path.lstrip("/"))
        for place in (group, *group.parents):  # inside a container the path may be the host's: only the last is there
            allowed, used = (_text(mount / place / name).strip() for name in (limit, usage))
            if allowed.isdigit() and used.isdigit():  # `max` is no limit
                droppable = re.search(rf"^{cache} (\d+)", _text(mount / place / "memory.stat"), re.MULTILINE)
                yield int(allowed), int(used) - (int(droppable[1]) if droppable else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def nvidia() -> tuple[list[Gpu], str]:
    """NVIDIA GPUs and the CUDA version, through NVML if nvidia-ml-py is installed, else nvidia-smi. Nothing without a
    driver, or with one that does not answer."""
    if sys.platform == "linux" and not (DRIVER.exists() or _WSL.exists()):
        return [], ""
    try:
        gpus, cuda = _by_nvml()
    except ImportError:
        answer, why = ask(["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"], 20)
        gpus, cuda = ([] if why else parse_nvidia_smi(answer)), _cuda()
    return _allowed(gpus, os.environ.get("CUDA_VISIBLE_DEVICES")), cuda


def _allowed(gpus: list[Gpu], visible: str | None) -> list[Gpu]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to programs; what follows a name that is none of them is left out."""
    if visible is None:
        return gpus
    found = []
    for name in (word.strip() for word in visible.split(",")):
        if name.isdigit() and int(name) < len(gpus):
            found.append(gpus[int(name)])
        elif name and (matching := [gpu for gpu in gpus if gpu.uuid.startswith(name)]):
            found.append(matching[0])
        else:
            break
    return found


def _by_nvml() -> tuple[list[Gpu], str]:
    import pynvml

    failures = (pynvml.NVMLError, ValueError, AttributeError)  # an older library lacks functions
    found, cuda = [], ""
    try:
        pynvml.nvmlInit()
    except failures:
        return [], ""
    with suppress(*failures):
        cuda = _dotted(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    with suppress(*failures):
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(*failures):  # one that is lost or not ours does not hide the others
                found.append(_device(pynvml, index, driver, failures))
    with suppress(*failures):
        pynvml.nvmlShutdown()
    return found, cuda


def _device(pynvml: Any, index: int, driver: str, failures: tuple[type[Exception], ...]) -> Gpu:
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    total = free = 0
    with suppress(*failures):  # a GPU that is split into instances may not tell
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        total, free = memory.total, memory.free
    uuid = ""
    with suppress(*failures):
        uuid = str(pynvml.nvmlDeviceGetUUID(device))
    return Gpu(str(pynvml.nvmlDeviceGetName(device)), f"{major}.{minor}", total, driver, free, uuid)


def _cuda() -> str:
    """The CUDA version that the driver's own library names, as NVML does; nothing is initialised."""
    import ctypes

    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return ""
    return "" if failed else _dotted(version.value)


def _dotted(version: int) -> str:
    """`13.0` from 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def parse_nvidia_smi(text: str) -> list[Gpu]:
    """GPUs from `nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version,memory.free,uuid
    --format=csv,noheader,nounits`. Memory that it does not tell (`[N/A]`) is 0."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 6 and re.fullmatch(r"\d+\.\d+", parts[1]):
            total, free = (int(parts[i]) << 20 if parts[i].isdigit() else 0 for i in (2, 4))
            found.append(Gpu(parts[0], parts[1], total, parts[3], free, parts[5]))
    return found


def ask(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """What a program prints, and why it failed: empty if it did not. It is ended, with its children, after `seconds`.

    A program that fails says why in its last line.
    """
    import signal
    import subprocess

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that one signal reaches its children: they hold the pipes
        )
    except OSError as error:
        return "", error.strerror or str(error)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a broken driver does not even die
            process.communicate(timeout=1)
        return "", f"no answer within {seconds:g} s"
    answer, said = (text.decode(errors="replace").strip() for text in (out, err))
    if process.returncode:
        last = (said or answer).splitlines()[-1:]
        return answer, " ".join(last) or f"exit code {process.returncode}"
    return answer, ""
