"""What is mended in the network that the real parser makes; and what is done where it makes another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from engine_recipes import StageFailed, checkpoint, events
from engine_recipes_engines.lowering.graph import MODEL
from engine_recipes_engines.tensorrt_rtx import compiling
from engine_recipes_engines.tensorrt_rtx.logging import NOISE, logger
from engine_recipes_engines.tensorrt_rtx.lowering import lower
from engine_recipes_engines.tensorrt_rtx.network import attentions, feed_from_cache
from engines.tensorrt_rtx import made

trt = pytest.importorskip("tensorrt_rtx")
LAYERS = 3


@contextmanager
def parsed(work: Path, change: Any = None, **kinds: Any) -> Iterator[Any]:
    """The network of a tiny model; `change` is what is done to its graph before."""
    stage2 = made.context(work, **kinds)
    with checkpoint.open_checkpoint(stage2.inputs[0].path) as weights:
        lower(weights, work, weights.dtype, 64)
    if change:
        model = onnx.load(work / MODEL, load_external_data=False)
        change({node.name: node for node in model.graph.node})
        onnx.save(model, work / MODEL)
    log = logger(trt, NOISE)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    with compiling._Weights(work) as held:
        parser = trt.OnnxParser(network, log)
        assert held.give(parser), compiling._complaints(parser)
        yield network


def warnings(network: Any) -> list[str]:
    seen: list[dict[str, Any]] = []
    with events.sink(seen.append):
        feed_from_cache(trt, network, LAYERS)
    return [event["text"] for event in seen if event["event"] == "warn"]


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"arch": "qwen3", "algorithm": "FP8", "cache": "FP8", "dtype": "bfloat16"},
        {"arch": "qwen2", "algorithm": "W4A16_AWQ"},
    ],
    ids=["fp16", "bf16 and fp8", "int4-awq"],
)
def test_every_attention_reads_the_cache_itself(tmp_path: Path, kinds: dict[str, Any]) -> None:
    with parsed(tmp_path, **kinds) as network:
        assert warnings(network) == []
        found = list(attentions(trt, network))
        assert [one.get_input(1).name for one in found] == [f"present.{n}.key" for n in range(LAYERS)]
        scaled = [f"transformer.layers.{n}.attention.scaled" for n in range(LAYERS)]
        assert [one.get_input(0).name for one in found] == scaled
        assert all(one.decomposable for one in found)


def test_keys_that_are_really_scaled_stay_so(tmp_path: Path) -> None:
    def scale(nodes: dict[str, Any]) -> None:
        (factor,) = nodes["transformer.layers.1.attention.by_head"].attribute
        factor.f = 0.25

    with parsed(tmp_path, scale) as network:
        before = [one.get_input(1).name for one in attentions(trt, network)]
        assert ["1 of 3 layers will copy" in text for text in warnings(network)] == [True]
        after = [one.get_input(1).name for one in attentions(trt, network)]
        assert after == ["present.0.key", before[1], "present.2.key"]


def test_keys_of_another_layer_are_told(tmp_path: Path) -> None:
    def take_another(nodes: dict[str, Any]) -> None:
        nodes["transformer.layers.1.attention.by_head"].input[1] = "present.0.key"

    with parsed(tmp_path, take_another) as network:
        assert len(warnings(network)) == 1


def test_a_lost_mask_is_refused(tmp_path: Path) -> None:
    def unmask(nodes: dict[str, Any]) -> None:
        del nodes["transformer.layers.0.attention.by_head"].input[3]

    with parsed(tmp_path, unmask) as network, pytest.raises(StageFailed, match="lost the mask of attention 0"):
        feed_from_cache(trt, network, LAYERS)


def test_attentions_that_the_parser_took_apart_are_refused() -> None:
    network: Any = SimpleNamespace(num_layers=0)
    with pytest.raises(StageFailed, match="found 0 attentions in a model of 3 layers"):
        feed_from_cache(trt, network, LAYERS)
