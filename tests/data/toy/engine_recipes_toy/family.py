"""The toy family: a Llama by another name."""

from engine_recipes import Decoder, from_hf, hookimpl


@hookimpl
def resolve_checkpoint(config) -> Decoder:
    return from_hf(config)
