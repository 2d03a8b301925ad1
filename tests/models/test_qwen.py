from __future__ import annotations

from typing import Any

import pytest

import tiny
from engine_recipes import RequestError
from engine_recipes_models import qwen


def test_qwen2_has_biases_on_q_k_and_v_that_its_config_does_not_mention() -> None:
    decoder = qwen.resolve_checkpoint(tiny.config("qwen2"))
    assert decoder.qkv_bias
    assert not (decoder.dense_bias or decoder.mlp_bias or decoder.qk_norm)
    assert decoder.config["qwen_type"] == "qwen2"


def test_qwen3_has_norms_and_its_own_head_size() -> None:
    decoder = qwen.resolve_checkpoint(tiny.config("qwen3"))
    assert decoder.qk_norm
    assert not decoder.qkv_bias
    assert decoder.head_size == 32 != decoder.hidden_size // decoder.heads
    assert decoder.config["qwen_type"] == "qwen3"


@pytest.mark.parametrize(
    ("arch", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128}, "sliding_window = 128"),
        ("qwen2", {"mlp_bias": True}, "mlp_bias is on"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen2", {"num_experts": 60}, "num_experts = 60: a mixture of experts"),
        ("qwen2", {"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM is no dense Qwen2 or Qwen3"),
        ("qwen2", {"architectures": []}, "architectures"),
        ("qwen2", {"quantization_config": {"quant_method": "awq"}}, "already quantized"),
        ("qwen3", {"attention_bias": True}, "adds a bias to the attention's output"),
    ],
)
def test_other_models_are_refused(arch: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        qwen.resolve_checkpoint(tiny.config(arch, **changes))
    assert caught.value.hint


def test_a_window_that_is_off_is_no_window() -> None:
    assert qwen.resolve_checkpoint(tiny.config("qwen2", sliding_window=4096)).qkv_bias
