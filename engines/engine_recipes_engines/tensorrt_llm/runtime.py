"""Runs a TensorRT-LLM engine in the user's own environment or container. Knows token ids, no text.

TensorRT-LLM cannot share our environment: `server.py` runs in theirs and does what it is asked through pipes.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import MachineError, RequestError, Sampling, read_manifest
from engine_recipes.stepping import check_ids

from .environment import Environment
from .link import Link

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]

SERVER = Path(__file__).with_name("server.py").resolve()


class TensorRTLLMRuntime:
    """A loaded engine (see `engine_recipes.Runtime`). Requests that are open together run together.

    Args:
        folder: an engine that `trtllm-build` wrote.
        options: of stage 2, as they are on this machine; what is left out is as in the engine's manifest. Besides:
            `load_timeout`, seconds that loading may take (default 900), and `free_gpu_memory_fraction`, the share of
            the memory left after loading that the KV cache takes (default 0.9).

    Attributes:
        max_seq_len: tokens that `logits` takes, and that always suffice for a prompt and its answer.
        vocab_size: rounded up to a multiple of 64 in some quantised engines.

    Raises:
        RequestError: this is no such engine, or an option is wrong.
        MachineError: TensorRT-LLM is not there, is of another version, cannot load the engine, died or took too long.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        folder = folder.resolve()  # the names of engines are links; a container sees only what they point to
        model, build = _read_config(folder)
        plugins = build.get("plugin_config", {})
        self.vocab_size: int = model["vocab_size"]
        self._room: int = build["max_seq_len"]  # for a prompt and its answer
        self._batch: int = build["max_batch_size"]
        self._gives_logits = bool(build.get("gather_context_logits"))
        # as TensorRT-LLM's TrtGptModel limits prompts: without chunks each is one piece of work
        packed = plugins.get("context_fmha", True) and plugins.get("remove_input_padding", True)
        step: int = build.get("max_num_tokens" if packed else "max_input_len") or self._room
        chunked = step < self._room - 1 and bool(plugins.get("use_paged_context_fmha"))
        self.max_seq_len = self._room - 1 if chunked else min(self._room - 1, step)
        settings = {"load_timeout": 900, "free_gpu_memory_fraction": 0.9, **_built_with(folder), **options}
        timeout = _positive(settings, "load_timeout")
        fraction = _positive(settings, "free_gpu_memory_fraction", 1.0)
        environment = Environment.of(settings)
        if missing := environment.missing():
            raise missing
        _require_versions(folder, environment)
        setup = json.dumps({"free_gpu_memory_fraction": fraction, "chunked_prefill": chunked})
        name = f"engine-recipes-run-{os.urandom(4).hex()}"
        argv = environment.wrap(
            ["python", str(SERVER), str(folder), setup], read=[folder, SERVER], interactive=True, name=name
        )
        self._link = Link(argv, environment.guarded(name))
        self._finalizer = weakref.finalize(self, self._link.end)
        try:
            self._link.await_ready(folder.name, timeout)
        except BaseException:
            self.close()
            raise

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield new token ids; the prompt is looked at before the first is asked for.

        Raises:
            RequestError: the prompt is empty, too long, or has ids outside the vocabulary.
            StageFailed: TensorRT-LLM failed.
            MachineError: it died.
        """
        self._check(prompt)
        return (token for (token,) in self._steps([prompt], sampling, stop))

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Yield one new token id for each prompt, step by step: what `generate` gives for each of them alone.

        Raises:
            RequestError: as for `generate`, or there are no prompts, too many, or of different lengths.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise RequestError("a batch needs prompts of one length", "give at least one, and all as long as the first")
        if len(prompts) > self._batch:
            raise RequestError(
                f"{len(prompts)} prompts at a time, this engine takes {self._batch}",
                "give fewer, or build with a larger --set build.max_batch_size",
            )
        for prompt in prompts:
            self._check(prompt)
        return self._steps(prompts, sampling)

    def _steps(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop: frozenset[int] = frozenset()
    ) -> Iterator[list[int]]:
        most = min(sampling.max_tokens, self._room - len(prompts[0]))
        if most < 1:
            return
        request = {
            "do": "generate",
            "prompts": [list(map(int, prompt)) for prompt in prompts],
            "max_tokens": most,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "stop": sorted(token for token in stop if 0 <= token < self.vocab_size),
        }
        for event in self._link.ask(request):
            yield event["tokens"]

    def logits(self, ids: Sequence[int]) -> Floats | None:
        """Next-token logits for every position, float32 [len(ids), vocabulary].

        None unless the engine was built with `gather_context_logits`.

        Raises:
            RequestError, StageFailed, MachineError: as for `generate`.
        """
        import numpy as np

        if not self._gives_logits:
            return None
        self._check(ids)
        request = {"do": "logits", "ids": list(map(int, ids)), "vocab_size": self.vocab_size}
        (event,) = self._link.ask(request)
        found: Floats = np.frombuffer(event["data"], np.float32).reshape(event["shape"])
        return found

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        self._finalizer()

    def _check(self, ids: Sequence[int]) -> None:
        if not self._finalizer.alive:
            raise ValueError("this engine was closed")
        check_ids(ids, self.max_seq_len, self.vocab_size, "build.max_seq_len and build.max_num_tokens")


def _read_config(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What the engine is, and how it was built, from the `config.json` that trtllm-build writes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model, build = config["pretrained_config"], config["build_config"]
        for number in (model["vocab_size"], build["max_seq_len"], build["max_batch_size"]):
            if not isinstance(number, int):
                raise TypeError(number)
    except (OSError, ValueError, KeyError, TypeError):
        raise RequestError(
            f"{folder} holds no TensorRT-LLM engine", "build it with `recipes build MODEL@tensorrt-llm`"
        ) from None
    return model, build


def _require_versions(folder: Path, environment: Environment) -> None:
    """Refuse an engine that another release built, before that release's library does so in its own words.

    Raises:
        MachineError: TensorRT-LLM or TensorRT is of another version than where the engine was built.
    """
    built = (read_manifest(folder) or {}).get("result")
    recorded = built.get("versions") if isinstance(built, dict) else None
    if not isinstance(recorded, dict) or not recorded:
        return
    here = environment.versions()
    for name, version in here.items():
        if recorded.get(name, version) != version:
            raise MachineError(
                f"this engine was built with {name} {recorded[name]}, {environment.place} has {version}",
                "build it again, or name an environment with that version: --set build.python=…",
            )


def _built_with(folder: Path) -> Mapping[str, Any]:
    options = (read_manifest(folder) or {}).get("options")  # built elsewhere: the environment's defaults hold
    return options if isinstance(options, dict) else {}


def _positive(settings: Mapping[str, Any], name: str, most: float = float("inf")) -> float:
    try:
        number = float(settings[name])
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number <= most:
        limit = "" if most == float("inf") else f", at most {most:g}"
        raise RequestError(f"{name} = {settings[name]}", f"give a number above 0{limit}")
    return number
