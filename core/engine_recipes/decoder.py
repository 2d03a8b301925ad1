"""What a decoder-only language model *is*, as data: heads, rope, norms, biases, tying.

A family builds it from a Hugging Face config (`from_hf`); converters and engines read it. Knows no family, no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from .errors import RequestError

#: What JSON holds: objects, lists, text, numbers, true, false, null.
Json = Any

#: How the Hugging Face layout that most decoders share names its tensors, by role. `{}` is the layer.
#: A family that differs passes its own entries to `from_hf(names=…)`. Of q, k, v, and of gate, up, those that have one
#: name are one tensor, their rows one after another in this order (Phi-3's `qkv_proj`, `gate_up_proj`).
HF_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "input_norm": "model.layers.{}.input_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj",
    "k": "model.layers.{}.self_attn.k_proj",
    "v": "model.layers.{}.self_attn.v_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "dense": "model.layers.{}.self_attn.o_proj",
    "post_norm": "model.layers.{}.post_attention_layernorm.weight",
    "gate": "model.layers.{}.mlp.gate_proj",
    "up": "model.layers.{}.mlp.up_proj",
    "down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}

#: Roles of the linear layers of a decoder layer that read the same input, see `Decoder.names`. They may be one tensor.
SAME_INPUT = (("q", "k", "v"), ("dense",), ("gate", "up"), ("down",))

#: Of the fields that hold one value, by annotation.
_TYPES: Mapping[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


@dataclass(frozen=True)
class Decoder:
    """A decoder-only transformer: grouped-query attention with rope, gated MLP, RMS norms before each block.

    Attributes:
        architecture: the checkpoint's own class name, `LlamaForCausalLM`.
        vocab_size, hidden_size, intermediate_size: widths, in elements.
        layers: number of blocks.
        heads, kv_heads: query heads and key/value heads; heads is a multiple of kv_heads.
        head_size: elements of one head. Not always hidden_size / heads.
        max_positions: longest sequence the rope settings are meant for, in tokens.
        activation: Hugging Face name, `silu` or `gelu_pytorch_tanh`; an engine may know fewer, or more.
        norm_epsilon: added to the mean square inside each RMS norm.
        rope_theta: base of the rotary frequencies (`rotary_base` in TensorRT-LLM).
        rope_scaling: as in the Hugging Face config with `rope_type` named, or None.
        qkv_bias, dense_bias, mlp_bias: which linear layers have a bias.
        qk_norm: RMS norm over each head of q and k, before rope.
        tied: the output head is the embedding table.
        dtype: of the source weights: `float32`, `float16`, `bfloat16`.
        embedding_scale: rows of the embedding table are multiplied by it; the head that shares the table is not.
        norm_offset: what the RMS norms add to their stored weights, 1 for those that learn what differs from 1. It is
            added when a checkpoint is made: a checkpoint's own norms are plain, and its decoder says 0.
        rotary_size: how many elements of each head, its first, rope rotates; even. 0: all. See `rotated`.
        names: Hugging Face tensor names by role, see HF_NAMES.
        config: keys this family adds to TensorRT-LLM's config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    max_positions: int
    activation: str
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Mapping[str, Json] | None = None
    qkv_bias: bool = False
    dense_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    dtype: str = "bfloat16"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    rotary_size: int = 0
    names: Mapping[str, str] = field(default_factory=lambda: dict(HF_NAMES))
    config: Mapping[str, Json] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Number of weights, the tied head counted once."""
        q, kv, h, m = (
            self.heads * self.head_size,
            self.kv_heads * self.head_size,
            self.hidden_size,
            self.intermediate_size,
        )
        attention = (q + 2 * kv) * (h + self.qkv_bias) + q * h + h * self.dense_bias + 2 * self.head_size * self.qk_norm
        mlp = 3 * h * m + (2 * m + h) * self.mlp_bias
        tables = self.vocab_size * h * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * h) + tables + h

    @property
    def rotated(self) -> int:
        """How many elements of each head rope rotates; never 0."""
        return self.rotary_size or self.head_size

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Decoder:
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def check(decoder: Decoder) -> None:
    """Refuse what is no decoder: a family's module may pass anything, and it would fail far from there.

    Raises:
        RequestError: a value has the wrong type, or the numbers contradict each other.
    """
    _check_names(decoder.names)
    for one in fields(decoder):
        value = getattr(decoder, one.name)
        kinds = _TYPES.get(one.type)
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds) or value == ""):
            raise RequestError(
                f"the decoder's {one.name} is {shortened(value)}",
                f"{one.type} is needed: config.json is wrong, or what this family makes of it",
            )
    d = decoder
    if d.heads % d.kv_heads:
        raise RequestError(
            f"{d.heads} attention heads cannot share {d.kv_heads} key/value heads",
            "config.json is wrong or damaged",
        )
    if d.head_size % 2:
        raise RequestError(f"rope needs an even head size, this is {d.head_size}", "config.json is wrong or damaged")
    if not (0 <= d.rotary_size <= d.head_size) or d.rotary_size % 2:
        raise RequestError(
            f"rope is to rotate {shortened(d.rotary_size)} of each head's {d.head_size} elements",
            "an even number, at most all of them, is needed",
        )
    if not 0 < d.embedding_scale < 1e300 or not abs(d.norm_offset) < 1e300:
        raise RequestError(
            f"embedding_scale is {shortened(d.embedding_scale)} and norm_offset {shortened(d.norm_offset)}",
            "finite numbers are needed, the scale above 0",
        )
    if d.dtype not in ("float32", "float16", "bfloat16"):
        raise RequestError(
            f"weights of dtype {shortened(d.dtype)}", "convert the source to float32, float16 or bfloat16 first"
        )


def _check_names(names: Mapping[str, Any]) -> None:
    """That each role names one tensor of each layer, or of the model, and no two name the same but fused ones."""
    for role, name in names.items():
        usual = HF_NAMES.get(role)
        if usual is None:
            raise RequestError(
                f"names of tensors: there is no role {shortened(role)}", f"roles are {', '.join(HF_NAMES)}"
            )
        layers = usual.count("{}")
        if not isinstance(name, str) or not name or (name.count("{}"), name.count("{")) != (layers, layers):
            raise RequestError(
                f"names of tensors: {role} is {shortened(name)}",
                f"one name is needed, {'with {} for the layer' if layers else 'of no layer'}, as {usual}",
            )
        if not usual.endswith(".weight") and name.endswith(".weight"):
            raise RequestError(
                f"names of tensors: {role} is {name}", "a linear layer is named without .weight: it may have a .bias"
            )
    for name in set(names.values()):
        roles = [role for role in names if names[role] == name]
        if len(roles) > 1 and not any(set(roles) <= set(fused) for fused in SAME_INPUT):
            raise RequestError(
                f"names of tensors: {' and '.join(roles)} are both {name}",
                "one tensor may hold q, k and v, or gate and up, and nothing else",
            )
