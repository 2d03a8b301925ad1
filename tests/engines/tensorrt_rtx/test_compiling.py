"""Real compilations of tiny models; no GPU is needed, and none is used."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine_recipes import MachineError, RequestError, StageFailed, events
from engine_recipes_engines import tensorrt_rtx as engine
from engine_recipes_engines.lowering.graph import Graph
from engine_recipes_engines.tensorrt_rtx import building
from engine_recipes_engines.tensorrt_rtx.compiling import ENGINE
from engine_recipes_engines.tensorrt_rtx.inspection import SETTINGS, constants
from engines.tensorrt_rtx import made
from engines.tensorrt_rtx.made import IDS

pytest.importorskip("tensorrt_rtx")
#: arch, what is changed, the type that its weights have in the engine
BUILDS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {}, "float16"),
    ("qwen2", {"dtype": "bfloat16"}, "bfloat16"),
    ("llama", {"algorithm": "FP8"}, "float8_e4m3fn"),
    ("qwen3", {"algorithm": "FP8", "cache": "FP8", "dtype": "bfloat16"}, "float8_e4m3fn"),
    ("qwen2", {"algorithm": "W4A16_AWQ"}, "int4"),
]


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return found


def failures(folder: Path, work: Path) -> list[str]:
    """Names of the checks that an engine does not pass."""
    stage2 = made.StageContext("m:p@tensorrt-rtx", "stage2", {}, (), folder)
    return [check.name for check in engine.validate(made.validating(stage2, work)) if check.verdict != "pass"]


@pytest.mark.parametrize(("arch", "changes", "dtype"), BUILDS)
def test_an_engine_holds_its_weights_in_their_precision(
    tmp_path: Path, arch: str, changes: dict[str, Any], dtype: str
) -> None:
    stage2 = made.context(tmp_path, arch, **changes)
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        result = engine.stage2(stage2)
    found = settings(stage2.out)
    assert result == {"versions": {"tensorrt-rtx-cu13": found["library"]}}
    assert {path.name for path in stage2.out.iterdir()} == {ENGINE, SETTINGS}
    assert failures(stage2.out, tmp_path / "work") == []
    held = constants(stage2.out / ENGINE)
    assert 1 <= held[dtype] / found["weights"][dtype] < 1.1  # rope tables beside the weights
    if "algorithm" in changes:
        assert held[dtype] == found["weights"][dtype]
    labels = [event["label"] for event in seen if event["event"] == "progress"]
    assert {"lowering", "compiling: optimizing graph", "writing the engine"} <= set(labels)
    warnings = [event["text"] for event in seen if event["event"] == "warn"]
    assert [bool(re.search("16 bits", text)) for text in warnings] == [True] * ("cache" in changes)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> made.StageContext:
    """Stage 2 of a tied FP8 Llama, done, for two targets and two sequences of 128 tokens."""
    work = tmp_path_factory.mktemp("built")
    stage2 = made.context(work, algorithm="FP8", target="sm89+sm120", tie_word_embeddings=True, vocab_size=8192)
    stage2 = made.StageContext(
        stage2.ref, "stage2", {"max_seq_len": 128, "max_batch_size": 2}, stage2.inputs, stage2.out, stage2.target
    )
    engine.stage2(stage2)
    return stage2


def test_one_engine_serves_several_targets_with_one_copy_of_the_weights(built: made.StageContext) -> None:
    found = settings(built.out)
    assert found["targets"] == ["sm89", "sm120"]
    held, table = constants(built.out / ENGINE), 8192 * 64 * 2
    assert held["float8_e4m3fn"] == found["weights"]["float8_e4m3fn"]
    assert table < held["float16"] < 1.1 * table  # the head is the embedding
    assert (built.out / ENGINE).stat().st_size < sum(found["weights"].values()) + 5_000_000


def test_inputs_and_outputs_are_those_that_the_runtime_feeds(built: made.StageContext) -> None:
    found = settings(built.out)
    shapes = {one["name"]: (one["dtype"], one["shape"]) for one in (*found["inputs"], *found["outputs"])}
    assert shapes["input_ids"] == shapes["position_ids"] == ("INT64", [-1, -1])
    assert shapes["write_indices"] == shapes["kv_lengths"] == shapes["logit_indices"] == ("INT64", [-1])
    assert shapes["past_key_values.2.value"] == shapes["present.2.value"] == ("HALF", [-1, 2, 128, 16])
    assert shapes["logits"] == ("FLOAT", [-1, -1, 8192])
    assert (found["max_batch_size"], found["max_seq_len"], found["chunk"]) == (2, 128, 128)


def test_the_engine_does_not_copy_its_cache_for_each_token(built: made.StageContext) -> None:
    plan = (built.out / ENGINE).read_bytes()
    assert b"past_key_values.0.key" in plan
    assert not re.search(rb"name=__myl_Move [^\n]*past_key_values", plan)


def test_simulating_computes_the_graph_of_the_engine(built: made.StageContext, tmp_path: Path) -> None:
    runtime = engine.simulate(made.validating(built, tmp_path / "simulated"))
    assert (runtime.max_seq_len, runtime.vocab_size) == (128, 8192)
    logits = runtime.logits(IDS)
    assert np.isfinite(logits).all()
    assert logits.std() > 1
    runtime.close()


def test_an_engine_in_another_precision_is_found_out(built: made.StageContext, tmp_path: Path) -> None:
    plain = made.context(tmp_path / "plain")
    engine.stage2(plain)
    shutil.copytree(built.out, tmp_path / "engine")
    shutil.copy(plain.out / ENGINE, tmp_path / "engine" / ENGINE)
    assert "layer precisions" in failures(tmp_path / "engine", tmp_path / "work")


def test_an_engine_with_other_inputs_is_found_out(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    found = settings(built.out)
    found["inputs"][0]["dtype"] = "INT32"
    (tmp_path / "engine" / SETTINGS).write_text(json.dumps(found))
    assert failures(tmp_path / "engine", tmp_path / "work") == ["inputs and outputs"]


def test_a_swollen_engine_is_found_out(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    with (tmp_path / "engine" / ENGINE).open("ab") as file:
        file.write(bytes(20_000_000))
    assert failures(tmp_path / "engine", tmp_path / "work") == ["engine size"]


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_damaged_notes_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(StageFailed, match=r"rtx\.json is damaged"):
        failures(tmp_path, tmp_path / "work")


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_lost_engine_is_named(built: made.StageContext, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    damage(tmp_path / "engine" / ENGINE)
    with pytest.raises(StageFailed, match=r"holds no model\.engine"):
        failures(tmp_path / "engine", tmp_path / "work")


def test_an_engine_that_tells_nothing_is_not_judged(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    (tmp_path / "engine" / ENGINE).write_bytes(bytes(1000))
    assert failures(tmp_path / "engine", tmp_path / "work") == ["layer precisions"]


def test_a_target_the_library_does_not_know_is_refused(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path, target="sm90")
    with pytest.raises(RequestError, match="cannot compile for sm90") as caught:
        engine.stage2(stage2)
    assert "known: sm75, sm80" in caught.value.hint
    assert not list(stage2.out.iterdir())


def test_a_refusal_of_the_library_is_told_in_its_own_words(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path, algorithm="FP8", target="sm86")  # which has no FP8
    with pytest.raises(StageFailed, match=r"could not compile the model: .*HW-specific datatypes: fp8") as caught:
        engine.stage2(stage2)
    assert str(caught.value).count("\n") == 1
    assert "fp8" in caught.value.output


def test_a_model_that_the_parser_refuses_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_unknown(weights: Any, folder: Path, *_: Any) -> None:
        with Graph(folder) as graph:
            graph.weight("w", "float32", (1,), [np.zeros(1, np.float32)])
            graph.output(graph.node("NoSuchOperator", [graph.input("x", "float32", ["n"]), "w"], "y"), "float32", ["n"])
            graph.save()

    monkeypatch.setattr(building, "lower", write_unknown)
    with pytest.raises(StageFailed, match=r"could not read the model: y \(NoSuchOperator\): "):
        engine.stage2(made.context(tmp_path))


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path)
    path = stage2.inputs[0].path / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(RequestError) as caught:
        engine.stage2(stage2)
    assert caught.value.hint
    assert not list(stage2.out.iterdir())


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage2 = made.context(tmp_path)
    usage = namedtuple("usage", "total used free")(1 << 30, 1 << 30, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match=r"needs .*, 1.0 kB are free"):
        engine.stage2(stage2)
    assert not list(stage2.out.iterdir())


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_engine_that_cannot_be_written_is_said_by_the_system(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path)
    with files_of_at_most(1_500_000), pytest.raises(OSError, match="File too large") as caught:
        engine.stage2(stage2)
    assert str(caught.value.filename).endswith(ENGINE)
