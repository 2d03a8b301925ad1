"""The decoder before it is compiled, against transformers' with the same weights, in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from engine_recipes_aotinductor.model import Model
from transformers import AutoConfig, AutoModelForCausalLM

from engine_recipes import Decoder, from_hf, testing

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": testing.tiny_config(),
    "llama with biases and a scaled rope": testing.tiny_config(
        attention_bias=True, mlp_bias=True, rope_scaling=LLAMA3, num_key_value_heads=4
    ),
    "qwen2": testing.tiny_config("Qwen2ForCausalLM", tie_word_embeddings=True),
    "qwen3": testing.tiny_config("Qwen3ForCausalLM", head_dim=64),
    "gemma": testing.tiny_config("GemmaForCausalLM", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "phi3": testing.tiny_config("Phi3ForCausalLM", partial_rotary_factor=0.5, pad_token_id=0),
}


def describe(config: dict[str, Any]) -> Decoder:
    """What the model's family would say."""
    kind = config["model_type"]
    if kind == "gemma":
        return from_hf(config, embedding_scale=math.sqrt(config["hidden_size"]))
    if kind == "qwen2":
        return from_hf(config, qkv_bias=True)
    return from_hf(config, qk_norm=kind == "qwen3")


def in_hf_names(weights: dict[str, torch.Tensor], d: Decoder, kind: str) -> dict[str, torch.Tensor]:
    """A model's weights as transformers names them."""
    found = {}
    widths = [d.heads * d.head_size, d.kv_heads * d.head_size, d.kv_heads * d.head_size]
    renamed = {"attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj", "mlp.fc": "mlp.gate_proj"}
    renamed |= {"mlp.gate": "mlp.up_proj", "post_layernorm": "post_attention_layernorm"}
    renamed |= {f"attention.{part}_layernorm": f"self_attn.{part}_norm" for part in "qk"}
    tops = {"vocab_embedding": "embed_tokens", "ln_f": "norm"}
    for name, weight in weights.items():
        module, _, leaf = name.removeprefix("transformer.").rpartition(".")
        norm = module.endswith(("layernorm", "ln_f"))
        value = weight - 1 if norm and kind == "gemma" else weight
        if module.endswith("attention.qkv"):
            at = f"model.{module.removesuffix('attention.qkv')}self_attn."
            parts = {f"{at}{part}_proj.{leaf}": rows for part, rows in zip("qkv", weight.split(widths), strict=True)}
            found.update({f"{at}qkv_proj.{leaf}": weight} if kind == "phi3" else parts)
            continue
        for ours, theirs in renamed.items():
            if module.endswith(ours):
                module = module.removesuffix(ours) + theirs
                break
        found[f"{'' if module == 'lm_head' else 'model.'}{tops.get(module, module)}.{leaf}"] = value
    if kind == "phi3":
        for layer in range(d.layers):
            at = f"model.layers.{layer}.mlp."
            halves = [found.pop(f"{at}{part}_proj.weight") for part in ("gate", "up")]
            found[f"{at}gate_up_proj.weight"] = torch.cat(halves)
    return found


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_the_decoder_is_the_model_that_transformers_runs(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    d = describe(config)
    model = Model(d, 64, d.tied).eval()
    for name, weight in model.named_parameters():
        weight.normal_(1.0 if "norm" in name or "ln_f" in name else 0.0, 0.1)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    theirs.load_state_dict(in_hf_names(dict(model.named_parameters()), d, config["model_type"]), strict=not d.tied)

    ids = torch.randint(0, d.vocab_size, (2, 20))
    row = (2, d.kv_heads, d.head_size)
    buffers = [(torch.empty(20, *row), torch.empty(20, *row)) for _ in range(d.layers)]
    found = []
    for start, end in ((0, 9), (9, 10), (10, 20)):  # a prompt, a step, and many tokens after others
        cache = [(keys[:end], values[:end]) for keys, values in buffers]
        new = end - start
        found.append(model(ids[:, start:end], torch.arange(start, end), torch.arange(new), cache))
    expected = theirs(ids).logits
    error = (torch.cat(found, 1) - expected).square().mean().sqrt() / expected.std()
    assert error < 1e-5
