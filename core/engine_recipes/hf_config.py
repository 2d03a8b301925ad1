"""A decoder from a Hugging Face `config.json`: the keys that most models share, and those that are refused.

What a config says and `Decoder` cannot is refused: an engine would leave it out without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import fields
from reprlib import repr as shortened
from typing import Any

from .decoder import HF_NAMES, Decoder, Json, check
from .errors import RequestError, did_you_mean

#: Rope scalings that TensorRT-LLM accepts; `default` is not one of them and is written as null.
ROPE_SCALINGS = ("linear", "dynamic", "longrope", "llama3", "yarn", "mrope")
_WINDOWED = "sliding_attention"


def _off(value: Json, d: Decoder) -> bool:
    return not value


def _one(value: Json, d: Decoder) -> bool:
    return bool(value == 1)


def _close(value: Json, usual: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, usual, rel_tol=1e-6)


#: Keys that change what is computed and that no field of Decoder says -> the values that change nothing, given the
#: decoder; `None` never does. Names and meanings: configuration and modeling files of transformers.
UNSAID: Mapping[str, Callable[[Json, Decoder], bool]] = {
    "alibi": _off,
    "attention_multiplier": lambda value, d: _close(value, d.head_size**-0.5),
    "attn_logit_softcapping": _off,
    "attn_output_gate": _off,
    "clip_qkv": _off,
    "dim_model_base": lambda value, d: _close(value, d.hidden_size),
    "embedding_multiplier": _one,
    "final_logit_softcapping": _off,
    "kv_lora_rank": _off,
    "layer_types": lambda value, d: isinstance(value, list) and set(value) <= {"full_attention", _WINDOWED},
    "lm_head_multiplier": _one,
    "logit_scale": _one,
    "logits_scaling": _one,
    "no_rope_layer_interval": lambda value, d: isinstance(value, int) and value > d.layers,
    "no_rope_layers": lambda value, d: isinstance(value, list) and all(value),
    "parallel_attn": _off,
    "q_lora_rank": _off,
    "qk_layernorm": _off,
    "query_pre_attn_scalar": lambda value, d: _close(value, d.head_size),
    "residual_multiplier": _one,
    "rope_interleaved": _off,
    "scale_depth": lambda value, d: _close(value, d.layers**0.5),
    "scale_emb": _one,
    "use_bidirectional_attention": _off,
    "use_parallel_residual": _off,
    "use_qk_norm": _off,
}


def from_hf(config: Mapping[str, Json], /, *, handled: Iterable[str] = (), **differences: Any) -> Decoder:
    """Describe a Hugging Face decoder. A family passes only the fields in which it differs.

    Keys that are known to change what a model computes, and that no field of Decoder says, are refused unless they say
    what every decoder does: sliding windows, multipliers, soft caps, layers without rope …

    Args:
        config: the parsed `config.json`, in the layout of transformers 4 (`rope_theta`, `rope_scaling`) or 5
            (`rope_parameters`).
        handled: keys of these that the family has looked at: `differences` say what they mean, or they mean nothing.
        differences: fields of Decoder that this config does not say in the common way; `names` is merged
            over HF_NAMES.

    Raises:
        RequestError: a key is missing, of the wrong type, or means what no engine would compute; the numbers
            contradict each other; there is no such field.
    """
    _refuse(config)
    known = [one.name for one in fields(Decoder)]
    for name in differences.keys() - set(known):
        raise RequestError(f"a decoder has no field {name}", did_you_mean(name, known))
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
    described["names"] = {**HF_NAMES, **(differences.get("names") or {})}
    decoder = Decoder(**described)
    check(decoder)
    _refuse_unsaid(config, decoder, set(handled))
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
    return float(theta), {**scaling, **_original_length(config, scaling, kind), "rope_type": kind}


def _original_length(config: Mapping[str, Json], scaling: Mapping[str, Json], kind: str) -> dict[str, Json]:
    """The length before scaling, which Phi-3 and its like keep beside the rope settings."""
    key = "original_max_position_embeddings"
    if kind != "longrope" or scaling.get(key) is not None:
        return {}
    if config.get(key) is None:
        raise RequestError(
            f"config.json has rope of the type longrope and no {key}",
            "add it, as in the original model's config.json: it says which of the two lists of factors is meant",
        )
    return {key: config[key]}


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


def _refuse_unsaid(config: Mapping[str, Json], decoder: Decoder, handled: Container[str]) -> None:
    """Refuse keys of UNSAID that mean something here, and a window that is shorter than the model's positions."""
    for key, harmless in UNSAID.items():
        value = config.get(key)
        by_layer = key == "no_rope_layer_interval" and config.get("no_rope_layers")  # which says it layer by layer
        if value is None or key in handled or by_layer or harmless(value, decoder):
            continue
        raise RequestError(
            f"config.json says {key} = {shortened(value)}, and engines would compute this model without it",
            f"choose another model; a family that says what it means passes handled=({key!r},) to from_hf",
        )
    window = config.get("sliding_window")
    if "sliding_window" not in handled and _is_windowed(config) and not _covers(window, decoder.max_positions):
        raise RequestError(
            f"config.json says sliding_window = {shortened(window)}: engines would attend to everything before",
            "choose a model without one, or set max_position_embeddings to the window if short inputs are all you need",
        )


def _is_windowed(config: Mapping[str, Json]) -> bool:
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return False
    layers = config.get("layer_types")
    return not isinstance(layers, list) or _WINDOWED in layers


def _covers(window: Json, positions: int) -> bool:
    return isinstance(window, int) and window >= positions


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
