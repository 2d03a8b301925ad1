"""The command line of `trtllm-build`, from the options. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from engine_recipes import StageContext

from .environment import Environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Options that are not passed as they are: how tools are run, and what the runtime wants to know.
OURS = frozenset(
    {"version", "runtime", "image", "python", "timeout", "workers", "load_timeout", "free_gpu_memory_fraction"}
)
#: The timing cache, in the engine's folder while it is being built.
TIMING_CACHE = "timing.cache"


def command(context: StageContext) -> list[str]:
    """Every word of the command that stage 2 runs, the container's too."""
    paths = [path for name in ("lora_dir", "visualize_network") for path in _words(name, context.options.get(name))]
    return Environment.of(context.options).wrap(
        ["trtllm-build", *arguments(context)],
        read=[*places(context), *(Path(path) for path in paths)],
        write=[context.out, *_pictures(context.options)],
        name=container(context),
    )


def arguments(context: StageContext) -> list[str]:
    """What follows `trtllm-build`: what is ours to say, then each option that was set."""
    folder = context.input("trtllm-checkpoint").path
    timing = str(context.out / TIMING_CACHE)
    words = ["--checkpoint_dir", str(folder), "--output_dir", str(context.out)]
    words += ["--input_timing_cache", timing, "--output_timing_cache", timing]
    words += ["--workers", str(context.options.get("workers") or context.ranks)]
    for name, value in context.options.items():
        if name not in OURS:
            words += _option(name, value)
    return words


def container(context: StageContext) -> str:
    """A name for the container; no two builds have the same at the same time."""
    return f"engine-recipes-{context.out.name.strip('.-')}"


def places(context: StageContext) -> list[Path]:
    """What the tool may read: the workspace, and the checkpoint, which may lie elsewhere."""
    folder = context.input("trtllm-checkpoint").path
    if context.cache == Path():
        return [folder]
    workspace = Path(os.path.commonpath([context.out.absolute(), context.cache.absolute()]))
    return [folder, workspace] if workspace != Path(workspace.anchor) else [folder]


@cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """`options.toml`: name -> what the option is."""
    options: dict[str, dict[str, Any]] = tomllib.loads(
        Path(__file__).with_name("options.toml").read_text(encoding="utf-8")
    )["options"]
    return options


def _option(name: str, value: Any) -> Iterator[str]:
    """`--name`, `--name value …`, or nothing for what was left to TensorRT-LLM."""
    if value is None or value is False or value in ("", 0):
        return
    yield f"--{name}"
    if value is not True:
        yield from _words(name, value)


def _words(name: str, value: Any) -> list[str]:
    """What an option says, word by word; paths in full, as the tool may stand in another folder."""
    kind = table().get(name, {}).get("kind", "")
    if kind not in ("words", "paths", "folders"):
        return [str(value)]
    words = [word.strip() for word in str(value or "").split(",") if word.strip()]
    return [os.path.abspath(os.path.expanduser(word)) for word in words] if kind != "words" else words


def _pictures(options: Mapping[str, Any]) -> list[Path]:
    return [Path(path) for path in _words("visualize_network", options.get("visualize_network"))]
