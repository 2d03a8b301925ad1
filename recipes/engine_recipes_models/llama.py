"""Llama: the common case, no biases unless the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, from_hf, hookimpl

#: What TensorRT-LLM's LLaMAConfig writes beyond the keys of every decoder. Neutral values: plain Llama.
CONFIG = {
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
    """Describe a Llama checkpoint.

    Raises:
        RequestError: an activation that Llama does not have.
    """
    decoder = from_hf(config, config=CONFIG)
    if decoder.activation != "silu":
        raise RequestError(f"hidden_act is {decoder.activation!r}", "Llama checkpoints with silu are supported")
    return decoder
