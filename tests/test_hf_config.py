"""What a config.json says and no field of a decoder can hold is refused, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

import tiny
from engine_recipes import RequestError, from_hf

#: Of published models, by the architecture that has them (llama: 4 heads of 16 elements, 3 layers, 256 positions).
MEANT: list[dict[str, Any]] = [
    {"attention_multiplier": 0.015625},  # Granite
    {"residual_multiplier": 0.22},
    {"embedding_multiplier": 12.0},
    {"logits_scaling": 8.0},
    {"logit_scale": 0.0625},  # Cohere
    {"scale_emb": 12},  # MiniCPM
    {"scale_depth": 1.4},
    {"dim_model_base": 256},
    {"final_logit_softcapping": 30.0},  # Gemma 2
    {"attn_logit_softcapping": 50.0},
    {"query_pre_attn_scalar": 256},
    {"no_rope_layers": [1, 1, 0]},  # SmolLM3
    {"no_rope_layer_interval": 3},
    {"layer_types": ["full_attention", "linear_attention", "full_attention"]},
    {"sliding_window": 128},  # Mistral 0.1
    {"sliding_window": 128, "layer_types": ["sliding_attention"] * 3},
    {"sliding_window": 128, "use_sliding_window": True},  # Qwen2
    {"use_parallel_residual": True},
    {"clip_qkv": 8.0},  # OLMo
    {"use_qk_norm": True},
    {"kv_lora_rank": 512},  # DeepSeek
]
#: The same keys where they say what every decoder does.
HARMLESS: list[dict[str, Any]] = [
    {"attention_multiplier": 0.25, "residual_multiplier": 1, "embedding_multiplier": 1.0, "logits_scaling": 1},
    {"attention_multiplier": None, "final_logit_softcapping": None, "clip_qkv": None, "kv_lora_rank": None},
    {"query_pre_attn_scalar": 16, "dim_model_base": 64},
    {"no_rope_layers": [1, 1, 1], "no_rope_layer_interval": 3},  # the list counts
    {"no_rope_layer_interval": 4},
    {"layer_types": ["full_attention"] * 3, "sliding_window": 128},
    {"sliding_window": 256},
    {"sliding_window": 128, "use_sliding_window": False},
    {"use_parallel_residual": False, "use_qk_norm": False},
]


@pytest.mark.parametrize("changes", MEANT, ids=str)
def test_what_engines_would_leave_out_is_refused(changes: dict[str, Any]) -> None:
    config = tiny.config("llama", **changes)
    if "use_sliding_window" not in changes:
        config.pop("use_sliding_window", None)
    with pytest.raises(RequestError) as caught:
        from_hf(config)
    assert any(key in caught.value.message for key in changes)
    assert caught.value.hint


@pytest.mark.parametrize("changes", MEANT, ids=str)
def test_a_family_may_say_that_it_has_dealt_with_them(changes: dict[str, Any]) -> None:
    assert from_hf(tiny.config("llama", **changes), handled=changes).layers == 3


@pytest.mark.parametrize("changes", HARMLESS, ids=str)
def test_what_changes_nothing_is_let_through(changes: dict[str, Any]) -> None:
    assert from_hf(tiny.config("llama", **changes)) == from_hf(tiny.config("llama"))


@pytest.mark.parametrize("value", ["x", [], {}, True, float("nan")], ids=str)
@pytest.mark.parametrize("key", ["attention_multiplier", "sliding_window", "no_rope_layers", "layer_types"])
def test_nonsense_is_no_traceback(key: str, value: object) -> None:
    try:
        from_hf(tiny.config("llama", **{key: value}))
    except RequestError as error:
        assert key in error.message


def test_longrope_keeps_the_length_that_phi_3_says_beside_it() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    decoder = from_hf(tiny.config("llama", rope_scaling=scaling, original_max_position_embeddings=64))
    assert decoder.rope_scaling == {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(RequestError, match="no original_max_position_embeddings"):
        from_hf(tiny.config("llama", rope_scaling=scaling))


def test_a_field_that_is_misspelt_is_named() -> None:
    with pytest.raises(RequestError, match="no field qkv_bais") as caught:
        from_hf(tiny.config("llama"), qkv_bais=True)
    assert "qkv_bias" in caught.value.hint


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"desne": "model.layers.{}.o"}, "there is no role 'desne'"),
        ({"dense": "model.layers.0.o"}, "dense is 'model.layers.0.o'"),
        ({"dense": "model.layers.{x}.o"}, "dense is 'model.layers.{x}.o'"),
        ({"dense": "model.{}.layers.{}.o"}, "dense is"),
        ({"dense": 3}, "dense is 3"),
        ({"dense": "model.layers.{}.o.weight"}, "dense is model.layers.{}.o.weight"),
        ({"final_norm": "model.{}.norm.weight"}, "final_norm is"),
        ({"q": "model.layers.{}.x", "down": "model.layers.{}.x"}, "q and down are both"),
    ],
)
def test_names_of_tensors_are_checked(names: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        from_hf(tiny.config("llama"), names=names)
    assert message in caught.value.message
    assert caught.value.hint
