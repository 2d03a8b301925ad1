"""A family for the tiny models whose decoder differs from Llama's (`tiny.DIFFERENT`), and what transformers makes of
them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_recipes import Decoder, from_hf


def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe one of them."""
    if config["architectures"] != ["GemmaForCausalLM"]:
        return from_hf(config)
    family = {"share_embedding_table": True, "inter_layernorms": False, "use_parallel_embedding": True}
    return from_hf(config, embedding_scale=math.sqrt(config["hidden_size"]), norm_offset=1.0, config=family)


def model(hf: Path) -> Any:
    """transformers' model with the folder's weights, in float32."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.from_pretrained(hf)
    if settings.model_type != "phi3":
        return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    made = AutoModelForCausalLM.from_config(settings).float()
    found = {name: weight.float() for name, weight in load_file(hf / "model.safetensors").items()}
    for layer in range(settings.num_hidden_layers):
        at = f"model.layers.{layer}."
        for fused, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
            block = fused.partition(".")[0]
            weights = [found.pop(f"{at}{block}.{part}_proj.weight") for part in parts]
            found[f"{at}{fused}_proj.weight"] = torch.cat(weights)
    made.load_state_dict(found)
    return made.eval()
