"""The graph that TensorRT-RTX compiles, computed by onnxruntime and compared with this project's onnxruntime engine,
which is compared with transformers and ModelOpt elsewhere. The two share the order of pieces, and no operator."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import lowered
import tiny
from engine_recipes import Decoder, RequestError, StageContext, checkpoint
from engine_recipes_engines import onnxruntime as other, tensorrt_rtx as engine
from engine_recipes_engines.lowering.graph import DATA, MODEL, numpy_dtype
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime
from engine_recipes_engines.tensorrt_rtx.lowering import check_model, lower
from engine_recipes_engines.tensorrt_rtx.quantized import check_algorithms
from engines.tensorrt_rtx import made
from engines.tensorrt_rtx.made import IDS
from test_rope import LLAMA3, YARN

MAX = 64
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "bf16": {"dtype": "bfloat16"},
    "fp8": {"algorithm": "FP8"},
    "fp8 and its cache": {"algorithm": "FP8", "cache": "FP8"},
    "int8 cache": {"cache": "INT8"},
    "int4-awq": {"algorithm": "W4A16_AWQ"},
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one key head": {"num_key_value_heads": 1},
    "head size of its own": {"head_dim": 32},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "yarn rope": {"rope_scaling": YARN},
    "partial rope": {"arch": "partial"},
    "little partial rope": {"arch": "partial", "partial_rotary_factor": 0.25},
}


class Graph:
    """The lowered checkpoint on a CPU, in float32. Every step takes the caches and gives new ones."""

    def __init__(self, stage2: StageContext) -> None:
        folder = stage2.out.parent / "graph"
        folder.mkdir()
        with checkpoint.open_checkpoint(stage2.inputs[0].path) as weights:
            check_algorithms(weights)
            lower(weights, folder, "float32", MAX)
            self.decoder = weights.decoder
        self.session = session(folder)
        self.past = [i.name for i in self.session.get_inputs() if i.name.startswith("past")]
        self.outputs = [name.replace("past_key_values", "present") for name in self.past] + ["logits"]

    def empty(self, batch: int) -> list[np.ndarray]:
        shape = (batch, self.decoder.kv_heads, MAX, self.decoder.head_size)
        return [np.zeros(shape, np.float32) for _ in self.past]

    def step(
        self, caches: list[np.ndarray], ids: list[list[int]], before: list[int], wanted: list[int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Logits [B, len(wanted), vocabulary], and the caches after."""
        starts, count = np.array(before), len(ids[0])
        feeds = {
            "input_ids": np.array(ids),
            "position_ids": starts[:, None] + np.arange(count),
            "write_indices": starts,
            "kv_lengths": starts + count,
            "logit_indices": np.array(wanted),
        }
        *caches, logits = self.session.run(self.outputs, feeds | dict(zip(self.past, caches, strict=True)))
        return logits, caches

    def whole(self) -> np.ndarray:
        return self.step(self.empty(1), [IDS], [0], list(range(len(IDS))))[0][0]

    def stepwise(self) -> np.ndarray:
        """A prompt of 8, then one token at a time."""
        logits, caches = self.step(self.empty(1), [IDS[:8]], [0], list(range(8)))
        rows = [logits[0]]
        for place in range(8, len(IDS)):
            logits, caches = self.step(caches, [[IDS[place]]], [place], [0])
            rows.append(logits[0])
        return np.concatenate(rows)


def theirs(stage2: StageContext) -> np.ndarray:
    """Logits of the onnxruntime engine of the same checkpoint."""
    other.stage2(replace(stage2, target="cpu"))
    return OnnxRuntime(stage2.out, {}).logits(IDS)


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma"])
def test_the_graph_computes_what_the_onnxruntime_engine_does(tmp_path: Path, arch: str, precision: str) -> None:
    stage2 = made.context(tmp_path, arch, **PRECISIONS[precision])
    graph, expected = Graph(stage2), theirs(stage2)
    assert expected.std() > 1
    # Both round to the same numbers. A value that lies within 1e-7 of a boundary may fall to its other side, and one
    # such step moves all later layers: far less than the rounding as a whole, which is 0.02 to 0.2 here.
    most = 0.01 if "8" in precision else 1e-5
    assert rms(graph.whole() - expected) < most
    assert rms(graph.stepwise() - expected) < most


def feeds(decoder: Decoder, dtype: str) -> dict[str, np.ndarray]:
    """All of IDS at once, with empty caches of this type."""
    count = len(IDS)
    cache = np.zeros((1, decoder.kv_heads, MAX, decoder.head_size), numpy_dtype(dtype))
    names = [f"past_key_values.{layer}.{what}" for layer in range(decoder.layers) for what in ("key", "value")]
    return {
        "input_ids": np.array([IDS]),
        "position_ids": np.arange(count)[None],
        "write_indices": np.array([0]),
        "kv_lengths": np.array([count]),
        "logit_indices": np.arange(count),
        **dict.fromkeys(names, cache),
    }


def compared(stage2: StageContext) -> tuple[float, float, float]:
    """How far from each other, in standard deviations of the logits: the graph in half precision, which is compiled
    (by ONNX's own reference), and the one in float32; the former and the one that rounds; the two latter."""
    found = []
    with checkpoint.open_checkpoint(stage2.inputs[0].path) as weights:
        half, decoder = weights.dtype, weights.decoder
        for compute, rounded in ((half, None), ("float32", None), ("float32", half)):
            folder = stage2.out / f"{compute}.{rounded}"
            folder.mkdir()
            lower(weights, folder, compute, MAX, rounded)
            given = feeds(decoder, compute)
            if compute == half:
                (logits,) = ReferenceEvaluator(str(folder / MODEL)).run(["logits"], given)
            else:
                logits = session(folder).run(["logits"], given)[0]
            found.append(np.asarray(logits, np.float32))
    compiled, plain, rounding = found
    pairs = ((compiled, plain), (compiled, rounding), (plain, rounding))
    return tuple(rms(one - other) / plain.std() for one, other in pairs)  # type: ignore[return-value]


def session(folder: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # or it makes integer products of FP8
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("arch", "precision"), [("llama", "fp16"), ("llama", "bf16"), ("llama", "int4-awq"), ("gemma", "fp16")]
)
def test_the_graph_that_is_compiled_computes_what_is_simulated(tmp_path: Path, arch: str, precision: str) -> None:
    lost, apart, simulated = compared(made.context(tmp_path, arch, **PRECISIONS[precision]))
    most = 0.08 if precision == "bf16" else 0.01  # bfloat16 has 3 bits less
    assert max(lost, apart) < most
    # much as is lost there, though not the same: the reference rounds within attention, too
    assert 0.25 < simulated / lost < 2


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_is_computed_alike(tmp_path: Path, name: str) -> None:
    stage2 = made.context(tmp_path, **MODELS[name])
    np.testing.assert_allclose(Graph(stage2).whole(), theirs(stage2), atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "fp8 and its cache", "int4-awq"])
def test_sequences_of_different_lengths_share_a_step(tmp_path: Path, precision: str) -> None:
    graph = Graph(made.context(tmp_path, "qwen3", **PRECISIONS[precision]))
    # the second prompt has 5 tokens; what follows them is padding, which the next step overwrites
    prompts, more = [IDS[:8], [*IDS[8:13], 0, 0, 0]], [IDS[20:23], IDS[30:33]]
    _, both = graph.step(graph.empty(2), prompts, [0, 0], [7])
    found, _ = graph.step(both, more, [8, 5], [0, 1, 2])
    for row, used in enumerate([8, 5]):
        _, alone = graph.step(graph.empty(1), [prompts[row][:used]], [0], [0])
        expected, _ = graph.step(alone, [more[row]], [used], [0, 1, 2])
        np.testing.assert_allclose(found[row], expected[0], atol=0.01 if "8" in precision else 1e-4)


def test_only_the_wanted_positions_get_logits(tmp_path: Path) -> None:
    graph = Graph(made.context(tmp_path))
    found, _ = graph.step(graph.empty(1), [IDS], [0], [39, 3])
    np.testing.assert_allclose(found[0], graph.whole()[[39, 3]], atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_graph_is_standard_onnx(tmp_path: Path, precision: str) -> None:
    stage2 = made.context(tmp_path, "qwen3", **PRECISIONS[precision])
    with checkpoint.open_checkpoint(stage2.inputs[0].path) as weights:
        lower(weights, tmp_path, weights.dtype, MAX)
    onnx.checker.check_model(str(tmp_path / MODEL), full_check=True)
    model = onnx.load(tmp_path / MODEL, load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    assert {node.domain for node in model.graph.node} == {""}


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        work = tmp_path / str(tied)
        stage2 = made.context(work, tie_word_embeddings=tied, vocab_size=2048)
        with checkpoint.open_checkpoint(stage2.inputs[0].path) as weights:
            lower(weights, work, "float16", MAX)
        sizes.append((work / DATA).stat().st_size)
    assert sizes[1] - sizes[0] == 2048 * 64 * 2


def test_the_cache_is_as_long_as_the_model_but_at_most_4096(tmp_path: Path) -> None:
    decoder = lowered.describe(tiny.write(tmp_path / "hf"))
    assert check_model(decoder, 0) == 256
    long = replace(decoder, max_positions=131072)
    assert check_model(long, 0) == 4096
    assert check_model(long, 8192) == 8192


@pytest.mark.parametrize(
    ("changes", "options", "target", "message"),
    [
        ({}, {"max_seq_len": 300}, "sm89", "max_seq_len = 300, but the model is meant for sequences of up to 256"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "sm89", "cannot do rope scaling 'dynamic'"),
        ({}, {}, "sm89+sm90+sm100", "cannot compile for sm90, sm100"),
    ],
)
def test_what_it_cannot_do_is_refused_before_long_work(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], target: str, message: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    decoder = lowered.describe(tiny.write(tmp_path / "hf", **changes))
    with pytest.raises(RequestError, match=message) as caught:
        engine.check_decoder(StageContext("m:p@tensorrt-rtx", "stage2", options, (), tmp_path, target), decoder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("algorithm", "cache", "group", "message"),
    [
        ("W8A16", None, 64, "cannot lower quant_algo W8A16"),
        ("FP8", "NVFP4", 64, "cannot lower kv_cache_quant_algo NVFP4"),
        ("W4A16_AWQ", None, 32, "W4A16_AWQ in groups of 32"),
    ],
)
def test_an_algorithm_it_does_not_know_is_refused(
    tmp_path: Path, algorithm: str, cache: str | None, group: int, message: str
) -> None:
    stage2 = made.context(tmp_path)
    path = stage2.inputs[0].path / "config.json"
    text = path.read_text()
    config = {"quant_algo": algorithm, "kv_cache_quant_algo": cache, "group_size": group}
    path.write_text(lowered.json.dumps(lowered.json.loads(text) | {"quantization": config}))
    with (
        checkpoint.open_checkpoint(stage2.inputs[0].path) as weights,
        pytest.raises(RequestError, match=message),
    ):
        check_algorithms(weights)
