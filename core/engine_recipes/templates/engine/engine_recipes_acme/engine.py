"""The engine's hooks: what it refuses, what it writes, how it is loaded and judged. It computes in runtime.py.

Option of stage 2: `max_seq_len`, the longest sequence in tokens (0: what the model is meant for).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine_recipes import Check, Decoder, RequestError, StageContext, checkpoint, checks, hookimpl, rope

if TYPE_CHECKING:
    from .runtime import NumpyRuntime

DECODER, WEIGHTS = "decoder.json", "weights.npz"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a model that cannot be run, before it is converted."""
    if decoder.activation not in ACTIVATIONS:
        raise RequestError(
            f"the acme engine does not know the activation {decoder.activation!r}",
            f"known: {', '.join(ACTIVATIONS)}; choose another engine for this model",
        )
    if longest(context, decoder) > decoder.max_positions:
        raise RequestError(
            f"max_seq_len is more than the {decoder.max_positions:,} tokens that the model is meant for",
            "set a smaller one, or 0 for all of them",
        )
    rope.inverse_frequencies(decoder)  # refuses what cannot be put into a table


@hookimpl
def stage2(context: StageContext) -> None:
    """Write the model's description, and its weights and rope tables in float32."""
    import numpy as np

    with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as source:
        decoder = source.decoder
        names = [name for name in source.names() if not (decoder.tied and name.startswith("lm_head"))]
        weights = {name: source.array(name).astype(np.float32) for name in names}
    weights["cos"], weights["sin"] = rope.tables(decoder, longest(context, decoder))  # [max_seq_len, rotated / 2]
    np.savez(context.out / WEIGHTS, allow_pickle=False, **weights)
    decoder.write(context.out / DECODER)


@hookimpl
def load_engine(folder: Path) -> NumpyRuntime:
    """Load what `stage2` wrote."""
    from .runtime import NumpyRuntime

    return NumpyRuntime(folder)


@hookimpl
def validate(context: StageContext) -> list[Check]:
    """Whether it loads, computes numbers, keeps its cache right and fits its tokenizer."""
    folder = context.inputs[0].path
    runtime = load_engine(folder)
    try:
        return [*checks.judge_numbers(runtime, "float32", ()), checks.judge_vocabulary(runtime, folder)]
    finally:
        runtime.close()


def longest(context: StageContext, decoder: Decoder) -> int:
    """The longest sequence that is wanted, in tokens."""
    return int(context.options["max_seq_len"]) or decoder.max_positions
