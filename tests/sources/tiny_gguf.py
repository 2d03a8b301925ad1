"""Tiny GGUF files: seeded weights, a byte-level vocabulary, made with gguf's own writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type, GGUFWriter, quants

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = ["Ġt", "he", "Ġthe", "12"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(256 - len(plain))]


def weights(tied: bool, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """Float32 tensors in Hugging Face order and shape, by GGUF name."""
    random = np.random.RandomState(7)
    vocabulary = len(SPECIAL) + 256 + len(WORDS) + 1
    kv = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (vocabulary, HIDDEN)
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HIDDEN, HIDDEN),
            "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN),
            "attn_output.weight": (HIDDEN, HIDDEN),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            block |= {"attn_q.bias": (HIDDEN,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {name: random.standard_normal(shape).astype(np.float32) * 0.1 for name, shape in shapes.items()}


def permute(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of Llama: LlamaModel.permute in convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def kind_of(name: str, mixed: bool) -> Type:
    """A mixture of every type the tests are about; norms and biases are float32, as everywhere."""
    if not mixed or "norm" in name or name.endswith("bias"):
        return Type.F32
    kinds = {
        "token_embd": Type.Q8_0,
        "attn_q": Type.Q4_1,
        "attn_k": Type.Q8_0,
        "ffn_up": Type.F16,
        "ffn_down": Type.Q4_1,
    }
    return kinds.get(name.split(".")[-2], Type.F32)


def write(
    path: Path,
    architecture: str = "llama",
    *,
    tied: bool = True,
    mixed: bool = True,
    pre: str = "smollm",
    changes: Mapping[str, Any] | None = None,
    extra_tensor: str | None = None,
) -> dict[str, np.ndarray[Any, Any]]:
    """Write the file; returns the float32 weights it was made from, in Hugging Face order.

    `changes` replaces metadata by key (without `general.` keys); a value of None leaves the key out.
    """
    tensors = weights(tied, architecture)
    writer = GGUFWriter(path, architecture)
    for key, value in {**_metadata(architecture, pre), **(changes or {})}.items():
        _add(writer, key, value)
    for name, weight in tensors.items():
        stored = weight
        if architecture == "llama" and ".attn_q." in name:
            stored = permute(weight, HEADS)
        if architecture == "llama" and ".attn_k." in name:
            stored = permute(weight, KV_HEADS)
        kind = kind_of(name, mixed)
        writer.add_tensor(name, quants.quantize(stored, kind), raw_dtype=kind)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _metadata(architecture: str, pre: str) -> dict[str, Any]:
    tokens = [*SPECIAL, *byte_alphabet(), *WORDS, "[PAD0]"]
    return {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": HIDDEN,
        f"{architecture}.feed_forward_length": INNER,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.rope.freq_base": 100000.0,
        f"{architecture}.rope.dimension_count": HIDDEN // HEADS,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (256 + len(WORDS)) + [5],
        "tokenizer.ggml.merges": ["Ġ t", "h e", "Ġt he", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
