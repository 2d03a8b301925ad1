"""Calibration `smoothquant`: how large each input of each linear layer gets, and what it is multiplied by.

ModelOpt measures and smooths (`INT8_SMOOTHQUANT_CFG`): a channel with the largest weight w and the largest input x is
multiplied by w^(1 - alpha) / x^alpha. The whole model is loaded. Layers that read the same input get the same scales.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import (
    Decoder,
    MachineError,
    StageContext,
    StageFailed,
    calibration,
    checkpoint,
    events,
    hookimpl,
    read_texts,
)
from engine_recipes.calibration import SAME_INPUT, Rows

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_ROWS = 4  # that go through the model together


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse rows that are too long."""
    calibration.check_length(decoder, int(context.options["seq_len"]))


@hookimpl
def calibrate(context: StageContext) -> None:
    """Measure. Options: `data`, `size`, `seq_len`, `seed`, `alpha`, and the precision's `device`."""
    options: Any = context.options
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        decoder, folder = source.decoder, source.folder
    texts = read_texts(options["data"])
    rows = calibration.read_rows(texts, folder, options["size"], options["seq_len"], options["seed"])
    model = load(folder, options["device"])
    smooth(model, rows, options["alpha"])
    checkpoint.write_statistics(
        context.out,
        statistics(model, decoder),
        {
            "method": "smoothquant",
            "alpha": options["alpha"],
            "rows": rows.count,
            "tokens": rows.tokens,
            "versions": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        },
    )


def load(folder: Path, device: str) -> Any:
    """The model as transformers loads it: in float32 on a CPU, bfloat16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("device = cuda, and this PyTorch sees no GPU", "--set device=cpu, or auto")
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    events.log(f"calibrating on {place}")
    dtype = torch.float32 if place == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place).eval()


def smooth(model: Any, rows: Rows, alpha: float) -> None:
    """Let ModelOpt measure and smooth; its quantizers keep what it found."""
    import torch

    def forward(module: Any) -> None:
        done = 0
        for batch in rows.batches(_ROWS):
            # by positions that start again the model knows that a row has several texts
            arguments = {"input_ids": batch.ids, "position_ids": batch.positions}
            tensors = {name: torch.from_numpy(array) for name, array in arguments.items() if array is not None}
            module(**{name: tensor.to(module.device) for name, tensor in tensors.items()}, use_cache=False)
            done += len(batch.ids)
            events.progress("calibrating", done, rows.count, "rows")

    with _quiet(), torch.no_grad():
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
        config["algorithm"] = {"method": "smoothquant", "alpha": alpha}
        mtq.quantize(model, config, forward)


def statistics(model: Any, decoder: Decoder) -> dict[str, Array]:
    """`<linear>.channel_amax` and `<linear>.pre_quant_scale`, float32 [in].

    Raises:
        StageFailed: ModelOpt looked at something else.
    """
    import torch

    found = {}
    for layer in range(decoder.layers):
        for roles in SAME_INPUT:
            names = [decoder.names[role].format(layer) for role in roles]
            quantizers = [model.get_submodule(name).input_quantizer for name in names]
            amax = getattr(quantizers[0], "_amax_for_smoothing", None)
            if amax is None:
                raise StageFailed(
                    f"ModelOpt {version('nvidia-modelopt')} smoothed no {names[0]}",
                    "its plugin for transformers does not know this model class; try other versions of the two",
                )
            # the largest of scales ∝ w^(1 - alpha) is the scale of the largest weight: that of the joined matrix
            scale = torch.stack([quantizer.pre_quant_scale.float() for quantizer in quantizers]).amax(0)
            for name in names:
                found[f"{name}.channel_amax"] = amax.float().reshape(-1).cpu().numpy()
                found[f"{name}.pre_quant_scale"] = scale.reshape(-1).cpu().numpy()
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints what it does, and warns of versions of transformers that it was not tested with."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
