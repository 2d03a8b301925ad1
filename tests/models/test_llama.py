from __future__ import annotations

from typing import Any

import pytest

import tiny
from engine_recipes import RequestError
from engine_recipes_models import llama


def test_describes_a_llama() -> None:
    decoder = llama.resolve_checkpoint(tiny.config(num_hidden_layers=2, rope_theta=500000.0, pretraining_tp=2))
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_size) == (2, 4, 2, 16)
    assert decoder.rope_theta == 500000.0
    assert not (decoder.qkv_bias or decoder.dense_bias or decoder.mlp_bias or decoder.qk_norm)


def test_biases_are_as_the_config_says() -> None:
    decoder = llama.resolve_checkpoint(tiny.config(attention_bias=True, mlp_bias=True))
    assert decoder.qkv_bias and decoder.dense_bias and decoder.mlp_bias


def test_the_rope_settings_of_transformers_5() -> None:
    config = tiny.config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    del config["rope_theta"], config["rope_scaling"]
    decoder = llama.resolve_checkpoint(config)
    assert (decoder.rope_theta, decoder.rope_scaling) == (500000.0, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantized \(quantization_config, fp8\)"),
        ({"num_local_experts": 8}, "num_local_experts = 8: a mixture of experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor leaves 8 elements of each head"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "leaves 8 elements of each head"),
        ({"partial_rotary_factor": 0.2}, "3 of each head's 16 elements"),
        ({"partial_rotary_factor": 1.5}, "a share of each head"),
        ({"rope_theta": None}, "gives no rope base"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llama.resolve_checkpoint(tiny.config(**changes))
    assert caught.value.hint
