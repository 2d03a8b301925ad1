from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lowered
from engine_recipes import RequestError, StageFailed
from engine_recipes.types import Sampling
from engine_recipes_engines import onnxruntime
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime
from engine_recipes_engines.tensorrt_rtx.runtime import RtxRuntime, simulated
from engines.onnxruntime import quantise
from engines.tensorrt_rtx import standin

IDS = np.random.default_rng(2).integers(0, 250, 30).tolist()
BATCH = np.random.default_rng(5).integers(0, 250, (4, 30)).tolist()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as an onnxruntime engine in `engine`, and lowered for TensorRT-RTX in `rtx`."""
    work = tmp_path_factory.mktemp("work")
    lowered.build(lowered.write_lively(work / "hf"), work, max_seq_len=64)
    standin.lower(work / "checkpoint", work / "rtx")
    return work


@pytest.fixture
def runtime(work: Path) -> RtxRuntime:
    return simulated(work / "rtx", {})


@pytest.mark.parametrize("count", [1, 30, 64])
def test_logits_are_those_of_the_onnxruntime_engine(work: Path, runtime: RtxRuntime, count: int) -> None:
    ids = (IDS * 3)[:count]
    theirs = OnnxRuntime(work / "engine", {}).logits(ids)
    for ours in (runtime.logits(ids), runtime.stepwise_logits(ids)):  # 64 is more than a chunk of 48
        assert ours.shape == (count, 256)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # both float32; they spread by about 1


def test_generation_is_that_of_the_onnxruntime_engine(work: Path, runtime: RtxRuntime) -> None:
    theirs = OnnxRuntime(work / "engine", {})
    for sampling in (Sampling(12), Sampling(12, 1.5, seed=3)):
        assert list(runtime.generate(IDS, sampling)) == list(theirs.generate(IDS, sampling))
        assert [*runtime.generate_batch(BATCH, sampling)] == [*theirs.generate_batch(BATCH, sampling)]


def test_an_fp8_graph_runs_on_a_cpu(tmp_path: Path) -> None:
    source = quantise.load(lowered.write_lively(tmp_path / "hf"))
    stage2 = lowered.context(tmp_path / "hf", tmp_path, dtype="float16", tp_size=1, pp_size=1, target="cpu")
    quantise.quantise(tmp_path / "checkpoint", quantise.calibrate(source, IDS), "FP8", "FP8")
    onnxruntime.stage2(stage2)
    ours = simulated(standin.lower(tmp_path / "checkpoint", tmp_path / "rtx"), {}).logits(IDS)
    # the same numbers are rounded to the same grids; a step of one would move logits by some hundredths
    np.testing.assert_allclose(ours, OnnxRuntime(tmp_path / "engine", {}).logits(IDS), atol=1e-3)


def test_generation_ends_before_a_stop_id_and_where_the_cache_ends(runtime: RtxRuntime) -> None:
    tokens = list(runtime.generate(IDS, Sampling(1000)))
    assert len(tokens) == 35  # 64 places, and the last token needs none
    assert list(runtime.generate(IDS, Sampling(12), frozenset({tokens[4]}))) == tokens[: tokens.index(tokens[4])]
    assert len(list(runtime.generate((IDS * 3)[:64], Sampling(9)))) == 1


@pytest.mark.parametrize("chunk", [1, 7])
def test_prompts_are_fed_in_pieces_that_the_engine_takes(work: Path, tmp_path: Path, chunk: int) -> None:
    shutil.copytree(work / "rtx", tmp_path / "rtx")
    settings = json.loads((tmp_path / "rtx" / "rtx.json").read_text())
    (tmp_path / "rtx" / "rtx.json").write_text(json.dumps({**settings, "chunk": chunk}))
    pieces = simulated(tmp_path / "rtx", {})
    fed: list[int] = []
    run = pieces.session.run
    pieces.session.run = lambda feeds, *rest: (fed.append(feeds["input_ids"].shape[1]), run(feeds, *rest))
    whole = simulated(work / "rtx", {})
    np.testing.assert_allclose(pieces.logits(IDS), whole.logits(IDS), atol=1e-4)
    assert max(fed) == chunk
    assert sum(fed) == 30
    assert [*pieces.generate_batch(BATCH, Sampling(6))] == [*whole.generate_batch(BATCH, Sampling(6))]


def test_generations_do_not_disturb_each_other(runtime: RtxRuntime) -> None:
    alone = list(runtime.generate(IDS, Sampling(6))), list(runtime.generate(IDS[::-1], Sampling(6)))
    pairs = list(zip(runtime.generate(IDS, Sampling(6)), runtime.generate(IDS[::-1], Sampling(6)), strict=True))
    assert alone == ([a for a, _ in pairs], [b for _, b in pairs])


def test_more_sequences_than_the_engine_was_built_for_are_refused(runtime: RtxRuntime) -> None:
    with pytest.raises(RequestError, match="5 sequences at a time, this engine takes 4") as caught:
        runtime.generate_batch([[1]] * 5, Sampling(1))
    assert "build.max_batch_size" in caught.value.hint


def test_prompts_that_do_not_fit_are_refused_at_once(runtime: RtxRuntime) -> None:
    for prompt, message in (([], "empty"), ([1] * 65, "65 tokens, this engine takes 64"), ([256], "ids from 256")):
        with pytest.raises(RequestError, match=message):
            runtime.generate(prompt, Sampling(1))


def test_a_closed_engine_says_so(runtime: RtxRuntime) -> None:
    going = runtime.generate(IDS, Sampling(9))
    next(going)
    runtime.close()
    runtime.close()
    with pytest.raises(ValueError, match="closed"):
        runtime.logits(IDS)
    with pytest.raises(ValueError, match="closed"):
        next(going)


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    for load in (simulated, RtxRuntime):
        with pytest.raises(RequestError, match="holds no tensorrt-rtx engine"):
            load(tmp_path, {})


def test_a_wrong_number_of_threads_is_refused(work: Path) -> None:
    with pytest.raises(RequestError, match="threads = -1"):
        simulated(work / "rtx", {"threads": -1})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"max_batch_size": "one"}', "null"])
def test_damaged_settings_and_graphs_are_two_lines(work: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "rtx.json").write_text(text)
    for load in (simulated, RtxRuntime):
        with pytest.raises(StageFailed, match="is damaged") as caught:
            load(tmp_path, {})
        assert "\n" not in caught.value.message
        assert caught.value.hint == "build the engine again"
    shutil.copy(work / "rtx" / "rtx.json", tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(StageFailed, match="cannot load"):
        simulated(tmp_path, {})
