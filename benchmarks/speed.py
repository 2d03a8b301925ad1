"""Prefill and decode speed of a built onnxruntime engine, against transformers and onnxruntime-genai, same weights.

    python benchmarks/speed.py ENGINE_FOLDER SOURCE_FOLDER [--genai-python PATH]

ENGINE_FOLDER is what `recipes build` wrote, SOURCE_FOLDER the Hugging Face folder it came from. PATH is the Python of
an environment with onnxruntime-genai (and torch, transformers, onnx_ir for its model builder); without it, that
contender is left out. Every contender is a process of its own that loads once; they take turns, and those whose turn
it is not are stopped. Numbers are medians over the rounds, in tokens a second; higher is better.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: One turn: a prompt and a number of tokens to generate; yields once when each is there.
Turn = Callable[[list[int], int], Iterator[None]]


def ours(folder: str, threads: int) -> Turn:
    """Our runtime. The first token is the end of prefill."""
    from engine_recipes.types import Sampling
    from engine_recipes_engines.onnxruntime import load_engine

    engine = load_engine(Path(folder), {"threads": threads})

    def turn(prompt: list[int], count: int) -> Iterator[None]:
        for _ in engine.generate(prompt, Sampling(count)):
            yield

    return turn


def transformers(folder: str, threads: int, dtype: str) -> Turn:
    """The model's forward with its cache, without generate()'s own work, and the head for the last position only."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))

    def turn(prompt: list[int], count: int) -> Iterator[None]:
        cache, ids = DynamicCache(config=model.config), torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(count):
                logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                ids = logits[:, -1].argmax(-1, keepdim=True)
                yield

    return turn


def genai(folder: str, threads: int) -> Turn:
    """onnxruntime-genai's own loop, on any folder it can load."""
    import onnxruntime_genai as og  # type: ignore[import-not-found, unused-ignore]

    config = og.Config(folder)
    session = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": session}}))
    model = og.Model(config)

    def turn(prompt: list[int], count: int) -> Iterator[None]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + count, min_length=len(prompt) + count, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(prompt)
        for _ in range(count):
            generator.generate_next_token()
            yield

    return turn


def contender(kind: str, folder: str, threads: int) -> None:
    """The child: load, then for each line on stdin (`prompt length, tokens`) answer with seconds and memory."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr
    start = time.perf_counter()
    name, _, dtype = kind.partition(":")
    turn = transformers(folder, threads, dtype) if dtype else {"ours": ours, "genai": genai}[name](folder, threads)
    print(json.dumps({"load": time.perf_counter() - start}), file=answers, flush=True)
    for line in sys.stdin:
        length, count = json.loads(line)
        prompt = [random.Random(0).randrange(100, 10_000) for _ in range(length)]
        times = [time.perf_counter(), *(time.perf_counter() for _ in turn(prompt, count))]
        found = {
            "prefill": length / (times[1] - times[0]),
            "decode": (count - 1) / (times[-1] - times[1]),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        print(json.dumps(found), file=answers, flush=True)


class Child:
    """A contender's process, stopped while others have their turn."""

    def __init__(self, python: str, kind: str, folder: Path, threads: int) -> None:
        command = [python, __file__, "--contender", kind, str(folder), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load = self._answer()["load"]
        self.turns: list[dict[str, float]] = []
        self.process.send_signal(signal.SIGSTOP)

    def turn(self, length: int, count: int, keep: bool) -> None:
        """One round; `keep` is False for the first, which warms up."""
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdin
        self.process.stdin.write(json.dumps([length, count]) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.process.send_signal(signal.SIGSTOP)
        if keep:
            self.turns.append(answer)

    def median(self, key: str) -> float:
        return statistics.median(turn[key] for turn in self.turns)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a contender ended early: {self.process.args!r}")
        return dict(json.loads(line))


def build_genai(python: str, source: Path, out: Path) -> None:
    """Let onnxruntime-genai's model builder make its own fp32 engine of the source."""
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out)]
    command += ["-p", "fp32", "-e", "cpu", "-c", str(out / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"onnxruntime-genai's model builder failed:\n{done.stdout}{done.stderr}")


def show(children: dict[str, Child]) -> None:
    """The table. Ratios are ours / theirs: above 1, ours is faster."""
    mine = children["engine-recipes"]
    print(f"{'':32}{'prefill':>9}{'ratio':>7}{'decode':>9}{'ratio':>7}{'load s':>8}{'peak MB':>9}")
    for name, child in children.items():
        prefill, decode = child.median("prefill"), child.median("decode")
        ratios = mine.median("prefill") / prefill, mine.median("decode") / decode
        speeds = f"{prefill:9.1f}{ratios[0]:7.2f}{decode:9.1f}{ratios[1]:7.2f}"
        print(f"{name:32}{speeds}{child.load:8.2f}{child.median('peak_mb'):9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("--genai-python", metavar="PATH")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    contenders = {
        "engine-recipes": (sys.executable, "ours", given.engine),
        "transformers float32": (sys.executable, "transformers:float32", given.source),
        "transformers bfloat16": (sys.executable, "transformers:bfloat16", given.source),
    }
    children: dict[str, Child] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if given.genai_python:
            built = Path(temporary) / "genai"
            build_genai(given.genai_python, given.source, built)
            contenders["onnxruntime-genai, its builder"] = (given.genai_python, "genai", built)
            contenders["onnxruntime-genai, our engine"] = (given.genai_python, "genai", given.engine)
        try:
            for name, (python, kind, folder) in contenders.items():
                children[name] = Child(python, kind, folder.resolve(), given.threads)
            for number in range(given.rounds + 1):
                for child in children.values():
                    child.turn(given.prompt, given.tokens, keep=number > 0)
        finally:
            for child in children.values():
                child.end()
    print(f"{given.threads} threads, prompt {given.prompt}, {given.tokens} tokens, medians of {given.rounds} rounds\n")
    show(children)


if __name__ == "__main__":
    if "--contender" in sys.argv[1:2]:
        contender(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
