"""Tiny checkpoints made on the spot: config, seeded weights, tokenizer. Knows no family; only writing needs numpy."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..decoder import Decoder

#: Of `write_tokenizer`: unknown, start and end of text, with the ids 0, 1, 2.
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
#: Of `write_tokenizer`: each message on a line after its role in brackets, `> ` before the answer.
CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
)


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """The `config.json` of a tiny Llama-like model: 2 layers, 4 heads that share 2 key/value heads, 256 words.

    Args:
        architecture: the class name; `model_type` is made from it as transformers does: Qwen2ForCausalLM, `qwen2`.
        changes: keys to add or replace.
    """
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **changes,
    }


def write_checkpoint(folder: Path, config: Mapping[str, Any], decoder: Decoder) -> Path:
    """Write a checkpoint in the Hugging Face layout: seeded random weights, a byte-level tokenizer.

    Args:
        folder: made if it is not there.
        config: goes into `config.json` as it is.
        decoder: what a family says `config` is; its tensors are written, in its dtype. Keep it small.

    Returns:
        The folder, ready for `recipes build ./folder:fp16`.
    """
    import numpy as np

    from ..checkpoint.layout import source_shapes
    from ..checkpoint.safetensors import write

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True), encoding="utf-8")
    shapes = source_shapes(decoder)

    def weights(name: str) -> bytes:
        random = np.random.default_rng(zlib.crc32(name.encode()))
        centre = 1.0 - decoder.norm_offset if len(shapes[name]) == 1 and "norm" in name else 0.0
        return _stored(centre + random.normal(0, 0.05, shapes[name]), decoder.dtype)

    data = ([weights(name)] for name in shapes)
    tensors = {name: (decoder.dtype, shape) for name, shape in shapes.items()}
    for _ in write(folder / "model.safetensors", tensors, data):
        pass
    return write_tokenizer(folder, decoder.vocab_size)


def _stored(values: Any, dtype: str) -> bytes:
    """An array's bytes in a dtype; bfloat16, which numpy does not have, is float32 rounded to its upper half."""
    import numpy as np

    if dtype != "bfloat16":
        return bytes(values.astype(dtype).tobytes())
    bits = values.astype(np.float32).view(np.uint32)
    return bytes(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes())


def write_tokenizer(folder: Path, vocab_size: int = 256) -> Path:
    """Write a byte-level tokenizer of `vocab_size` ids: three special ones, then as many bytes as fit, ASCII first.

    Leaves `tokenizer.json`, `tokenizer_config.json` with a chat template, and `generation_config.json`.
    """
    letters = _byte_letters()
    order = [*range(0x20, 0x7F), 0x0A, *(b for b in range(256) if not 0x20 <= b < 0x7F and b != 0x0A)]
    tokens = [*SPECIAL_TOKENS, *(letters[byte] for byte in order)][:vocab_size]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    special = [
        {"id": i, "content": text, "special": True}
        | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(SPECIAL_TOKENS)
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"},
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    for name, value in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", config),
        ("generation_config.json", {"bos_token_id": 1, "eos_token_id": 2}),
    ):
        (folder / name).write_text(json.dumps(value), encoding="utf-8")
    return folder


def _byte_letters() -> list[str]:
    """GPT-2's 256 printable letters for bytes, by byte (https://github.com/openai/gpt-2, encoder.py)."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters, spare = [], 0x100
    for byte in range(256):
        letters.append(chr(byte) if byte in plain else chr(spare))
        spare += byte not in plain
    return letters
