"""The toy family: a Llama by another name."""

from engine_recipes import Decoder, from_hf, hookimpl

from .misbehave import misbehave


@hookimpl
def resolve_checkpoint(context, config) -> Decoder:
    misbehave(context)
    return from_hf(config)
