"""Calibration `smoothquant`: how large each input of each linear layer gets, and what it is multiplied by.

ModelOpt measures and smooths (`INT8_SMOOTHQUANT_CFG`): a channel with the largest weight w and the largest input x is
multiplied by w^(1 - alpha) / x^alpha. The whole model is loaded. Layers that read the same input get the same scales.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import (
    Decoder,
    RequestError,
    StageContext,
    StageFailed,
    Tokenizer,
    checkpoint,
    events,
    hookimpl,
    read_texts,
)

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

#: Roles of the linear layers of a decoder layer that read the same input, see `Decoder.names`.
SAME_INPUT = (("q", "k", "v"), ("dense",), ("gate", "up"), ("down",))
_ROWS = 4  # that go through the model together


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse rows that are too long."""
    length = int(context.options["seq_len"])
    if length > decoder.max_positions:
        raise RequestError(
            f"calib.seq_len is {length}, and the model is meant for {decoder.max_positions:,} tokens",
            f"--set calib.seq_len={decoder.max_positions}",
        )


@hookimpl
def calibrate(context: StageContext) -> None:
    """Measure. Options: `data`, `size`, `seq_len`, `alpha`, and the precision's `device`."""
    options: Any = context.options
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        decoder, folder = source.decoder, source.folder
    rows = read_rows(read_texts(options["data"]), folder, options["size"], options["seq_len"])
    model = load(folder, options["device"])
    smooth(model, rows, options["alpha"])
    checkpoint.write_statistics(
        context.out,
        statistics(model, decoder),
        {
            "method": "smoothquant",
            "alpha": options["alpha"],
            "rows": len(rows),
            "tokens": int(rows.size),
            "versions": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
        },
    )


def read_rows(texts: Iterable[str], folder: Path, size: int, seq_len: int) -> Array:
    """Rows of tokens from all over the texts, int64 [size, seq_len]; fewer if there is less text.

    Raises:
        RequestError: there is not one row of text.
    """
    import numpy as np

    tokenizer = Tokenizer.load(folder)
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode(text)
        if len(ids) > 16 * size * seq_len:
            break
    count = len(ids) // seq_len
    if not count:
        raise RequestError(
            f"the calibration text has {len(ids)} tokens, fewer than one row of {seq_len}",
            "give more text, --set calib.data=FILE.txt, or shorter rows, --set calib.seq_len",
        )
    chosen = np.linspace(0, count - 1, min(size, count)).astype(int)
    return np.array(ids[: count * seq_len], np.int64).reshape(count, seq_len)[chosen]


def load(folder: Path, device: str) -> Any:
    """The model as transformers loads it: in float32 on a CPU, bfloat16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    events.log(f"calibrating on {place}")
    dtype = torch.float32 if place == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(place).eval()


def smooth(model: Any, rows: Array, alpha: float) -> None:
    """Let ModelOpt measure and smooth; its quantizers keep what it found."""
    import torch

    def forward(module: Any) -> None:
        for start in range(0, len(rows), _ROWS):
            module(torch.from_numpy(rows[start : start + _ROWS]).to(module.device), use_cache=False)
            events.progress("calibrating", min(start + _ROWS, len(rows)), len(rows), "rows")

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
