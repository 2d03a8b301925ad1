"""Tiny seeded Hugging Face checkpoints, bit for bit the same everywhere: integer arithmetic and numpy only.

`write(folder, "qwen2", num_hidden_layers=1)` leaves `config.json` and safetensors in `folder`. `GOLDEN` names the
models whose conversion by NVIDIA's code is recorded in `tests/data/golden`. Every weight is
`(randint(0, 65536) - 32768) / 2**19` from numpy's frozen MT19937 stream, seeded by the tensor's name; norms add 1,
but for Gemma's, which add it when they run.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SEED = 20260701
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

_COMMON = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 176,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256,
}
_QWEN2 = {
    **_COMMON,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "max_window_layers": 3,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 301,
}
_QWEN3 = {
    **_QWEN2,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 32,
    "rope_scaling": None,
    "vocab_size": 300,
}
#: A tiny model's `config.json` by architecture, for `write`.
CONFIGS: dict[str, dict[str, Any]] = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}
_GEMMA = {
    **_COMMON,
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "head_dim": 32,
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 256,
}
#: Rope turns half of each head. transformers' Phi3 has this decoder, and stores its weights fused.
_PARTIAL = {
    **_LLAMA,
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "head_dim": 32,
    "hidden_size": 128,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
}
#: Models whose decoder differs from Llama's, see `different.resolve_checkpoint`.
DIFFERENT: dict[str, dict[str, Any]] = {"gemma": _GEMMA, "partial": _PARTIAL}
#: Golden model -> (architecture, changes to its config, number of shards).
GOLDEN: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama_gqa_untied": ("llama", {"rope_theta": 500000.0, "num_hidden_layers": 4}, 2),
    "tinyllama_32_4": (
        "llama",
        {
            "hidden_size": 128,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "intermediate_size": 352,
            "num_hidden_layers": 2,
        },
        2,
    ),
    "qwen2_untied": ("qwen2", {}, 2),
    "qwen3_untied": ("qwen3", {}, 1),
}


def config(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model. `changes` replace keys."""
    return {**CONFIGS, **DIFFERENT}[arch] | changes


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order in which they are written."""
    kind, hidden = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    inner, vocab = config["intermediate_size"], config["vocab_size"]
    attention_bias = config.get("attention_bias", False)
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", heads * size), ("k", kv_heads * size), ("v", kv_heads * size)):
            found[f"{layer}self_attn.{name}_proj.weight"] = (rows, hidden)
            if kind == "qwen2" or attention_bias:
                found[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        found[layer + "self_attn.o_proj.weight"] = (hidden, heads * size)
        if kind != "qwen2" and attention_bias:
            found[layer + "self_attn.o_proj.bias"] = (hidden,)
        if kind == "qwen3":
            found[layer + "self_attn.q_norm.weight"] = (size,)
            found[layer + "self_attn.k_norm.weight"] = (size,)
        found[layer + "post_attention_layernorm.weight"] = (hidden,)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            found[f"{layer}mlp.{name}_proj.weight"] = shape
            if config.get("mlp_bias"):
                found[f"{layer}mlp.{name}_proj.bias"] = shape[:1]
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    return found


def tensor(name: str, shape: tuple[int, ...], dtype: str, seed: int = SEED, centre: float = 1) -> np.ndarray[Any, Any]:
    """One seeded tensor, |value| <= 1/16 (norm weights: centre + value), rounded to `dtype` to nearest even."""
    stream = np.random.RandomState(zlib.crc32(f"{seed}:{name}".encode()))
    integers = stream.randint(0, 65536, size=shape, dtype=np.int64) - 32768
    value = integers.astype(np.float32) / np.float32(2**19)
    if name.endswith("norm.weight"):
        value = np.float32(centre) + value
    return np.ascontiguousarray(value).astype(getattr(ml_dtypes, dtype, dtype))


def tensors(config: dict[str, Any], seed: int = SEED) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a config, in the dtype that it names."""
    dtype, centre = config["torch_dtype"], 0 if config["model_type"] == "gemma" else 1
    return {name: tensor(name, shape, dtype, seed, centre) for name, shape in shapes(config).items()}


def save(path: Path, arrays: dict[str, np.ndarray[Any, Any]]) -> Path:
    """Write a safetensors file without the code under test."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, array in arrays.items():
        end = position + array.nbytes
        header[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(array.tobytes() for array in arrays.values()))
    return path


def write(
    folder: Path, arch: str = "llama", *, shards: int = 1, dtype: str | None = None, seed: int = SEED, **changes: Any
) -> Path:
    """Write a checkpoint folder in the Hugging Face layout and return it.

    Args:
        folder: made if needed.
        arch: a key of CONFIGS or DIFFERENT.
        shards: number of weight files; above 1 there is a `model.safetensors.index.json`.
        dtype: of the weights, `bfloat16` unless said.
        seed: of the weights.
        changes: keys of config.json to replace, `num_hidden_layers=1`.
    """
    settings = config(arch, **changes, **({"torch_dtype": dtype} if dtype else {}))
    return write_tensors(folder, settings, tensors(settings, seed), shards)


def write_tensors(
    folder: Path, settings: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]], shards: int = 1
) -> Path:
    """Write these arrays with this config.json; `write` for tests that change tensors first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if shards == 1:
        save(folder / "model.safetensors", arrays)
        return folder
    names, weight_map = list(arrays), {}
    step = math.ceil(len(names) / shards)
    for shard in range(shards):
        part = names[shard * step : (shard + 1) * step]
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save(folder / file, {name: arrays[name] for name in part})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_golden(folder: Path, name: str) -> Path:
    """Write the source checkpoint of a golden model."""
    arch, changes, shards = GOLDEN[name]
    return write(folder, arch, shards=shards, **changes)
