"""Real compilations of tiny models; no GPU is needed, and none is used."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowered
import tiny
from engine_recipes import MachineError, RequestError, StageFailed, events
from engine_recipes_engines import tensorrt_rtx as engine
from engine_recipes_engines.lowering.graph import DATA, Graph
from engine_recipes_engines.tensorrt_rtx import building, compiling
from engine_recipes_engines.tensorrt_rtx.compiling import ENGINE
from engine_recipes_engines.tensorrt_rtx.inspection import constants
from engine_recipes_engines.tensorrt_rtx.network import profile
from engine_recipes_engines.tensorrt_rtx.runtime import RtxRuntime
from engine_recipes_engines.tensorrt_rtx.settings import SETTINGS
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
    ("gemma", {"dtype": "bfloat16"}, "bfloat16"),
    ("partial", {}, "float16"),
]


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return found


def failures(stage2: made.StageContext, work: Path, folder: Path | None = None) -> list[str]:
    """Names of the checks that an engine does not pass; that of `folder`, if there is one. There is no tokenizer."""
    checks = engine.validate(made.validating(replace(stage2, out=folder or stage2.out), work))
    return [check.name for check in checks if check.verdict != "pass" and check.name != "tokenizer fits the engine"]


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
    assert failures(stage2, tmp_path / "work") == []
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
    assert (found["bytes"], found["sha256"]) == (
        (built.out / ENGINE).stat().st_size,
        hashlib.sha256((built.out / ENGINE).read_bytes()).hexdigest(),
    )


def test_several_sequences_share_a_step(tmp_path: Path) -> None:
    assert chunks(tmp_path, 128, 1) == (1, 128)
    assert chunks(tmp_path, 128, 8) == (8, 64)
    assert chunks(tmp_path, 8, 8) == (8, 8)
    assert chunks(tmp_path, 128, 1000) == (1000, 1)


def chunks(work: Path, length: int, batch: int) -> tuple[int, int]:
    """Most sequences of an engine, and most tokens of each: as noted, and as the library is told."""
    stage2 = made.context(work / f"{length}.{batch}", num_hidden_layers=1)
    told: dict[str, list[int]] = {}

    def tell(builder: Any, network: Any, most: Any) -> Any:
        made = profile(builder, network, most)
        for name in (network.get_input(index).name for index in range(network.num_inputs)):
            told[name] = list(made.get_shape(name)[2])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "profile", tell)
        engine.stage2(replace(stage2, options={"max_seq_len": length, "max_batch_size": batch}))
    found = settings(stage2.out)
    most, chunk = found["max_batch_size"], found["chunk"]
    assert told["input_ids"] == told["position_ids"] == [most, chunk]
    assert told["write_indices"] == told["kv_lengths"] == [most]
    assert told["logit_indices"] == [chunk]
    assert told["past_key_values.0.key"] == [most, 2, length, 16]
    return most, chunk


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


IDENTITY = "engine is the one that was compiled"


@pytest.mark.parametrize(
    "damage",
    [
        lambda plan: plan[: int(len(plan) * 0.99)],
        lambda plan: plan[: len(plan) // 2] + bytes([plan[len(plan) // 2] ^ 1]) + plan[len(plan) // 2 + 1 :],
        lambda plan: plan[: len(plan) // 3] + bytes(len(plan) // 3) + plan[len(plan) // 3 * 2 :],
        lambda plan: bytes(len(plan)),
        lambda plan: plan + bytes(20_000_000),
    ],
    ids=["cut", "flipped", "zeros in the middle", "zeros", "swollen"],
)
def test_an_engine_that_was_changed_since_is_found_out(built: made.StageContext, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    (tmp_path / "engine" / ENGINE).write_bytes(damage((built.out / ENGINE).read_bytes()))
    assert IDENTITY in failures(built, tmp_path / "work", tmp_path / "engine")


def test_the_engine_of_another_model_is_found_out(tmp_path: Path) -> None:
    first, second = (made.context(tmp_path / str(base), rope_theta=base) for base in (1e4, 1e5))
    for stage2 in (first, second):
        engine.stage2(stage2)
    shutil.copy(second.out / ENGINE, first.out / ENGINE)  # of the same sizes
    assert failures(first, tmp_path / "work") == [IDENTITY]


def test_an_engine_in_another_precision_is_found_out(built: made.StageContext, tmp_path: Path) -> None:
    plain = made.context(tmp_path / "plain")
    engine.stage2(plain)
    found = settings(built.out)
    for name in ("weights", "cache_rounding"):  # what was asked for; all else is noted of the engine
        note(plain.out, **{name: found[name]})
    assert "layer precisions" in failures(plain, tmp_path / "work")


def note(folder: Path, **changes: Any) -> None:
    """Change the notes beside an engine."""
    (folder / SETTINGS).write_text(json.dumps({**settings(folder), **changes}))


@pytest.mark.parametrize("factor", [0.5, 0.98, 1.02, 2])
def test_an_engine_holds_each_quantised_weight_once(built: made.StageContext, tmp_path: Path, factor: float) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    weights = settings(built.out)["weights"]
    weights["float8_e4m3fn"] = int(weights["float8_e4m3fn"] / factor)
    note(tmp_path / "engine", weights=weights)
    assert failures(built, tmp_path / "work", tmp_path / "engine") == ["layer precisions"]


def test_an_engine_with_other_inputs_is_found_out(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    inputs = settings(built.out)["inputs"]
    inputs[0]["dtype"] = "INT32"
    note(tmp_path / "engine", inputs=inputs)
    assert failures(built, tmp_path / "work", tmp_path / "engine") == ["inputs and outputs"]


def test_a_large_engine_is_told(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    plan = (built.out / ENGINE).read_bytes() + bytes(20_000_000)
    (tmp_path / "engine" / ENGINE).write_bytes(plan)
    note(tmp_path / "engine", bytes=len(plan), sha256=hashlib.sha256(plan).hexdigest())
    assert failures(built, tmp_path / "work", tmp_path / "engine") == ["engine size"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_lost_engine_is_named(built: made.StageContext, tmp_path: Path, damage: Any) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    damage(tmp_path / "engine" / ENGINE)
    with pytest.raises(StageFailed, match=r"holds no model\.engine"):
        failures(built, tmp_path / "work", tmp_path / "engine")


def test_precisions_of_an_engine_that_tells_nothing_are_not_judged(built: made.StageContext, tmp_path: Path) -> None:
    shutil.copytree(built.out, tmp_path / "engine")
    (tmp_path / "engine" / ENGINE).write_bytes(bytes(1000))
    note(tmp_path / "engine", bytes=1000, sha256=hashlib.sha256(bytes(1000)).hexdigest(), constants={})
    assert failures(built, tmp_path / "work", tmp_path / "engine") == ["layer precisions"]


def test_without_the_checkpoint_the_numbers_are_not_judged(built: made.StageContext, tmp_path: Path) -> None:
    assert failures(replace(built, inputs=()), tmp_path / "work") == ["logits are finite"]


def loud(folder: Path) -> Path:
    """A tiny model whose weights are numbers of float16, and whose activations are too large for it."""
    config = tiny.config("llama")
    arrays = tiny.tensors(config)
    for name, array in arrays.items():
        if array.ndim == 2:
            arrays[name] = (array.astype(np.float32) * (480_000 if "down_proj" in name else 4)).astype(array.dtype)
    assert max(np.abs(array.astype(np.float32)).max() for array in arrays.values()) < 65504
    return tiny.write_tensors(folder, config, arrays)


@pytest.mark.parametrize(("dtype", "failing"), [("float16", ["logits are finite"]), ("bfloat16", [])])
def test_an_engine_whose_numbers_overflow_is_found_out(tmp_path: Path, dtype: str, failing: list[str]) -> None:
    hf = loud(tmp_path / "hf")
    stage2 = lowered.context(hf, tmp_path, dtype=dtype, tp_size=1, pp_size=1, target="sm89")
    engine.stage2(stage2)
    assert failures(stage2, tmp_path / "work") == failing


def test_a_wrong_cache_is_found_out(built: made.StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepwise = RtxRuntime.stepwise_logits

    def forgetful(self: RtxRuntime, ids: list[int]) -> np.ndarray:
        return np.concatenate([stepwise(self, [token]) for token in ids])  # every step with an empty cache

    monkeypatch.setattr(RtxRuntime, "stepwise_logits", forgetful)
    assert failures(built, tmp_path / "work") == ["cache agrees with prefill"]


def test_validating_uses_what_was_simulated_a_moment_ago(
    built: made.StageContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validating = made.validating(built, tmp_path / "work")
    engine.simulate(validating).close()
    monkeypatch.setattr(building, "lower", None)
    verdicts = {check.name: check.verdict for check in engine.validate(validating)}
    assert verdicts["logits are finite"] == verdicts["cache agrees with prefill"] == "pass"
    assert verdicts["tokenizer fits the engine"] == "warn"  # there is none


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
    assert "another precision, or another --target" in caught.value.hint
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
    with pytest.raises(StageFailed, match=r"could not read the model: y \(NoSuchOperator\): ") as caught:
        engine.stage2(made.context(tmp_path))
    assert "the checkpoint may be damaged" in caught.value.hint


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


@pytest.mark.parametrize(("size", "name"), [(1_500_000, ENGINE), (60_000, DATA)])
def test_what_cannot_be_written_is_said_by_the_system_and_named(tmp_path: Path, size: int, name: str) -> None:
    stage2 = made.context(tmp_path)
    with files_of_at_most(size), pytest.raises(OSError, match="File too large") as caught:
        engine.stage2(stage2)
    assert str(caught.value.filename).endswith(name)


def test_a_float32_checkpoint_is_refused_with_what_can_be_done_here(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="computes in half precision") as caught:
        engine.stage2(made.context(tmp_path, dtype="float32"))
    assert caught.value.hint == "build it with a float16 or bfloat16 checkpoint"


def test_a_checkpoint_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path)
    path = stage2.inputs[0].path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 100}))
    with pytest.raises(RequestError, match=r"mlp\.fc\.weight is \[192, 64\], config.json says \[100, 64\]"):
        engine.stage2(stage2)
    assert not list(stage2.out.iterdir())


def test_what_a_compilation_always_says_is_kept_from_the_user(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        engine.stage2(made.context(tmp_path))
    said = [event["text"] for event in seen if event["event"] in ("log", "warn")]
    assert [text for text in said if "Int64 binding" in text or "CUDA" in text] == []
