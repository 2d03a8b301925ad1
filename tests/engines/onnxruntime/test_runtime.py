from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowered
import smollm2
import tiny
from engine_recipes import Artifact, Check, RequestError, StageContext, StageFailed, testing
from engine_recipes.tokenizer import Tokenizer, copy_tokenizer
from engine_recipes.types import Sampling
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_engines.lowering.graph import MODEL
from engine_recipes_engines.onnxruntime import runtime as module
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime, choose, cores, spin_microseconds

IDS = np.random.default_rng(2).integers(0, 250, 30).tolist()
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain why the sky is blue, in simple words.",
    "Give me three tips for learning to cook.",
    "def fibonacci(n):",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of a tiny Llama, made once for this file."""
    work = tmp_path_factory.mktemp("engine")
    return lowered.build(lowered.write_lively(work / "hf"), work)


@pytest.fixture
def runtime(folder: Path) -> OnnxRuntime:
    return OnnxRuntime(folder, {})


def test_greedy_takes_the_likeliest_token_each_time(runtime: OnnxRuntime) -> None:
    ids = list(IDS)
    for _ in range(12):
        ids.append(int(runtime.logits(ids)[-1].argmax()))
    assert list(runtime.generate(IDS, Sampling(12))) == ids[30:]


def test_generation_ends_before_a_stop_id(runtime: OnnxRuntime) -> None:
    tokens = list(runtime.generate(IDS, Sampling(12)))
    first = tokens.index(tokens[4])
    assert list(runtime.generate(IDS, Sampling(12), frozenset({tokens[4], 9999}))) == tokens[:first]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_generation_ends_after_max_tokens(runtime: OnnxRuntime, count: int) -> None:
    assert len(list(runtime.generate(IDS, Sampling(count)))) == count


def test_generation_ends_where_the_model_ends(runtime: OnnxRuntime) -> None:
    long = (IDS * 9)[:250]
    assert len(list(runtime.generate(long, Sampling(1000)))) == 7  # 256 places, and the last token needs none


def test_a_seed_makes_sampling_repeatable(runtime: OnnxRuntime) -> None:
    def sample(seed: int, temperature: float = 1.5) -> list[int]:
        return list(runtime.generate(IDS, Sampling(20, temperature, seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(1, 1e-4) == sample(2, 1e-4) == list(runtime.generate(IDS, Sampling(20)))


def test_sampling_follows_the_softmax() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.0, 0.7], np.float32) + 1e-30)
    random = np.random.default_rng(0)
    counts = np.bincount([choose(logits, 1.0, random) for _ in range(4000)], minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.1, 0.2, 0.0, 0.7], atol=0.03)
    flat = np.bincount([choose(logits[[0, 3]], 2.0, random) for _ in range(4000)], minlength=2) / 4000
    np.testing.assert_allclose(flat, np.sqrt([0.1, 0.7]) / np.sqrt([0.1, 0.7]).sum(), atol=0.03)


def test_two_generations_do_not_disturb_each_other(runtime: OnnxRuntime) -> None:
    alone = list(runtime.generate(IDS, Sampling(6))), list(runtime.generate(IDS[::-1], Sampling(6)))
    pairs = list(zip(runtime.generate(IDS, Sampling(6)), runtime.generate(IDS[::-1], Sampling(6)), strict=True))
    assert alone == ([a for a, _ in pairs], [b for _, b in pairs])


def test_long_prompts_are_taken_in_pieces(runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tokens = runtime.logits(IDS), list(runtime.generate(IDS, Sampling(6)))
    monkeypatch.setattr(module, "CHUNK", 7)
    np.testing.assert_allclose(runtime.logits(IDS), whole, atol=1e-4)
    assert list(runtime.generate(IDS, Sampling(6))) == tokens


BATCH = np.random.default_rng(5).integers(0, 250, (4, 30)).tolist()


@pytest.mark.parametrize("chunk", [512, 70, 21])
@pytest.mark.parametrize("sampling", [Sampling(12), Sampling(12, 1.5, seed=3)])
def test_a_batch_gives_what_each_prompt_gives_alone(
    runtime: OnnxRuntime, monkeypatch: pytest.MonkeyPatch, chunk: int, sampling: Sampling
) -> None:
    alone = [list(runtime.generate(prompt, sampling)) for prompt in BATCH]
    assert len({tuple(tokens) for tokens in alone}) == 4
    monkeypatch.setattr(module, "CHUNK", chunk)  # all prompts in one run, two at a time, and in pieces
    steps = list(runtime.generate_batch(BATCH, sampling))
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == alone


def test_a_batch_of_different_lengths_is_refused(runtime: OnnxRuntime) -> None:
    for prompts in ([[1, 2], [3]], []):
        with pytest.raises(RequestError, match="a batch needs prompts of one length"):
            runtime.generate_batch(prompts, Sampling(1))
    with pytest.raises(RequestError, match="token ids from 1 to 256"):
        runtime.generate_batch([[1, 2], [1, 256]], Sampling(1))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt is empty"),
        ([1] * 257, "the prompt has 257 tokens, this engine takes 256"),
        ([1, 256], "token ids from 1 to 256, but the vocabulary is 256"),
        ([-1, 3], "token ids from -1 to 3"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_at_once(runtime: OnnxRuntime, prompt: list[int], message: str) -> None:
    for call in (lambda: runtime.generate(prompt, Sampling(1)), lambda: runtime.logits(prompt)):
        with pytest.raises(RequestError, match=message) as caught:
            call()
        assert caught.value.hint


def test_close_can_be_called_twice(runtime: OnnxRuntime) -> None:
    runtime.close()
    runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.logits([1])


def test_an_engine_that_cannot_be_loaded_is_two_lines(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "engine"
    shutil.copytree(folder, broken)
    (broken / MODEL).write_bytes(b"nonsense")
    with pytest.raises(StageFailed, match=r"cannot load model\.onnx") as caught:
        OnnxRuntime(broken, {})
    assert "\n" not in caught.value.message
    assert caught.value.hint == "build the engine again"
    assert capfd.readouterr().err == ""


def test_threads_are_the_cores_this_process_may_use(folder: Path) -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    program = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
    program += "from engine_recipes_engines.onnxruntime.runtime import cores; print(cores())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    if hasattr(os, "sched_setaffinity"):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.stdout == "1\n", done.stderr
    assert OnnxRuntime(folder, {"threads": 1}).logits([1]).shape == (1, 256)


@pytest.mark.parametrize(("load", "spin"), [(0.1, 1000), (99.0, 50)])
def test_threads_spin_where_cores_are_free(monkeypatch: pytest.MonkeyPatch, load: float, spin: int) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    assert spin_microseconds() == spin


def test_what_is_no_engine_and_a_wrong_option_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no onnxruntime engine"):
        OnnxRuntime(tmp_path, {})
    with pytest.raises(RequestError, match="threads = -1"):
        OnnxRuntime(folder, {"threads": -1})


def checks(folder: Path) -> dict[str, Check]:
    context = StageContext("m:p@onnxruntime", "validate", {}, (Artifact("onnx-engine", folder, "2" * 64),), folder)
    return {check.name: check for check in engine.validate(context)}


def test_a_good_engine_passes_its_checks(folder: Path, tmp_path: Path) -> None:
    with_tokenizer = tmp_path / "engine"
    shutil.copytree(folder, with_tokenizer)
    testing.write_tokenizer(with_tokenizer, 256)
    found = checks(with_tokenizer)
    assert {name: check.verdict for name, check in found.items()} == {
        "engine loads": "pass",
        "logits are finite": "pass",
        "cache agrees with prefill": "pass",
        "tokenizer fits the engine": "pass",
    }
    assert found["cache agrees with prefill"].value < 1e-4
    testing.write_tokenizer(with_tokenizer, 200)
    assert checks(with_tokenizer)["tokenizer fits the engine"].verdict == "warn"


def test_a_missing_tokenizer_is_a_warning_and_one_too_large_a_failure(folder: Path, tmp_path: Path) -> None:
    assert checks(folder)["tokenizer fits the engine"].verdict == "warn"
    larger = tmp_path / "engine"
    shutil.copytree(folder, larger)
    testing.write_tokenizer(larger, 256)
    config = json.loads((larger / "tokenizer.json").read_text())
    config["added_tokens"].append({**config["added_tokens"][0], "id": 256, "content": "<one more>"})
    (larger / "tokenizer.json").write_text(json.dumps(config))
    assert checks(larger)["tokenizer fits the engine"].verdict == "fail"


def test_broken_weights_and_a_broken_cache_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tiny.config("llama")
    arrays = tiny.tensors(settings, seed=3)
    out = lowered.build(tiny.write_tensors(tmp_path / "hf", settings, arrays), tmp_path)
    stepwise = OnnxRuntime.stepwise_logits
    monkeypatch.setattr(OnnxRuntime, "stepwise_logits", lambda self, ids: np.roll(stepwise(self, ids), 1, axis=0))
    assert checks(out)["cache agrees with prefill"].verdict == "fail"
    nan = np.full((1, 256), np.nan, np.float32)
    monkeypatch.setattr(OnnxRuntime, "logits", lambda self, ids: nan)
    found = checks(out)
    assert (found["logits are finite"].verdict, found["logits are finite"].value) == ("fail", 256)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine of SmolLM2-135M-Instruct, float16 weights, with its tokenizer."""
    hf, work = smollm2.folder(), tmp_path_factory.mktemp("smollm2")
    out = lowered.build(hf, work, "float16")
    shutil.rmtree(work / "checkpoint")
    copy_tokenizer(hf, out)
    return out


def test_smollm2_writes_what_transformers_writes(real: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer, runtime = Tokenizer.load(real), OnnxRuntime(real, {})
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32)
    for prompt in PROMPTS:
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]), special=False)
        ours = list(runtime.generate(ids, Sampling(64)))
        with torch.no_grad():  # one pass over all: what it would have chosen after each of our prefixes
            theirs = model(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
        assert len(ours) == 64
        assert ours == theirs
        assert "".join(tokenizer.stream(iter(ours))) == tokenizer.decode(ours)


def test_smollm2_passes_the_engines_own_checks(real: Path) -> None:
    found = checks(real)
    assert all(check.verdict == "pass" for check in found.values()), found
    assert (real / "model.onnx.data").stat().st_size < 275e6  # half of float32, and one table for embedding and head
