"""The Mistral family: a Llama decoder by another class name. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine_recipes import Decoder, RequestError, checkpoint, from_hf, hookimpl


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe a Mistral checkpoint. A sliding window, as version 0.1 has one, is refused by `from_hf`.

    Raises:
        RequestError: a window, an activation or a rope that engines would ignore.
    """
    decoder = from_hf(config, qkv_bias=False, dense_bias=False, config=checkpoint.LLAMA_CONFIG)
    if decoder.activation != "silu" or decoder.rotary_size:
        raise RequestError(
            f"this Mistral has the activation {decoder.activation}, and rope on {decoder.rotated} of each head's "
            f"{decoder.head_size} elements",
            "Mistral models have silu, and rope on whole heads; is this another family?",
        )
    return decoder
