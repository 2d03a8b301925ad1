"""The checkpoint's `config.json`: what TensorRT-LLM calls the numbers of a decoder, written and read back.

Keys as `convert_checkpoint.py` writes them. TensorRT-LLM fills many missing keys with defaults that make nonsense
without a word (rotary_base 10000, hidden_act gelu, learned positions); reading refuses instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from reprlib import repr as shortened

from ..decoder import Decoder, Json
from ..errors import RequestError
from ..hf_config import from_hf

#: The `quantization` object of an unquantised checkpoint.
NOT_QUANTIZED: Mapping[str, Json] = {
    "quant_algo": None,
    "kv_cache_quant_algo": None,
    "group_size": 128,
    "smoothquant_val": 0.5,
    "clamp_val": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
    "exclude_modules": None,
    "mamba_ssm_cache_dtype": None,
}

#: Keys of TensorRT-LLM's LLaMAConfig beyond those of every decoder, with the values of a plain Llama: for
#: `Decoder.config` of families that its LLaMA class runs.
LLAMA_CONFIG: Mapping[str, Json] = {
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

_MOE: Mapping[str, Json] = {
    "num_experts": 0,
    "shared_expert_intermediate_size": 0,
    "top_k": 0,
    "normalization_mode": None,
    "sparse_mixer_epsilon": 0.01,
    "tp_mode": 0,
    "device_limited_n_group": 0,
    "device_limited_topk_group": 0,
    "device_limited_routed_scaling_factor": 1.0,
}

#: Keys without which TensorRT-LLM fails late or, worse, guesses.
_REQUIRED = (
    "architecture",
    "dtype",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "norm_epsilon",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "position_embedding_type",
    "rotary_base",
    "vocab_size",
)

#: What the embedding's rows are multiplied by: a key of LLaMAConfig. Gemma's class multiplies by a factor of its own.
_SCALE = "embedding_multiplier"
#: Keys of `config_json` that describe no model: a family may say something else.
_FREE = ("logits_dtype", "disable_weight_only_quant_plugin", "runtime_defaults")
#: A key that only TensorRT-LLM's Gemma writes: whether there are norms behind the blocks too.
_MORE_NORMS = "inter_layernorms"

#: What no decoder comes near, and arithmetic and loops over it still end.
_MOST = 1 << 40
_MOST_HEADS = 1 << 16
_AS_SOURCE = "say what the source model's config.json says"

_AS_HUGGING_FACE = {
    "dtype": "dtype",
    "head_dim": "head_size",
    "hidden_act": "hidden_act",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
    "rms_norm_eps": "norm_epsilon",
    "rope_scaling": "rotary_scaling",
    "rope_theta": "rotary_base",
    "tie_word_embeddings": "tie_word_embeddings",
    "vocab_size": "vocab_size",
}


def config_json(
    decoder: Decoder, dtype: str, tp_size: int = 1, pp_size: int = 1, quantization: Mapping[str, Json] | None = None
) -> dict[str, Json]:
    """The `config.json` of a checkpoint.

    Args:
        decoder: what the model is. Its `config` adds the family's own keys; of `moe` only what differs.
        dtype: of the unquantised tensors: `float16`, `bfloat16` or `float32`.
        tp_size, pp_size: the mapping.
        quantization: keys that differ from NOT_QUANTIZED.

    Raises:
        RequestError: the family's keys contradict the decoder.
    """
    d = decoder
    family = dict(d.config)
    moe, parallel = family.pop("moe", {}), bool(family.pop("use_parallel_embedding", False))
    said: dict[str, Json] = {
        "architecture": d.architecture,
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": d.vocab_size,
        "max_position_embeddings": d.max_positions,
        "hidden_size": d.hidden_size,
        "intermediate_size": d.intermediate_size,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_size": d.head_size,
        "hidden_act": d.activation,
        "norm_epsilon": d.norm_epsilon,
        "qk_layernorm": False,  # means another kind of norm; Qwen3's norms follow from qwen_type
        "attn_bias": d.qkv_bias,
        "mlp_bias": d.mlp_bias,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": d.rope_theta,
        "rotary_scaling": None if d.rope_scaling is None else dict(d.rope_scaling),
        "rotary_embedding_dim": d.rotated,
        "tie_word_embeddings": d.tied,
        "use_parallel_embedding": parallel and tp_size > 1,
        "embedding_sharding_dim": 0,
        "disable_weight_only_quant_plugin": False,
        "runtime_defaults": None,
        "moe": {**_MOE, **moe},
        "mapping": _mapping(tp_size, pp_size),
        "quantization": {**NOT_QUANTIZED, **(quantization or {})},
    }
    share = d.rotated / d.head_size
    _refuse_contradictions(family, {**said, _SCALE: d.embedding_scale, "rotary_pct": share})
    if d.embedding_scale != 1:
        family[_SCALE] = d.embedding_scale
    if d.rotary_size:
        family["rotary_pct"] = share  # some of its model classes read this one
    return {**said, **family}


def _refuse_contradictions(family: Mapping[str, Json], said: Mapping[str, Json]) -> None:
    """What a family adds may not describe another model; LLAMA_CONFIG's values are those of no model in particular."""
    for key, value in family.items():
        if key in said and key not in _FREE and value not in (said[key], LLAMA_CONFIG.get(key, said[key])):
            raise RequestError(
                f"this family's Decoder.config says {key} = {shortened(value)}, and its decoder {shortened(said[key])}",
                "leave the key out there: it follows from the decoder's fields",
            )


def _mapping(tp_size: int, pp_size: int) -> dict[str, Json]:
    return {
        "world_size": tp_size * pp_size,
        "gpus_per_node": 8,
        "tp_size": tp_size,
        "pp_size": pp_size,
        "cp_size": 1,
        "cp_config": {},
        "moe_tp_size": tp_size,
        "moe_ep_size": 1,
        "moe_cluster_size": 1,
        "attn_tp_size": -1,
        "attn_cp_size": -1,
        "enable_attention_dp": False,
        "enable_lm_head_tp_in_adp": False,
    }


def decoder_from_config(config: Mapping[str, Json], tensors: Collection[str] | None = None) -> Decoder:
    """Read a checkpoint's `config.json` back, also one that NVIDIA's tools wrote.

    Args:
        config: the parsed file.
        tensors: names of the tensors of one rank that holds a layer. They say which biases and norms there are;
            without them the config is believed.

    Raises:
        RequestError: a key is missing that TensorRT-LLM would guess, or says something that is no rope decoder.
    """
    missing = [key for key in _REQUIRED if config.get(key) is None]
    if missing:
        raise RequestError(
            f"the checkpoint's config.json lacks {', '.join(missing)}",
            "TensorRT-LLM would guess and give nonsense; add what the source model's config.json says",
        )
    if config["position_embedding_type"] != "rope_gpt_neox":
        raise RequestError(
            f"the checkpoint's position_embedding_type is {shortened(config['position_embedding_type'])}",
            "decoders with rope_gpt_neox are supported",
        )
    hugging_face = {theirs: config.get(ours) for theirs, ours in _AS_HUGGING_FACE.items()}
    for ours in _AS_HUGGING_FACE.values():
        _check_value(ours, config.get(ours))
    _check_scaling(object_of(config, "rotary_scaling"))
    _check_plain(config)
    tied = bool(config.get("tie_word_embeddings")) or config.get("share_embedding_table") is True
    described = {**hugging_face, "architectures": [config["architecture"]], "tie_word_embeddings": tied}
    decoder = from_hf(described, handled=(), **_biases_and_norms(config, tensors))
    return replace(
        decoder, embedding_scale=_embedding_scale(config), rotary_size=_rotary_size(config, decoder.head_size)
    )


def object_of(config: Mapping[str, Json], key: str) -> dict[str, Json]:
    """The object under a key of `config.json`; an empty one for null. Raises RequestError for anything else."""
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise RequestError(f"config.json gives {key} as {shortened(value)}", "it is an object, or null")
    return value or {}


def _check_value(key: str, value: Json) -> None:
    """Refuse numbers that nobody means, NaN, infinity, hundreds of digits, and an activation without a name."""
    most = _MOST_HEADS if key in ("num_attention_heads", "num_key_value_heads") else _MOST
    if isinstance(value, (int, float)) and not value <= most:
        raise RequestError(f"config.json: {key} is too large, or no number", _AS_SOURCE)
    if key == "hidden_act" and not isinstance(value, str):
        raise RequestError(f"config.json: {key} is {shortened(value)}, which names no activation", _AS_SOURCE)


def _check_scaling(scaling: Mapping[str, Json]) -> None:
    """Everything in it is a number, or a list of them, but for the name of its kind."""
    for key, value in scaling.items():
        for one in value if isinstance(value, list) else [value]:
            named = key in ("rope_type", "type")
            if not named and one is not None and not (isinstance(one, (int, float)) and 0 <= one <= _MOST):
                raise RequestError(f"config.json: rotary_scaling.{key} is {shortened(value)}", _AS_SOURCE)


def _check_plain(config: Mapping[str, Json]) -> None:
    """Refuse what TensorRT-LLM's classes obey and a decoder has no field for."""
    if config.get(_MORE_NORMS) or re.match(r"Gemma\d", str(config["architecture"])):
        raise RequestError(
            f"config.json is of a {shortened(config['architecture'])} with norms behind the blocks, as in Gemma 2",
            "decoders with a norm before each block, and none behind it, are supported",
        )
    for key, plain in {**LLAMA_CONFIG, "qk_layernorm": False}.items():
        value = config.get(key)
        if key != _SCALE and value is not None and value != plain:
            raise RequestError(
                f"config.json says {key} = {shortened(value)}, which is not computed here",
                f"decoders in which it is {plain} are supported",
            )


def _embedding_scale(config: Mapping[str, Json]) -> float:
    """TensorRT-LLM's Gemma multiplies by √hidden_size, and checkpoints of others do not say so."""
    scale = config.get(_SCALE)
    if scale is None:
        gemma = _MORE_NORMS in config or str(config["architecture"]).startswith("Gemma")
        return math.sqrt(config["hidden_size"]) if gemma else 1.0
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale <= _MOST:
        raise RequestError(f"config.json: {_SCALE} is {shortened(scale)}", "a number above 0 is needed")
    return float(scale)


def _rotary_size(config: Mapping[str, Json], size: int) -> int:
    """Of each head, 0 for all of it: `rotary_embedding_dim`, or a share of it, as TensorRT-LLM reads them."""
    share, rotated = config.get("rotary_pct"), config.get("rotary_embedding_dim")
    if rotated is None and share is not None:
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 < share <= 1:
            raise RequestError(f"config.json: rotary_pct is {shortened(share)}", "it is a share of a head, at most 1")
        rotated = int(size * share)
    if rotated is None:
        return 0
    if type(rotated) is not int or not 2 <= rotated <= size or rotated % 2:
        raise RequestError(
            f"config.json: rotary_embedding_dim is {shortened(rotated)}, of heads of {size}",
            "an even number is needed, of 2 to all elements of a head",
        )
    return rotated if rotated < size else 0


def _biases_and_norms(config: Mapping[str, Json], tensors: Collection[str] | None) -> dict[str, bool]:
    qwen = "qwen" in str(config["architecture"]).lower()
    qwen_type = config.get("qwen_type", "")
    qkv_bias = bool(config.get("attn_bias", qwen))  # TensorRT-LLM's own defaults
    said = {
        "qkv_bias": qkv_bias,
        "dense_bias": qkv_bias and not qwen,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "qk_norm": qwen_type == "qwen3" or str(config["architecture"]).startswith("Qwen3"),
    }
    if tensors is None:
        return said
    endings = {
        "qkv_bias": "attention.qkv.bias",
        "dense_bias": "attention.dense.bias",
        "mlp_bias": "mlp.fc.bias",
        "qk_norm": "attention.q_layernorm.weight",
    }
    held = {field: any(name.endswith(ending) for name in tensors) for field, ending in endings.items()}
    if "attn_bias" in config and said["qkv_bias"] != held["qkv_bias"]:
        holds = "has" if held["qkv_bias"] else "has no"
        raise RequestError(
            f"config.json says attn_bias {config['attn_bias']} and the checkpoint {holds} attention.qkv.bias",
            "make attn_bias say what the tensors are",
        )
    return held
