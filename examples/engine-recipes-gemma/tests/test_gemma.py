"""Run with engine-recipes[cpu] and this package installed: `pip install '.[test]' && pytest`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from engine_recipes_gemma.family import resolve_checkpoint

import engine_recipes
from engine_recipes import RequestError, checkpoint, testing

CONFIG: dict[str, Any] = testing.tiny_config(
    "GemmaForCausalLM", hidden_act="gelu_pytorch_tanh", num_key_value_heads=1, tie_word_embeddings=True
)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RECIPES_WORKSPACE", str(tmp_path / "workspace"))
    return testing.write_checkpoint(tmp_path / "tiny-gemma", CONFIG, resolve_checkpoint(CONFIG))


@testing.conformance("engine-recipes-gemma", configs={"gemma": [CONFIG]})
def test_conformance(case: testing.Case) -> None:
    case()


def test_what_differs_from_llama_is_described() -> None:
    decoder = resolve_checkpoint(CONFIG)
    assert decoder.embedding_scale == math.sqrt(128)
    assert decoder.norm_offset == 1
    assert decoder.activation == "gelu_pytorch_tanh"
    assert decoder.tied


def test_early_configs_say_gelu_and_mean_its_approximation() -> None:
    early = {key: value for key, value in CONFIG.items() if key not in ("tie_word_embeddings", "head_dim")}
    decoder = resolve_checkpoint({**early, "hidden_act": "gelu", "hidden_activation": None})
    assert decoder.activation == "gelu_pytorch_tanh"
    assert decoder.tied
    assert decoder.head_size == 256


@pytest.mark.parametrize("precision", ["fp8", "int4-awq"])
def test_it_is_calibrated_and_quantised(model: Path, precision: str) -> None:
    """What is measured is measured on the model as it runs: with scaled embeddings and norms around 1."""
    pytest.importorskip("modelopt")
    settings = {"calib.size": 4, "calib.seq_len": 64}
    build = engine_recipes.build(f"{model}:{precision}@onnxruntime", settings=settings)  # judged against transformers
    (stage1,) = [stage for stage in build.stages if stage.name == "stage1"]
    with checkpoint.open_checkpoint(stage1.path) as weights:
        norm = weights.array("transformer.layers.0.input_layernorm.weight").astype("float32")
        assert weights.decoder.embedding_scale == math.sqrt(128)
    assert abs(norm.mean() - 1) < 0.1
    assert build.report.verdict == "pass", build.report
    assert build.report.metrics["mean_kl"] < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma2ForCausalLM"]}, "Gemma2ForCausalLM is no first-generation Gemma"),
        ({"hidden_activation": "silu"}, "hidden_act is 'silu'"),
        ({"tie_word_embeddings": False}, "a head of its own"),
        ({"partial_rotary_factor": 0.5}, "rotated in part"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_size": "128"}, "hidden_size is '128'"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        resolve_checkpoint({**CONFIG, **changes})
    assert caught.value.hint
