"""Llama and what shares its code in TensorRT-LLM (Mistral): no biases unless the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, from_hf, hookimpl

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")

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
    """Describe a Llama or Mistral checkpoint.

    Raises:
        RequestError: another architecture or activation, or a sliding window, which the checkpoint format drops.
    """
    decoder = from_hf(config, config=CONFIG)
    if decoder.architecture not in ARCHITECTURES:
        raise RequestError(
            f"{decoder.architecture} is no Llama",
            f"this family knows {' and '.join(ARCHITECTURES)}",
        )
    if decoder.activation != "silu":
        raise RequestError(f"hidden_act is {decoder.activation!r}", "Llama checkpoints with silu are supported")
    if config.get("sliding_window") is not None:
        raise RequestError(
            f"the model attends to a sliding window of {config['sliding_window']} tokens",
            "TensorRT-LLM's checkpoint has no place for it; only models that see all tokens are supported",
        )
    return decoder
