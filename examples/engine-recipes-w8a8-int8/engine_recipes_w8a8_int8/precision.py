"""w8a8-int8: weights and the inputs of linear layers in 8 bits, inputs smoothed channel by channel first.

SmoothQuant (Xiao and others, 2022): y = (x · s) · (W / s)ᵀ, where s makes large channels of x smaller. Both factors
are rounded to whole numbers from -127 to 127, weights with one step for each output, inputs with one for the layer.
The checkpoint is TensorRT-LLM's `W8A8_SQ_PER_CHANNEL`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, Report, StageContext, checkpoint, hookimpl

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

ALGORITHM = "W8A8_SQ_PER_CHANNEL"
MOST = 127
#: The second matrix of the MLP: what it reads has the largest outliers, which 8 bits and one step for all cannot hold.
WORST = "transformer.layers.*.mlp.proj"


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse a split that would cut heads or rows, and layers to exclude that are not there."""
    options: Any = context.options
    checkpoint.check_split(decoder, options["tp_size"], options["pp_size"])
    checkpoint.excluded_linears(decoder, excluded(options), options["pp_size"])


@hookimpl
def stage1(context: StageContext) -> None:
    """Quantize by the calibration. Options: `tp_size`, `pp_size`, `dtype`, `exclude`."""
    options: Any = context.options
    statistics = checkpoint.read_statistics(context.input("calibration").path)
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        checkpoint.quantize_linears(
            source,
            context.out,
            ALGORITHM,
            smoother(statistics),
            dtype=options["dtype"],
            tp_size=options["tp_size"],
            pp_size=options["pp_size"],
            exclude=excluded(options),
        )


@hookimpl
def fallbacks(context: StageContext, report: Report) -> list[Mapping[str, str]]:
    """Leave at 16 bits what 8 bits cost most, if that is not so already."""
    given = excluded(context.options)
    return [] if WORST in given else [{"exclude": ",".join([*given, WORST])}]


def excluded(options: Mapping[str, Any]) -> list[str]:
    """What the option `exclude` names."""
    return [word.strip() for word in str(options["exclude"]).split(",") if word.strip()]


def smoother(statistics: checkpoint.Statistics) -> Callable[[checkpoint.Linear], Mapping[str, Array]]:
    """What rounds a linear layer, given what its inputs are like."""

    def quantise(linear: checkpoint.Linear) -> Mapping[str, Array]:
        import numpy as np

        vectors = [statistics.vector(f"{name}.pre_quant_scale") for name in linear.sources]
        stored = np.mean(vectors, axis=0).astype(linear.dtype)  # [in]; q, k and v read one input
        scale = stored.astype(np.float32)
        largest = max((statistics.vector(f"{name}.channel_amax") * scale).max() for name in linear.sources)
        weight, steps = rounded(linear.weight, scale)
        return {
            "weight": weight,
            "weights_scaling_factor": steps,
            "activation_scaling_factor": np.array([step(largest)], np.float32),
            "prequant_scaling_factor": stored,
        }

    return quantise


def rounded(weight: Array, scale: Array) -> tuple[Array, Array]:
    """Round a smoothed weight to 8 bits, halves to even.

    Args:
        weight: [out, in].
        scale: float32 [in], which the layer's input is multiplied by.

    Returns:
        int8 [out, in] and float32 [out]: weight = value × step × scale.
    """
    import numpy as np

    smoothed = weight.astype(np.float32)
    smoothed /= scale
    steps: Array = step(np.maximum(smoothed.max(axis=1), -smoothed.min(axis=1)))
    smoothed /= steps[:, None]
    return np.rint(smoothed, out=smoothed).astype(np.int8), steps


def step(largest: Any) -> Any:
    """What a stored number is multiplied by, float32; 1 where there is nothing to round."""
    import numpy as np

    found = np.asarray(largest, np.float32) / np.float32(MOST)
    return np.where(found > np.finfo(np.float32).tiny, found, np.float32(1))
