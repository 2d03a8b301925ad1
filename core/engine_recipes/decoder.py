"""What a decoder-only language model *is*, as data: heads, rope, norms, biases, tying.

A family builds it from a Hugging Face config; converters and engines read it. Knows no family and no engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from .errors import RequestError

Json = Any

#: How the Hugging Face layout that most decoders share names its tensors, by role. `{}` is the layer.
#: A family that differs passes its own entries to `from_hf(names=…)`.
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

#: Rope scalings that TensorRT-LLM accepts; `default` is not one of them and is written as null.
ROPE_SCALINGS = ("linear", "dynamic", "longrope", "llama3", "yarn", "mrope")

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


def from_hf(config: Mapping[str, Json], /, **differences: Any) -> Decoder:
    """Describe a Hugging Face decoder. A family passes only the fields in which it differs.

    Args:
        config: the parsed `config.json`, in the layout of transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`).
        differences: fields of Decoder that this config does not say in the common way; `names` is merged
            over HF_NAMES.

    Raises:
        RequestError: a key is missing, of the wrong type, or the numbers contradict each other.
    """
    _refuse(config)
    heads = _integer(config, "num_attention_heads")
    hidden = _integer(config, "hidden_size")
    head_size = _integer(config, "head_dim", hidden // heads)
    theta, scaling = rope_settings(config)
    described: dict[str, Any] = {
        "architecture": architecture_of(config),
        "vocab_size": _integer(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _integer(config, "intermediate_size"),
        "layers": _integer(config, "num_hidden_layers"),
        "heads": heads,
        "kv_heads": _integer(config, "num_key_value_heads", heads),
        "head_size": head_size,
        "max_positions": _integer(config, "max_position_embeddings"),
        "activation": config.get("hidden_act", "silu"),
        "norm_epsilon": _number(config, "rms_norm_eps"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "qkv_bias": bool(config.get("attention_bias", False)),
        "dense_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "tied": bool(config.get("tie_word_embeddings", False)),
        "dtype": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        "rotary_size": _rotary_size(config, head_size),
    }
    described.update(differences)
    described["names"] = {**HF_NAMES, **differences.get("names", {})}
    decoder = Decoder(**described)
    _check_types(decoder)
    _check(decoder)
    return decoder


def architecture_of(config: Mapping[str, Json]) -> str:
    """The one class name in `architectures`. Raises RequestError if there is none or more than one."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise RequestError(
            f"config.json says architectures = {shortened(names)}",
            "one class name is needed, as save_pretrained writes it",
        )
    return names[0]


def rope_settings(config: Mapping[str, Json]) -> tuple[float, dict[str, Json] | None]:
    """Rope base and scaling from either layout: transformers 4 and 5 keep them in different places.

    Never falls back to 10000: a base that is silently wrong costs 10 % perplexity on short text and ruins
    generation (see docs/reference/checkpoint-format.md).
    """
    key = "rope_scaling" if config.get("rope_parameters") is None else "rope_parameters"
    if not isinstance(config.get(key) or {}, Mapping):
        raise RequestError(f"config.json: {key} is {shortened(config[key])}", "it is an object, or null")
    scaling = dict(config.get(key) or {})
    scaling.pop("partial_rotary_factor", None)  # it is `rotary_size`
    theta = scaling.pop("rope_theta", None)
    theta = config.get("rope_theta") if theta is None else theta
    if not isinstance(theta, (int, float)) or isinstance(theta, bool) or not 1 < theta < 1e300:
        raise RequestError(
            f"config.json gives no rope base (rope_theta is {shortened(theta)})",
            "add rope_theta, or rope_parameters.rope_theta, as in the original model's config.json",
        )
    kind = scaling.pop("type", None)
    kind = scaling.get("rope_type", kind)
    if kind in (None, "default"):
        return float(theta), None
    if kind not in ROPE_SCALINGS:
        raise RequestError(
            f"unknown rope scaling {shortened(kind)} in config.json", f"known: {', '.join(ROPE_SCALINGS)}"
        )
    return float(theta), {**scaling, "rope_type": kind}


def _refuse(config: Mapping[str, Json]) -> None:
    """Refuse what this description has no field for, rather than describe another model."""
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise RequestError(
            f"the source is already quantized (quantization_config, {method or 'unknown method'})",
            "start from the unquantised original: quantizing twice loses quality, and its scales mean another thing",
        )
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            raise RequestError(
                f"config.json says {key} = {shortened(config[key])}: a mixture of experts",
                "only dense decoders are supported",
            )


def _rotary_size(config: Mapping[str, Json], head_size: int) -> int:
    """Elements of each head that `partial_rotary_factor` leaves to rope, as transformers counts them; 0 for all."""
    parameters = config.get("rope_parameters")  # transformers 5 keeps it there
    partial = (parameters if isinstance(parameters, Mapping) else {}).get("partial_rotary_factor")
    partial = config.get("partial_rotary_factor") if partial is None else partial
    if partial is None:
        return 0
    said = f"config.json says partial_rotary_factor = {shortened(partial)}"
    if not isinstance(partial, (int, float)) or isinstance(partial, bool) or not 0 < partial <= 1:
        raise RequestError(said, "it is a share of each head, above 0 and at most 1")
    size = int(head_size * partial)
    if size < 2 or size % 2:
        raise RequestError(
            f"{said}: {size} of each head's {head_size} elements",
            "rope turns pairs: an even number of at least 2 is needed",
        )
    return size if size < head_size else 0


def _check_types(decoder: Decoder) -> None:
    """A family's module may pass anything; what is no number would fail far from there."""
    for one in fields(decoder):
        value = getattr(decoder, one.name)
        kinds = _TYPES.get(one.type)
        if kinds and (not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds) or value == ""):
            raise RequestError(
                f"the decoder's {one.name} is {shortened(value)}",
                f"{one.type} is needed: config.json is wrong, or what this family makes of it",
            )


def _check(decoder: Decoder) -> None:
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


def _integer(config: Mapping[str, Json], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"config.json: {key} is {shortened(value)}", "a whole number above 0 is needed")
    return value


def _number(config: Mapping[str, Json], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise RequestError(f"config.json: {key} is {shortened(value)}", "a number between 0 and 1 is needed")
    return float(value)
