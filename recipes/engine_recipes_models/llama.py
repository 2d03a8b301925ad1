"""Llama: the common case, no biases unless the config says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, checkpoint, from_hf, hookimpl


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe a Llama checkpoint.

    Raises:
        RequestError: an activation or rope that Llama does not have.
    """
    decoder = from_hf(config, config=checkpoint.LLAMA_CONFIG)
    if decoder.activation != "silu":
        raise RequestError(f"hidden_act is {decoder.activation!r}", "Llama checkpoints with silu are supported")
    if decoder.rotary_size:
        raise RequestError(
            f"partial_rotary_factor leaves {decoder.head_size - decoder.rotary_size} elements of each head unrotated",
            "Llama checkpoints rotate whole heads; is this another family?",
        )
    return decoder
