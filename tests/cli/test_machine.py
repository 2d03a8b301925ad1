from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Recipes
from engine_recipes import facts as facts_module
from engine_recipes.api import Setup
from engine_recipes.cli import machine
from engine_recipes.facts import Facts, Gpu

A10 = Gpu("NVIDIA A10", "8.6", 24 << 30, "580.95", 20 << 30)
L40S = Gpu("NVIDIA L40S", "8.9", 48 << 30, "580.95")
HOPPER = Gpu("NVIDIA H100", "9.0", 80 << 30, "580.95")

#: An engine that compiles for some GPUs on any machine, and one that needs a program and the GPU.
ENGINES = """
[engines.swift]
module = "swift"
takes = ["trtllm-checkpoint"]
gives = "swift-engine"
targets = ["sm89", "sm86"]
algorithms = { "sm*" = ["FP8", "W8A16"] }
min_driver = "590"

[engines.boxed]
module = "boxed"
takes = ["trtllm-checkpoint"]
gives = "boxed-engine"
targets = ["sm89"]
needs_gpu = true
programs = { local = ["box-build"], docker = ["docker"] }
binds = ["pluggy", "not-there"]
install = "install the box"
"""


def script(folder: Path, name: str, body: str, shell: str = "/bin/sh") -> str:
    """A program of ours; returns its path."""
    path = folder / name
    path.write_text(f"#!{shell}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def setup(own_world: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """A machine without a GPU and without programs, with our packages and two engines more."""
    Path("registry.toml").write_text(ENGINES)
    monkeypatch.setattr(machine, "CDI", ())
    monkeypatch.setattr(facts_module, "DRIVER", own_world / "absent")
    made = Setup(workspace)
    be(made, gpus=(), programs={}, cuda="")
    return made


def be(setup: Setup, **differences: Any) -> None:
    """Change what the machine is."""
    vars(setup)["facts"] = replace(setup.facts, **differences)


def found(setup: Setup) -> dict[str, dict[str, str]]:
    """What doctor says, by name."""
    checks = list(machine.diagnose(setup))
    assert all(check["verdict"] in ("ok", "warn", "missing") for check in checks)
    assert all(check["hint"] for check in checks if check["verdict"] == "missing")
    return {check["name"]: check for check in checks}


def verdict(check: Mapping[str, str]) -> tuple[str, str]:
    return check["verdict"], check["found"]


def test_doctor_is_honest_and_always_exits_0(recipes: Recipes, toy: None) -> None:
    ran = recipes("doctor", "--json")
    assert ran.code == 0
    checks = {check["name"]: check for check in ran.json["checks"]}
    assert all(set(c) == {"name", "verdict", "found", "hint"} for c in checks.values())
    assert {c["verdict"] for c in checks.values()} <= {"ok", "warn", "missing"}
    assert checks["engine onnxruntime"]["verdict"] == "ok"
    assert "onnxruntime 1." in checks["engine onnxruntime"]["found"]
    assert checks["engine echo"]["found"] == "needs nothing more"
    assert "free" in checks["workspace"]["found"]
    assert "available" in checks["memory"]["found"]
    assert verdict(checks["build onnxruntime"])[0] == "ok"
    assert "cpu: " in checks["build onnxruntime"]["found"]
    assert "engine onnxruntime" in recipes("doctor").out


def test_a_docker_that_fails_does_not_make_doctor_fail(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path, "docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    ran = recipes("doctor", "--json")
    assert (ran.code, ran.err) == (0, "")
    (docker,) = (check for check in ran.json["checks"] if check["name"] == "docker")
    assert verdict(docker) == ("warn", "installed, but does not work: Cannot connect to the Docker daemon")
    assert docker["hint"] == "start it: `sudo systemctl start docker`"


def test_containers_are_asked_for_the_version_that_answers(setup: Setup, tmp_path: Path) -> None:
    checks = found(setup)
    assert verdict(checks["docker"]) == verdict(checks["podman"]) == ("missing", "not installed")
    be(setup, programs={"docker": script(tmp_path, "docker", 'test "$3" = "{{.Server.Version}}" && echo 28.1.1')})
    checks = found(setup)
    assert verdict(checks["docker"]) == ("ok", "28.1.1")
    assert verdict(checks["podman"]) == ("ok", "not installed")  # one of them is enough
    be(setup, programs={"podman": script(tmp_path, "podman", "echo 5.4.0")})
    assert verdict(found(setup)["podman"]) == ("ok", "5.4.0")


def test_a_docker_that_may_not_be_used_says_how_to_be_let_in(setup: Setup, tmp_path: Path) -> None:
    said = "permission denied while trying to connect to the Docker daemon socket"
    be(setup, programs={"docker": script(tmp_path, "docker", f"echo {said} >&2; exit 1")})
    docker = found(setup)["docker"]
    assert docker["verdict"] == "warn"
    assert "usermod -aG docker" in docker["hint"]


def test_a_docker_that_hangs_is_not_waited_for(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PATIENCE", 0.3)
    be(setup, programs={"docker": script(tmp_path, "docker", "sleep 30")})
    started = time.monotonic()
    assert verdict(found(setup)["docker"]) == ("warn", "installed, but does not work: no answer within 0.3 s")
    assert time.monotonic() - started < 5


def test_the_container_toolkit_is_needed_where_there_is_a_gpu(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(setup)["container toolkit"]["verdict"] == "ok"
    be(setup, gpus=(A10,))
    toolkit = found(setup)["container toolkit"]
    assert verdict(toolkit) == ("missing", "not installed: containers do not see the GPU")
    assert "nvidia-container-toolkit" in toolkit["hint"]
    (tmp_path / "nvidia.yaml").write_text("cdiVersion: 0.6.0\n")
    monkeypatch.setattr(machine, "CDI", (tmp_path / "absent", tmp_path))
    assert verdict(found(setup)["container toolkit"]) == ("ok", str(tmp_path / "nvidia.yaml"))
    be(setup, programs={"nvidia-ctk": "/usr/bin/nvidia-ctk"})
    assert found(setup)["container toolkit"]["found"].startswith("/usr/bin/nvidia-ctk, ")


def test_every_gpu_is_shown_and_which_one_builds_are_for(setup: Setup) -> None:
    be(setup, gpus=(A10, L40S), cuda="13.0")
    checks = found(setup)
    assert checks["GPU 0"]["found"] == "NVIDIA A10, compute capability 8.6 (sm86), 25.8 GB, 21.5 GB free"
    assert checks["GPU 1"]["found"] == "NVIDIA L40S, compute capability 8.9 (sm89), 51.5 GB"
    assert verdict(checks["GPUs"]) == ("warn", "of different kinds: sm86, sm89")
    assert checks["GPUs"]["hint"].endswith("the first, sm86")


def test_a_driver_that_is_too_old_for_an_engine_is_named(setup: Setup) -> None:
    be(setup, gpus=(A10,), cuda="13.0")
    driver = found(setup)["driver"]
    assert verdict(driver) == ("warn", "580.95, CUDA 13.0")
    assert "swift needs 590 or newer" in driver["hint"]
    be(setup, gpus=(replace(A10, driver="590.1"),))
    assert verdict(found(setup)["driver"]) == ("ok", "590.1, CUDA 13.0")


def test_a_driver_that_does_not_answer_is_not_taken_for_none(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(setup)["GPU"]["found"] == "no NVIDIA GPU or driver found"
    monkeypatch.setattr(facts_module, "DRIVER", tmp_path)
    gpu = found(setup)["GPU"]
    assert verdict(gpu) == ("warn", "an NVIDIA driver is loaded and no GPU answers")
    assert "nvidia-smi" in gpu["hint"]


def test_an_engines_program_is_shown_with_the_versions_of_its_environment(setup: Setup, tmp_path: Path) -> None:
    from importlib.metadata import version

    assert verdict(found(setup)["box-build"]) == ("missing", "not on the PATH")
    assert found(setup)["box-build"]["hint"] == "install the box"
    program = script(tmp_path, "box-build", "raise SystemExit('never started')", sys.executable)
    be(setup, programs={"box-build": program})
    assert verdict(found(setup)["box-build"]) == ("ok", f"{program}, pluggy {version('pluggy')}")
    script(tmp_path, "box-build", "", f"/usr/bin/env {sys.executable}")
    assert verdict(found(setup)["box-build"]) == ("ok", f"{program}, pluggy {version('pluggy')}")


def test_a_program_is_looked_for_beside_the_python_that_the_registry_names(setup: Setup, tmp_path: Path) -> None:
    python = script(tmp_path, "python3", "exit 1")
    registry = setup.registry
    named = replace(registry.engines["boxed"], python=str(python))
    entries = {**registry.engines.entries, "boxed": named}
    object.__setattr__(registry, "engines", replace(registry.engines, entries=entries))
    be(setup, programs={"box-build": "/usr/bin/box-build"})
    assert verdict(found(setup)["box-build"]) == ("missing", f"not beside {python}")
    script(tmp_path, "box-build", "")
    assert found(setup)["box-build"]["found"].startswith(f"{tmp_path / 'box-build'}, ")


def test_an_environment_that_does_not_answer_is_said_so(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_PATIENCE", 0.2)
    for body, why in (
        ("sleep 30", "no answer within 0.4 s"),
        ("echo no such module >&2; exit 1", "no such module"),
        ("echo hello", "gave no answer that can be read"),
        ("echo {}", "has no pluggy or not-there"),
    ):
        python = script(tmp_path, "python3", body)
        be(setup, programs={"box-build": script(tmp_path, "box-build", "", python)})
        check = found(setup)["box-build"]
        assert verdict(check) == ("warn", f"{tmp_path / 'box-build'}, version not known")
        assert why in check["hint"]
    be(setup, programs={"box-build": script(tmp_path, "box-build", "echo a shell script")})
    assert "names no Python" in found(setup)["box-build"]["hint"]


def test_what_can_be_built_here_is_said_for_each_engine(setup: Setup) -> None:
    swift = found(setup)["build swift"]
    assert verdict(swift) == ("ok", "sm86: fp16, bf16, int8-wo; sm89: fp16, bf16, fp8, int8-wo")
    boxed = found(setup)["build boxed"]
    assert verdict(boxed) == ("missing", "boxed compiles for sm89 on such a GPU alone, and here is no NVIDIA GPU")
    be(setup, gpus=(L40S,))
    assert "needs the program box-build" in found(setup)["build boxed"]["found"]
    be(setup, programs={"box-build": "/opt/box-build"})
    assert found(setup)["build boxed"]["verdict"] == "ok"


def test_what_this_gpu_cannot_do_comes_with_the_nearest_thing_that_works(setup: Setup) -> None:
    be(setup, gpus=(A10,))
    assert "fp8 needs sm89 or newer, this is sm86 (choose " in found(setup)["build swift"]["hint"]
    be(setup, gpus=(HOPPER,))
    swift = found(setup)["build swift"]
    assert swift["verdict"] == "ok"  # it compiles for other machines
    assert swift["hint"].count(", not sm90") == 1


def test_what_a_missing_package_prevents_is_said_with_what_installs_it(setup: Setup) -> None:
    be(setup, versions={"numpy": "2.4", "ml-dtypes": "0.6"})
    swift = found(setup)["build swift"]
    assert verdict(swift) == ("ok", "sm86, sm89: fp16, bf16, int8-wo")
    be(setup, gpus=(L40S,))
    assert "fp8 (calibration amax) needs nvidia-modelopt" in found(setup)["build swift"]["hint"]
    be(setup, versions={})
    checks = found(setup)
    assert verdict(checks["precision fp16"])[0] == verdict(checks["build swift"])[0] == "missing"
    assert "pip install" in checks["build swift"]["hint"]


def test_a_disk_that_cannot_be_looked_at_is_one_check_of_many(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "free_bytes", broken)
    checks = found(setup)
    assert checks["workspace"]["verdict"] == "missing"
    assert "Permission denied" in checks["workspace"]["found"]
    assert "build swift" in checks


def test_a_machine_that_tells_nothing_is_no_error(setup: Setup) -> None:
    vars(setup)["facts"] = Facts()
    assert verdict(found(setup)["memory"]) == ("warn", "not known")
