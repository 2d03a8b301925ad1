"""Where TensorRT-LLM is looked for, and the words that run it. Containers: a stand-in for their clients."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine_recipes import MachineError, RequestError
from engine_recipes_engines.tensorrt_llm.environment import Environment, mounts
from engines.tensorrt_llm.conftest import Context, Make, environment

#: A client of a container daemon: keeps what it is told, runs `python3` here, and fails as it is asked to.
CLIENT = """#!{python}
import os, subprocess, sys
with open({log!r}, "a") as file:
    print(*sys.argv[1:], end="\\0", file=file)
say = os.environ.get("CLIENT_SAYS")
if say:
    sys.exit(say)
if sys.argv[1] == "image":
    sys.exit(0)
if sys.argv[1] == "kill":
    sys.exit(0)
words = sys.argv[sys.argv.index({image!r}) + 1:]
print("== banner of the image ==")
sys.exit(subprocess.run([{inside!r} + "/" + words[0], *words[1:]]).returncode)
"""
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"


@pytest.fixture(params=["docker", "podman"])
def runtime(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A container client on the PATH, whose image holds the stand-in."""
    inside = environment(tmp_path / "image").parent
    (inside / "python3").symlink_to("python")
    (tmp_path / "clients").mkdir()
    client = tmp_path / "clients" / request.param
    client.write_text(CLIENT.format(python=sys.executable, log=str(tmp_path / "told"), image=IMAGE, inside=str(inside)))
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:{os.environ['PATH']}")
    return str(request.param)


def told(tmp_path: Path) -> list[str]:
    return (tmp_path / "told").read_text().split("\0")[:-1]


# --- local ----------------------------------------------------------------------------------------------------------


def test_the_tool_is_taken_from_beside_the_python_that_was_named(python: Path) -> None:
    of = Environment.of({"python": str(python)})
    assert of.wrap(["trtllm-build", "--x"]) == [str(python.with_name("trtllm-build")), "--x"]
    assert of.wrap(["python", "-V"]) == [str(python), "-V"]
    assert of.require() == {"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}


def test_without_a_python_the_path_decides(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{python.parent}:{os.environ['PATH']}")
    tool = python.with_name("trtllm-build")
    (python.with_name("python3")).symlink_to("python")
    of = Environment.of({})
    assert of.wrap(["trtllm-build"]) == [str(tool)]
    assert of.program("python") == str(python.with_name("python3"))
    tool.write_text(f"#!{python}\n")  # as pip writes it
    assert of.program("python") == str(python)


def test_a_tool_that_is_not_there_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="trtllm-build is not on the PATH") as caught:
        Environment.of({}).require()
    assert "build.python" in caught.value.hint
    assert "--runtime docker" in caught.value.hint
    with pytest.raises(MachineError, match=r"/x/bin/trtllm-build is not there"):
        Environment.of({"python": "/x/bin/python"}).require()


def test_an_environment_without_tensorrt_llm_is_said(python: Path) -> None:
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I "$@"\n')
    with pytest.raises(MachineError, match="has no tensorrt_llm"):
        Environment.of({"python": str(python)}).require()
    python.write_text("#!/bin/sh\necho boom >&2; exit 1\n")
    with pytest.raises(MachineError, match="cannot be run: boom"):
        Environment.of({"python": str(python)}).require()


@pytest.mark.parametrize("version", ["1.2.1+cu130", "1.2.1"])
def test_what_a_release_was_built_for_is_no_other_version(tmp_path: Path, version: str) -> None:
    python = environment(tmp_path / "e", version)
    assert Environment.of({"python": str(python)}).require()["tensorrt-llm"] == version


# --- containers -----------------------------------------------------------------------------------------------------


def test_a_container_sees_the_same_paths_as_we_do(tmp_path: Path) -> None:
    words = Environment.of({"runtime": "docker"}).wrap(
        ["python", "serve.py"], read=[tmp_path / "in"], write=[tmp_path / "out"], interactive=True, name="n"
    )
    assert words[:3] == ["docker", "run", "--rm"]
    assert words[-3:] == [IMAGE, "python3", "serve.py"]
    assert f"type=bind,source={tmp_path}/in,target={tmp_path}/in,readonly" in words
    assert f"type=bind,source={tmp_path}/out,target={tmp_path}/out" in words
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert {"--interactive", "--gpus"} <= set(words)
    podman = Environment.of({"runtime": "podman", "image": "mine"}).wrap(["trtllm-build"])
    assert {"nvidia.com/gpu=all", "keep-id"} <= set(podman)
    assert podman[-2:] == ["mine", "trtllm-build"]


def test_the_hub_cache_is_there_read_only_and_nothing_is_fetched(tmp_path: Path, own_world: Path) -> None:
    hub = own_world / "hf" / "hub"
    hub.mkdir(parents=True)
    words = Environment.of({"runtime": "docker"}).wrap(["trtllm-build"])
    assert f"type=bind,source={hub},target={hub},readonly" in words
    assert "HF_HUB_OFFLINE=1" in words


def test_places_inside_others_are_mounted_only_if_they_may_be_written() -> None:
    at = Path("/w")
    assert mounts([at / "in", at, at / "in" / "x"], [at / "out"]) == [(at, False), (at / "out", True)]
    assert mounts([at / "in"], [at]) == [(at, True)]
    with pytest.raises(RequestError, match="comma"):
        mounts([Path("/a,b")], [])


def test_versions_are_asked_of_the_container(runtime: str, tmp_path: Path) -> None:
    of = Environment.of({"runtime": runtime})
    assert of.require() == {"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}
    assert [line.split()[0] for line in told(tmp_path)] == ["image", "run"]


@pytest.mark.parametrize(
    ("said", "message", "hint"),
    [
        ("Error: No such image: x", "is not on this machine", "pull nvcr.io"),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.", "cannot be reached", "systemctl"),
        ("permission denied while trying to connect to the docker daemon socket", "refuses this user", "group docker"),
    ],
)
def test_a_container_that_cannot_be_had_says_what_to_do(
    runtime: str, said: str, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT_SAYS", said)
    missing = Environment.of({"runtime": runtime}).missing()
    assert missing is not None
    assert message in missing.message
    assert hint in missing.hint


def test_a_runtime_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = Environment.of({"runtime": "podman"}).missing()
    assert missing is not None
    assert missing.message == "podman is not installed"


def test_an_engine_is_built_in_a_container(runtime: str, make: Make, context: Context, tmp_path: Path) -> None:
    from engine_recipes_engines import tensorrt_llm

    of = context(make(), runtime=runtime, python="")
    tensorrt_llm.stage2(of)
    assert (of.out / "rank0.engine").is_file()
    *_, run = told(tmp_path)
    assert f"--name engine-recipes-{of.out.name.strip('.')}" in run
    workspace = tmp_path / "workspace"
    assert f"source={workspace},target={workspace},readonly" in run
    assert f"source={of.out},target={of.out} " in run
    assert run == " ".join(tensorrt_llm.command(of)[1:])


def test_a_container_is_killed_when_the_worker_dies(runtime: str, tmp_path: Path) -> None:
    code = (
        "import sys, time; from engine_recipes_engines.tensorrt_llm.environment import Environment\n"
        f"with Environment.of({{'runtime': {runtime!r}}}).guarded('the-name'):\n"
        "    print('up', flush=True); time.sleep(60)"
    )
    roots = ":".join(path for path in sys.path if path)
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": roots},
        start_new_session=True,
    )
    with worker:
        assert worker.stdout and worker.stdout.readline() == b"up\n"
        os.killpg(worker.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while not (tmp_path / "told").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert told(tmp_path) == ["kill the-name"]


def test_a_container_that_ended_well_is_left_alone(runtime: str, tmp_path: Path) -> None:
    with Environment.of({"runtime": runtime}).guarded("the-name"):
        pass
    assert not (tmp_path / "told").exists()
    with pytest.raises(KeyError), Environment.of({"runtime": runtime}).guarded("the-name"):
        raise KeyError
    assert told(tmp_path) == ["kill the-name"]


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ("docker", ["--gpus", '"device=GPU-a,GPU-b"']),
        ("podman", ["--device", "nvidia.com/gpu=GPU-a", "--device", "nvidia.com/gpu=GPU-b"]),
    ],
)
def test_a_container_gets_the_gpus_that_programs_may_see(
    runtime: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    command = Environment.of({"runtime": runtime}).wrap(["trtllm-build"])
    at = command.index(words[0])
    assert command[at : at + len(words)] == words


def test_an_image_is_no_option_of_docker() -> None:
    with pytest.raises(RequestError, match="is no image"):
        Environment.of({"runtime": "docker", "image": "--privileged"})
