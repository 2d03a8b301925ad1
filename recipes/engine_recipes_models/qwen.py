"""Qwen2, Qwen2.5 (q, k and v have biases) and Qwen3 (they have norms over each head instead), dense models only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, from_hf, hookimpl

#: How the architectures differ.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
}

#: What TensorRT-LLM's QWenConfig writes beyond the keys of every decoder; it fails without the last two.
CONFIG = {
    "num_labels": 1,
    "use_logn_attn": False,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "moe": {"normalization_mode": 0},
    "moe_intermediate_size": 0,
    "moe_shared_expert_intermediate_size": 0,
    "seq_length": 8192,
}


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe a Qwen2 or Qwen3 checkpoint.

    Raises:
        RequestError: another architecture, activation or rope, or a part that TensorRT-LLM's Qwen has no place for.
    """
    _refuse(config)
    differences = next((same for name, same in ARCHITECTURES.items() if config.get("architectures") == [name]), {})
    family = {**CONFIG, "qwen_type": config.get("model_type")}
    decoder = from_hf(config, **differences, dense_bias=False, mlp_bias=False, config=family)
    if decoder.architecture not in ARCHITECTURES:
        raise RequestError(
            f"{decoder.architecture} is no dense Qwen2 or Qwen3", f"this family knows {' and '.join(ARCHITECTURES)}"
        )
    if decoder.activation != "silu":
        raise RequestError(f"hidden_act is {decoder.activation!r}", "Qwen checkpoints with silu are supported")
    if decoder.rotary_size:
        raise RequestError(
            f"partial_rotary_factor leaves {decoder.head_size - decoder.rotary_size} elements of each head unrotated",
            "Qwen2 and Qwen3 rotate whole heads; is this another family?",
        )
    return decoder


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("mlp_bias"):
        raise RequestError("mlp_bias is on", "Qwen models have no biases in the MLP; is this another family?")
    qwen3 = config.get("architectures") == ["Qwen3ForCausalLM"]
    if qwen3 and config.get("attention_bias"):
        raise RequestError(
            "attention_bias is on, which adds a bias to the attention's output",
            "TensorRT-LLM's Qwen has no place for that bias; published Qwen3 models have it off",
        )
