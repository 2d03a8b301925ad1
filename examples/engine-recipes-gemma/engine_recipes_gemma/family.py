"""The Gemma family, first generation: a decoder that differs from Llama's in four ways. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, from_hf, hookimpl

#: What TensorRT-LLM's GemmaConfig writes beside the keys of every decoder. On several GPUs it wants the embedding table
#: split, whatever the checkpoint says.
CHECKPOINT_CONFIG: Mapping[str, Any] = {
    "share_embedding_table": True,
    "inter_layernorms": False,
    "use_parallel_embedding": True,
}
_GELU = "gelu_pytorch_tanh"


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe a Gemma checkpoint.

    As transformers' `modeling_gemma` computes it: rows of the embedding table are multiplied by √hidden_size, norms
    multiply by 1 + weight, the gate's activation is GELU in its approximation by tanh (early configs say `gelu` and
    mean that), and heads are as large as the config says. The head is the embedding table, unscaled.

    Raises:
        RequestError: another generation, or what TensorRT-LLM's Gemma has no place for.
    """
    decoder = from_hf(
        {"head_dim": 256, **config},  # transformers' default, which is not hidden_size / heads
        activation=_activation(config),
        embedding_scale=math.sqrt(_width(config)),
        norm_offset=1.0,
        tied=config.get("tie_word_embeddings", True) is not False,
        config=CHECKPOINT_CONFIG,
    )
    _refuse(decoder)
    return decoder


def _activation(config: Mapping[str, Any]) -> str:
    said = config.get("hidden_activation") or config.get("hidden_act") or _GELU
    return _GELU if said == "gelu" else str(said)


def _width(config: Mapping[str, Any]) -> int:
    width = config.get("hidden_size")
    return width if type(width) is int and width > 0 else 1  # if it is none, from_hf says so


def _refuse(decoder: Decoder) -> None:
    if decoder.architecture != "GemmaForCausalLM":
        raise RequestError(
            f"{decoder.architecture} is no first-generation Gemma",
            "later ones have more norms, capped logits and sliding windows, which this family does not describe",
        )
    if decoder.activation != _GELU:
        raise RequestError(f"hidden_act is {decoder.activation!r}", f"Gemma checkpoints with {_GELU} are supported")
    for is_so, what in (
        (not decoder.tied, "a head of its own (tie_word_embeddings is false)"),
        (decoder.rotary_size, "heads that are rotated in part (partial_rotary_factor)"),
        (decoder.mlp_bias, "biases in the MLP (mlp_bias)"),
    ):
        if is_so:
            raise RequestError(f"this checkpoint has {what}", "Gemma models have not; is this another family?")
