"""Where TensorRT-LLM is: in a Python environment of this machine that is not ours, or in a container.

Commands are lists of words and never pass through a shell. Inside a container paths are what they are outside.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_recipes import MachineError, RecipesError, RequestError, hub_cache

#: Which image has which release; `{}` is the version.
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:{}"
_PACKAGES = {"tensorrt-llm": ("tensorrt-llm",), "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")}
#: Asked of the other Python. Importing the packages would take half a minute.
_ASK = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name, spellings in json.loads(sys.argv[1]).items():
    for spelling in spellings:
        try:
            found.setdefault(name, version(spelling))
        except PackageNotFoundError:
            pass
print(json.dumps(found))
"""
#: Marks what a stage started, and so what is ended with it.
_MARK = "RECIPES_STAGE"
#: Waits until nobody holds its stdin any more, and then, unless it was told that all is well, ends a container.
_GUARD = """
import subprocess, sys, time
if not sys.stdin.buffer.read():
    for _ in range(5):
        if subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0:
            break
        time.sleep(1)
"""
_ASKING = 20.0  # seconds
_STARTING = 120.0  # seconds that a container gets, whose image may have to be read from a slow disk


@dataclass(frozen=True)
class Environment:
    """Where the tools run.

    Attributes:
        runtime: `local`, `docker` or `podman`.
        version: of TensorRT-LLM that is wanted; nothing: any.
        image: of the container.
        python: the local interpreter; nothing: the one of the `trtllm-build` on the PATH.
    """

    runtime: str = "local"
    version: str = ""
    image: str = ""
    python: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Environment:
        """From the options of stage 2. What is not among them is as in `options.toml`."""
        version = str(options.get("version") or "1.2.1")
        if str(options.get("image") or "").startswith("-"):
            raise RequestError(f"build.image = {options['image']!r} is no image", "name one, or leave it out")
        python = str(options.get("python") or "")
        return cls(
            runtime=str(options.get("runtime") or "local"),
            version=version,
            image=str(options.get("image") or IMAGE.format(version)),
            python=os.path.abspath(os.path.expanduser(python)) if python else "",
        )

    @property
    def place(self) -> str:
        """In words: `/opt/trt/bin/python`, or the image."""
        return self.program("python") if self.runtime == "local" else self.image

    def wrap(
        self,
        argv: Sequence[str],
        *,
        read: Iterable[Path] = (),
        write: Iterable[Path] = (),
        interactive: bool = False,
        name: str = "",
    ) -> list[str]:
        """The command that runs `argv` there.

        Args:
            argv: a program of TensorRT-LLM, or `python`, and its arguments.
            read, write: folders and files that it reads and writes; the rest of the disk is not in a container.
            interactive: it listens to stdin. An image may print a banner before the program says anything.
            name: of the container, for `guarded`.
        """
        if self.runtime == "local":
            return [self.program(argv[0]), *argv[1:]]
        words = [self.runtime, "run", "--rm", "--init", "--pull", "never"]
        words += ["--name", name] if name else []
        words += ["--interactive"] if interactive else []
        words += ["--ipc", "host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
        if self.runtime == "podman":
            words += [word for gpu in gpus() or ["all"] for word in ("--device", f"nvidia.com/gpu={gpu}")]
            words += ["--userns", "keep-id", "--security-opt", "label=disable"]
        else:
            # docker reads this as CSV: what holds commas is quoted
            words += ["--gpus", f'"device={",".join(gpus())}"' if gpus() else "all"]
            words += ["--user", f"{os.getuid()}:{os.getgid()}"]
        cache = hub_cache().absolute()
        settings = {"HOME": "/tmp", "USER": "engine-recipes", "TRTLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
        if cache.is_dir():
            settings |= {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
            read = [*read, cache]
        for key, value in settings.items():
            words += ["--env", f"{key}={value}"]
        for place, writable in mounts(read, write):
            words += ["--mount", f"type=bind,source={place},target={place}" + ("" if writable else ",readonly")]
        program = "python3" if argv[0] == "python" else argv[0]
        return [*words, self.image, program, *argv[1:]]

    def program(self, name: str) -> str:
        """Where a local program is; its bare name if it is nowhere."""
        if self.python:
            return self.python if name == "python" else str(Path(self.python).parent / name)
        if name != "python":
            return shutil.which(name) or name
        tool = shutil.which("trtllm-build")
        return _interpreter(Path(tool)) if tool else name

    def missing(self) -> MachineError | None:
        """What has to be there and is not: a program, a daemon, an image. Takes seconds at most."""
        if self.runtime != "local":
            return self._missing_container()
        for name in ("trtllm-build", "python"):
            if not shutil.which(self.program(name)):
                hint = "activate the environment that has it, name its interpreter with --set build.python=…"
                return MachineError(
                    f"{self.program(name)} is not there: TensorRT-LLM {self.version} is needed"
                    if self.python
                    else "trtllm-build is not on the PATH",
                    f"{hint}, or use a container with --runtime docker",
                )
        return None

    def _missing_container(self) -> MachineError | None:
        if not shutil.which(self.runtime):
            others = " or ".join(name for name in ("local", "docker", "podman") if name != self.runtime)
            return MachineError(f"{self.runtime} is not installed", f"install it, or give --runtime {others}")
        inspect = [self.runtime, "image", "inspect", "--format", "{{.Id}}", self.image]
        try:
            done = subprocess.run(inspect, capture_output=True, text=True, timeout=_ASKING, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return MachineError(f"{self.runtime} does not answer", f"see whether `{self.runtime} info` does")
        if done.returncode == 0:
            return None
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if "permission denied" in said.lower():
            return MachineError(f"{self.runtime} refuses this user: {said}", "join the group docker, or use podman")
        if "daemon" in said.lower() and "connect" in said.lower():
            return MachineError(f"{self.runtime} cannot be reached: {said}", "start its daemon: systemctl start docker")
        return MachineError(f"the image {self.image} is not on this machine", f"{self.runtime} pull {self.image}")

    def versions(self) -> dict[str, str]:
        """What is installed there: `{"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1.48"}`. Nothing is imported.

        Raises:
            MachineError: the interpreter, or the container, does not run.
        """
        name = f"engine-recipes-ask-{os.urandom(4).hex()}"
        command = self.wrap(["python", "-c", _ASK, json.dumps(_PACKAGES)], name=name)
        try:
            with self.guarded(name):
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    stdin=subprocess.DEVNULL,
                    timeout=_ASKING if self.runtime == "local" else _STARTING,
                    cwd="/",  # -c puts the folder it stands in on the path
                )
            lines = done.stdout.strip().splitlines()
            return {str(key): str(value) for key, value in json.loads(lines[-1]).items()}
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MachineError(f"{self.place} cannot be run: {error}", "see whether it runs by itself") from None
        except (IndexError, ValueError, AttributeError):
            raise self._did_not_run(done.stdout + done.stderr) from None

    def _did_not_run(self, output: str) -> RecipesError:
        from .failures import explain

        lines = [line for line in output.splitlines() if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        return explain(lines) or MachineError(f"{self.place} cannot be run: {last}", "see whether it runs by itself")

    def require(self) -> dict[str, str]:
        """The versions there, if they are what is wanted.

        Raises:
            MachineError: something is missing, or TensorRT-LLM is of another version.
        """
        missing = self.missing()
        if missing:
            raise missing
        versions = self.versions()
        found = versions.get("tensorrt-llm", "")
        if not found:
            raise MachineError(f"{self.place} has no tensorrt_llm", "name one that has: --set build.python=…")
        if self.version and not _same(found, self.version):
            raise MachineError(
                f"{self.place} has TensorRT-LLM {found}, and {self.version} is asked for",
                f"set build.version={found.partition('+')[0]}, or use an environment with {self.version}",
            )
        return versions

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """End the container of that name if the block raises, or this process dies in it, even by SIGKILL.

        A container is no child of ours: it outlives the client that started it. Local programs are children, and end
        with the process group of the worker.
        """
        if self.runtime == "local":
            yield
            return
        guard = subprocess.Popen(
            [sys.executable, "-I", "-c", _GUARD, self.runtime, "kill", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what ends our process group must not end this,
            env={name: value for name, value in os.environ.items() if name != _MARK},  # nor what ends leftovers
        )
        assert guard.stdin
        with guard:  # closes its stdin and waits
            yield
            guard.stdin.write(b"done")


def gpus() -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to programs, which a container does not inherit; empty: all of them."""
    return [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]


def mounts(read: Iterable[Path], write: Iterable[Path]) -> list[tuple[Path, bool]]:
    """Places that a container must see, and whether it may write there; those inside another one left out.

    Raises:
        RequestError: a path that a container's command line cannot name.
    """
    wanted = {path.absolute(): False for path in read} | {path.absolute(): True for path in write}
    kept: list[tuple[Path, bool]] = []
    for place, writable in sorted(wanted.items()):  # parents come before what they hold
        if "," in str(place):
            raise RequestError(f"{place} has a comma, and cannot be mounted", "choose another place with --workspace")
        around = [seen for parent, seen in kept if parent in (place, *place.parents)]
        if not around or (writable and not around[-1]):
            kept.append((place, writable))
    return kept


def _interpreter(tool: Path) -> str:
    """The Python that a console script belongs to: the one in its first line, else the one beside it."""
    try:
        with tool.open("rb") as file:
            line = file.readline(512).decode(errors="replace").strip()
    except OSError:
        line = ""
    named = line.removeprefix("#!").strip()
    if line.startswith("#!") and " " not in named and Path(named).name.startswith("python"):
        return named
    beside = (tool.parent / name for name in ("python3", "python"))
    return next((str(path) for path in beside if path.is_file()), "python3")


def _same(one: str, other: str) -> bool:
    """Whether two versions name the same release, whatever it was built for."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(one).public) == Version(Version(other).public)
    except InvalidVersion:
        return one == other
