"""Small checkpoint folders, written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from engine_recipes.checkpoint import safetensors

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
}
SHAPES = {
    "model.embed_tokens.weight": (32, 16),
    "model.norm.weight": (16,),
    "model.layers.0.input_layernorm.weight": (16,),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.k_proj.weight": (8, 16),
    "model.layers.0.self_attn.v_proj.weight": (8, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.post_attention_layernorm.weight": (16,),
    "model.layers.0.mlp.gate_proj.weight": (32, 16),
    "model.layers.0.mlp.up_proj.weight": (32, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 32),
}


def tiny_checkpoint(folder: Path, shards: int = 1) -> Path:
    """config.json, tokenizer.json and weights in one file, or in several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    if shards == 1:
        weights(folder / "model.safetensors", list(SHAPES))
        return folder
    where = {}
    for n in range(shards):
        file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
        names = list(SHAPES)[n::shards]
        weights(folder / file, names)
        where.update(dict.fromkeys(names, file))
    total = sum(2 * math.prod(shape) for shape in SHAPES.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights(path: Path, names: list[str]) -> None:
    """A safetensors file with some of SHAPES."""
    random = np.random.RandomState(len(names))
    arrays = {name: random.standard_normal(SHAPES[name]).astype(np.float16) for name in names}
    shapes = {name: ("float16", array.shape) for name, array in arrays.items()}
    for _ in safetensors.write(path, shapes, ([array] for array in arrays.values())):
        pass
