from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_recipes import RequestError, Sampling, bench, testing
from engine_recipes.bench import Settings, spread
from engine_recipes.types import Provider

SPEEDS = ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second")
PROVIDER = Provider("engine", "sleepy", "acme.sleepy", "acme", "1.0")


class Sleepy:
    """A runtime that takes a known time: for the first token of its first generation, of others, and for each step."""

    def __init__(self, first: float = 0.0, others: float = 0.0, step: float = 0.0, longest: int = 99) -> None:
        self.first, self.others, self.step, self.longest = first, others, step, longest
        self.closed = 0
        self.seen: list[Any] = []

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        time.sleep(self.others if self.seen else self.first)
        self.seen.append(prompt)
        yield 0
        for _ in range(min(sampling.max_tokens, self.longest) - 1):
            time.sleep(self.step)
            yield 0

    def close(self) -> None:
        self.closed += 1


class SleepyBatch(Sleepy):
    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        return ([token] * len(prompts) for token in self.generate(prompts[0], sampling))


class Host:
    """Loads the runtimes it was given, one after the other."""

    def __init__(self, *runtimes: Sleepy) -> None:
        self.left = list(runtimes)
        self.options: list[Any] = []

    def load_engine(self, provider: Provider, folder: Path, options: Any) -> Sleepy:
        self.options.append(options)
        time.sleep(0.02)
        return self.left.pop(0)


def measure(host: Host, settings: Settings, folder: Path = Path()) -> dict[str, Any]:
    return bench.measure(host, PROVIDER, folder, settings, [[1] * settings.prompt_tokens] * settings.batch)  # type: ignore[arg-type]


def test_a_known_time_gives_a_known_speed() -> None:
    runtimes = Sleepy(first=0.6, others=0.05, step=0.01), Sleepy(), Sleepy(), Sleepy()
    found = measure(Host(*runtimes), Settings(prompt_tokens=10, new_tokens=6, warmup=1, repeat=3))
    first, prefill, decode = (found[name] for name in SPEEDS)
    assert 0.05 <= first["min"] <= first["median"] < 0.2
    assert first["max"] < 0.6  # the warm-up does not count
    assert prefill["median"] == pytest.approx(10 / first["median"])
    assert 30 < decode["median"] <= 100  # five tokens after the first, 10 ms each
    assert 0.02 <= found["load_seconds"]["min"] <= found["load_seconds"]["median"] < 0.1


def test_the_first_load_is_measured_and_every_load_is_closed() -> None:
    runtimes = [Sleepy() for _ in range(4)]
    host = Host(*runtimes)
    found = measure(host, Settings(prompt_tokens=2, new_tokens=2, warmup=2, repeat=3, threads=7))
    assert [runtime.closed for runtime in runtimes] == [1, 1, 1, 1]
    assert [len(runtime.seen) for runtime in runtimes] == [5, 0, 0, 0]
    assert host.options == [{"threads": 7}] * 4
    assert found["first_load_seconds"]["iqr"] == 0


def test_a_batch_counts_all_its_tokens() -> None:
    found = measure(Host(SleepyBatch(0.05, 0.05, 0.01), SleepyBatch()), Settings(4, 10, 6, 0, 1))
    assert found["prefill_tokens_per_second"]["median"] == pytest.approx(40 / found["first_token_seconds"]["median"])
    assert 120 < found["decode_tokens_per_second"]["median"] <= 400


def test_an_engine_without_batches_says_so() -> None:
    with pytest.raises(RequestError, match="sleepy generates one sequence at a time") as caught:
        measure(Host(Sleepy()), Settings(batch=2))
    assert caught.value.hint == "leave out --batch"


def test_an_engine_that_ends_early_is_not_measured() -> None:
    with pytest.raises(RequestError, match="sleepy generated 3 of 8 tokens after 5"):
        measure(Host(Sleepy(longest=3)), Settings(prompt_tokens=5, new_tokens=8))


@pytest.mark.parametrize("values", [[3.0], [1.0, 2.0], [5.0, 1.0, 2.0, 9.0, 3.5], [0.1] * 6])
def test_the_spread_is_numpys(values: list[float]) -> None:
    low, middle, high = np.percentile(values, [25, 50, 75])
    wanted = {"median": middle, "min": min(values), "max": max(values), "iqr": high - low}
    assert spread(values) == pytest.approx(wanted)


def test_prompts_are_ordinary_tokens_and_the_same_each_time(tmp_path: Path) -> None:
    testing.write_tokenizer(tmp_path, 40)
    settings = Settings(batch=3, prompt_tokens=200)
    prompts = bench.prompts_for(tmp_path, settings)
    assert prompts == bench.prompts_for(tmp_path, settings)
    assert [len(prompt) for prompt in prompts] == [200] * 3
    assert prompts[0] != prompts[1]
    assert {token for prompt in prompts for token in prompt} == set(range(3, 40))  # 0, 1 and 2 are special


def result(batch: int, value: float) -> dict[str, Any]:
    return {"settings": {"batch": batch}, "metrics": {"load_seconds": spread([value])}, "machine": {"gpus": []}}


def test_an_engine_keeps_the_last_result_of_each_setting_and_no_more_than_ten(tmp_path: Path) -> None:
    assert bench.read(tmp_path) == []
    for batch in range(12):
        bench.keep(tmp_path, result(batch, 1))
    bench.keep(tmp_path, result(5, 2))
    found = bench.read(tmp_path)
    assert [one["settings"]["batch"] for one in found] == [2, 3, 4, 6, 7, 8, 9, 10, 11, 5]
    assert found[-1] == result(5, 2)
    assert json.loads((tmp_path / "bench.json").read_text())["schema"] == 1


@pytest.mark.parametrize("text", ["", "nonsense", "[]", '{"benches": 3}'])
def test_a_damaged_file_of_results_is_replaced(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    assert bench.read(tmp_path) == []
    bench.keep(tmp_path, result(1, 1))
    assert bench.read(tmp_path) == [result(1, 1)]


def test_resident_memory_follows_what_is_used() -> None:
    # in a process of its own: this one may have memory to spare from earlier tests
    lines = [
        "from engine_recipes import bench",
        "before = bench.rss_bytes()",
        "held = bytearray(b'x') * (64 << 20)",
        "print(bench.rss_bytes() - before)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) > 0.9 * (64 << 20)


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": 5},
        {"settings": {"batch": "1"}},
        {"settings": {"batch": {}}},
        {"settings": {"batch": 10**400}},
        {"metrics": 5},
        {"metrics": {"load_seconds": "fast"}},
        {"metrics": {"load_seconds": {"median": 1.0}}},
        {"metrics": {"load_seconds": {**spread([1.0]), "max": None}}},
        {"metrics": {"peak_rss_bytes": math.nan}},
        {"metrics": {"load_seconds": {**spread([1.0]), "iqr": math.inf}}},
        {"machine": None},
        {"machine": {"gpus": None}},
        {"machine": {"gpus": [], "load_average": math.nan}},
        {"machine": {"gpus": [], "cpu": "\ud800"}},
    ],
)
def test_a_damaged_result_is_left_out_and_the_others_stay(tmp_path: Path, changes: dict[str, Any]) -> None:
    good = result(1, 1)
    (tmp_path / "bench.json").write_text(json.dumps({"benches": [{**good, **changes}, good, 5, {}, None]}))
    assert bench.read(tmp_path) == [good]
