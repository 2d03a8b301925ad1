"""What this engine asks of a machine: a C++ compiler to build, a CPU with AVX2 to build and to run."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from engine_recipes import MachineError

#: What code is made for, in the words of compilers: every x86-64 CPU since 2015 or so. The machine that builds may
#: know more (AVX-512), and would make code that other machines cannot run. It would gain nothing: the products of
#: matrices and attention are calls into libtorch, which chooses by the CPU it finds; what is compiled here are the
#: norms, rope and activations between them.
ARCHITECTURE = "x86-64-v3"


def compiler() -> str:
    """The C++ compiler that Inductor will call, as `tools` in registry.toml has it: what $CXX names, else g++.

    See `torch._inductor.config.cpp.cxx`.
    """
    return os.environ.get("CXX", "g++")


def compiler_version(name: str) -> str:
    """How a compiler introduces itself, in one line; empty if it does not."""
    try:
        done = subprocess.run([name, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(done.stdout.splitlines()), "")


def check_cpu() -> None:
    """Refuse a machine that cannot run what is compiled.

    Raises:
        MachineError: its CPU has no AVX2, or is none of the x86 family.
    """
    if platform.machine() == "x86_64" and "avx2" in _flags():
        return
    raise MachineError(
        "aotinductor engines are for x86-64 CPUs with AVX2, and this machine's is none",
        "build and run it on another machine, or choose another engine, such as @onnxruntime",
    )


def _flags() -> list[str]:
    """What the CPU can do, as Linux calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
