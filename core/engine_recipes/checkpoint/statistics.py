"""What a calibration leaves: numbers about a model's activations, small enough to keep, enough to quantize by.

A folder of kind `calibration`: `statistics.safetensors`, float32, and `calibration.json`, which says how they came
about. Tensors are named after the Hugging Face module they belong to:

    <linear>.input_amax       [1]   largest |x| that went into the linear layer
    <linear>.channel_amax     [in]  the same for each of its inputs, before `pre_quant_scale`
    <linear>.pre_quant_scale  [in]  what AWQ and SmoothQuant multiply its input by (its weights are divided by it)
    <k or v linear>.cache_amax [1]  largest |k| or |v| that goes into the KV cache: keys after rope

Others may be kept as well: core reads these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, StageFailed
from . import safetensors
from .source import read_json

if TYPE_CHECKING:
    from .safetensors import Array

STATISTICS = "statistics.safetensors"
ABOUT = "calibration.json"
#: The statistic that weights are divided by.
PREQUANT = "pre_quant_scale"
_AGAIN = "calibrate again with --force"


class Statistics:
    """A calibration that was read back.

    Attributes:
        about: the parsed `calibration.json`: `method`, `rows`, `tokens`, `group_size` …
    """

    def __init__(self, about: Mapping[str, Any], tensors: Mapping[str, Array]) -> None:
        self.about = about
        self._tensors = tensors

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._tensors)

    def number(self, name: str) -> float:
        """A statistic that is one number, `model.layers.0.mlp.up_proj.input_amax`."""
        return float(self.vector(name)[0])

    def vector(self, name: str) -> Array:
        """A statistic as float32 [n].

        Raises:
            RequestError: this calibration did not look at it.
        """
        try:
            return self._tensors[name]
        except KeyError:
            method = self.about.get("method", "unknown")
            raise RequestError(
                f"the calibration (method {method}) has no {name}",
                "this precision needs another calibration: see `calibration` in the registry",
            ) from None


def write_statistics(folder: Path, tensors: Mapping[str, Array], about: Mapping[str, Any]) -> None:
    """Write a calibration.

    Args:
        folder: has neither file yet.
        tensors: name -> float32 [n], see the module's text. The order does not matter.
        about: plain JSON; needs `method`.

    Raises:
        StageFailed: a statistic is not finite or negative, or a `pre_quant_scale` has a zero.
    """
    import numpy as np

    arrays = {name: np.ascontiguousarray(tensors[name], np.float32) for name in sorted(tensors)}
    for name, array in arrays.items():
        layer, _, what = name.rpartition(".")
        if not np.isfinite(array).all():
            raise StageFailed(
                f"{what} of {layer} is not finite: the model computes NaN or inf there",
                "the source may be damaged, or its values too large for the dtype it is calibrated in",
            )
        if array.min() < 0 or (array.min() == 0 and what == PREQUANT):
            raise StageFailed(
                f"{what} of {layer} is {abs(array.min()):g} somewhere, and must be above 0",
                "report this to the authors of the calibration",
            )
    infos = {name: ("float32", array.shape) for name, array in arrays.items()}
    pieces = ([array.reshape(-1).view(np.uint8)] for array in arrays.values())
    for _ in safetensors.write(folder / STATISTICS, infos, pieces):
        pass
    (folder / ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_statistics(folder: Path) -> Statistics:
    """Read what `write_statistics` wrote; it is small and held in memory.

    Raises:
        RequestError: a file is missing or damaged.
    """
    import numpy as np

    about = read_json(folder / ABOUT)
    if not (folder / STATISTICS).is_file():
        raise RequestError(f"{STATISTICS} is missing in {folder}", _AGAIN)
    with safetensors.SafeFile(folder / STATISTICS) as file:
        return Statistics(about, {name: np.array(file.array(name)) for name in file.tensors})
