"""The Mistral family: a Llama decoder by another class name. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, from_hf, hookimpl

#: What NVIDIA's converter writes for LLaMA-type models beside the common keys, with the values of a dense model.
CHECKPOINT_CONFIG: Mapping[str, Any] = {
    "residual_mlp": False,
    "remove_duplicated_kv_heads": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "output_multiplier_scale": 1.0,
    "has_partial_lora_mask": False,
}


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe a Mistral checkpoint; refuse a sliding window, which the checkpoint format does not carry."""
    window = config.get("sliding_window")
    if window and window < config.get("max_position_embeddings", 0):
        raise RequestError(
            f"this Mistral attends over a sliding window of {window} tokens, which engines would ignore",
            "use a version without one (v0.2 or newer), or set max_position_embeddings to the window",
        )
    return from_hf(config, qkv_bias=False, dense_bias=False, config=CHECKPOINT_CONFIG)
