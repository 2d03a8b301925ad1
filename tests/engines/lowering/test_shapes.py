from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import lowered
from engine_recipes import Artifact, RequestError, StageContext, checkpoint
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_engines.lowering.shapes import check_shapes
from engines.tensorrt_rtx import made


def check(folder: Path, **changes: Any) -> None:
    """As if config.json had said so."""
    path = folder / "config.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), **changes}))
    try:
        with checkpoint.open_checkpoint(folder) as weights:
            check_shapes(weights)
    finally:
        path.write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3: 256 words, hidden 64, 4 heads of 16, 2 key heads, 192 inside."""
    work = tmp_path_factory.mktemp("checkpoint")
    return made.context(work, "qwen3", vocab_size=256, head_dim=16).inputs[0].path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 300}, r"vocab_embedding\.weight is \[256, 64\], config.json says \[300, 64\]"),
        ({"intermediate_size": 100}, r"mlp\.fc\.weight is \[192, 64\], config.json says \[100, 64\]"),
        ({"num_key_value_heads": 4}, r"attention\.qkv\.weight is \[128, 64\], config.json says \[192, 64\]"),
        ({"num_attention_heads": 8}, r"attention\.qkv\.weight is \[128, 64\], config.json says \[192, 64\]"),
        ({"hidden_size": 128}, r"attention\.qkv\.weight is \[128, 64\], config.json says \[128, 128\]"),
        ({"head_size": 32}, r"attention\.qkv\.weight is \[128, 64\], config.json says \[256, 64\]"),
    ],
)
def test_a_config_that_disagrees_with_the_tensors_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        check(folder, **changes)
    assert caught.value.hint == "copy or build the checkpoint again"


def test_head_and_embedding_may_be_padded(folder: Path) -> None:
    check(folder)
    check(folder, vocab_size=250)


def test_the_vocabulary_of_awq_may_count_the_padding_of_the_head(tmp_path: Path) -> None:
    folder = made.context(tmp_path, algorithm="W4A16_AWQ", vocab_size=256).inputs[0].path
    check(folder)
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    with pytest.raises(RequestError, match=r"lm_head\.weight is \[256, 64\], config.json says \[300, 64\]"):
        check(folder, vocab_size=300)
    with pytest.raises(RequestError, match=r"vocab_embedding\.weight is \[256, 64\], config.json says \[337, 64\]"):
        check(folder, vocab_size=400)
    with pytest.raises(RequestError, match=r"qkv\.weights_scaling_factor is \[128, 1\]"):
        check(folder, quantization={**quantization, "group_size": 32})


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2)])
def test_a_split_checkpoint_is_looked_at_as_one(tmp_path: Path, tp_size: int, pp_size: int) -> None:
    hf = lowered.write_lively(tmp_path / "hf", "qwen2", num_hidden_layers=2)
    stage2 = lowered.context(hf, tmp_path, dtype="float16", tp_size=tp_size, pp_size=pp_size, target="cpu")
    check(stage2.inputs[0].path)


def test_the_onnxruntime_engine_refuses_it_before_it_writes(tmp_path: Path) -> None:
    stage2 = made.context(tmp_path)
    path = stage2.inputs[0].path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 100}))
    inputs = (Artifact("trtllm-checkpoint", path.parent, "1" * 64),)
    with pytest.raises(RequestError, match=r"mlp\.fc\.weight"):
        engine.stage2(StageContext("m:p@onnxruntime", "stage2", {}, inputs, stage2.out, "cpu"))
    assert not list(stage2.out.iterdir())
