"""The family: how its config.json differs from the common case. Knows no precision and no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, from_hf, hookimpl


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Say what the model is: a Llama-like decoder.

    `from_hf` reads the keys that most models share. Pass what this family means and config.json does not say:

        qkv_bias=True                      the query, key and value layers have biases (Qwen2)
        qk_norm=True                       each head of q and k is normalised before rope (Qwen3)
        tied=True                          the output head is the embedding table
        activation="gelu_pytorch_tanh"     in the MLP
        embedding_scale=hidden_size**0.5   rows of the embedding table are multiplied by it (Gemma)
        norm_offset=1.0                    norm weights are stored without their 1 (Gemma)
        rotary_size=32                     rope rotates only the first elements of each head
        names={"dense": "model.layers.{}.attn.out"}   tensors by other names; q, k and v (and gate and up) that have
                                           one name are one tensor (Phi-3)
        handled=("embedding_multiplier",)  keys that `from_hf` would refuse and that you have said here
        config={…}                         more keys for TensorRT-LLM's config.json

    The source must hold exactly the tensors that the result implies, so a wrong one is found at once.

    Raises:
        RequestError: the model does what no field of Decoder says, a sliding window for instance. An engine would
            leave it out without a word; refuse yourself what `from_hf` does not know.
    """
    return from_hf(config)
