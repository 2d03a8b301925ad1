"""Calibration `amax`: the largest values that go into each linear layer and into the KV cache.

ModelOpt says where to measure and drives it: its quantizers are put into the model, and its `max_calibrate` switches
them to measuring, runs the rows and loads what was found. The measuring itself is `OnePass`, which takes the place of
ModelOpt's calibrator. The weights are not looked at: their largest values are in the weights, and stage 1 reads those
anyway.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, StageContext, StageFailed, calibration, checkpoint, events, hookimpl, read_texts
from engine_recipes.calibration import SAME_INPUT, Rows

from . import device as machine
from .arguments import KEPT_BYTES
from .layers import Calibration, LayeredModel

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]
    #: Runs all rows through a layer, given what to call after each part that went through and after one that failed.
    Forward = Callable[[Callable[[], None], Callable[[], None]], None]


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse rows that are too long."""
    calibration.check_length(decoder, int(context.options["seq_len"]))


@hookimpl
def calibrate(context: StageContext) -> None:
    """Find the largest activations. Options: `data`, `size`, `seq_len`, `batch_size`, `seed`, `device`."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        measure(context, source, Maxima(source))


class Maxima:
    """Max calibration, a layer at a time.

    Attributes:
        method: the calibration's name.
        about: goes into calibration.json.
        seconds: how long was spent on what else than running layers.
    """

    method = "amax"

    def __init__(self, source: checkpoint.SourceCheckpoint) -> None:
        self.names = source.decoder.names
        self.about: dict[str, Any] = {}
        self.seconds: dict[str, float] = {}

    def extra_bytes(self) -> int:
        """Device memory that is needed for what is summed up over the rows."""
        return 0

    def prepare(self, model: Any) -> None:
        """Put ModelOpt's quantizers into a model without weights."""
        with _quiet():
            mtq = _import_modelopt()
            config = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
            config = mtq.update_quant_cfg_with_kv_cache_quant(config, mtq.FP8_KV_CFG["quant_cfg"])
            config["quant_cfg"].append({"quantizer_name": "*weight_quantizer", "enable": False})
            config["algorithm"] = None  # calibrated layer by layer, when there are weights
            mtq.quantize(model, config)
        for layer in model.get_submodule(self.names["q"].partition(".{}")[0]):
            for first, *others in SAME_INPUT:  # one of each is looked at, which halves what measuring costs
                measured = self.module(layer, first)
                for module in (self.module(layer, role) for role in others):
                    if module is not measured:
                        module.input_quantizer.disable()
                _measure_in_one_pass(measured.input_quantizer)
            for role in ("k", "v"):
                _measure_in_one_pass(self._cache_quantizer(layer, role))

    def layer(self, index: int, layer: torch.nn.Module, forward: Forward) -> dict[str, Array]:
        """Measure one layer.

        Args:
            index, layer: which; its weights are there.
            forward: runs all rows through it; calls its first argument after each part that went through, its second
                after one that ran out of memory, to drop what that left.

        Returns:
            The layer's statistics by name, float32.
        """
        self._max_calibrate(layer, lambda: forward(lambda: None, lambda: None))
        return self.read(index, layer)

    def _max_calibrate(self, layer: torch.nn.Module, forward: Callable[[], None]) -> None:
        from modelopt.torch.quantization.model_calib import max_calibrate

        max_calibrate(layer, lambda _: forward(), distributed_sync=False)

    def read(self, index: int, layer: torch.nn.Module) -> dict[str, Array]:
        """What was found: `<linear>.input_amax` and `<k or v>.cache_amax`, float32 [1].

        Raises:
            StageFailed: NaN or inf among them, or ModelOpt looked at something else.
        """
        import numpy as np
        import torch

        found = {}
        for roles in SAME_INPUT:
            amax = self.module(layer, roles[0]).input_quantizer.amax
            found.update({f"{self.names[role].format(index)}.input_amax": amax for role in roles})
        for role in ("k", "v"):
            name = f"{self.names[role].format(index)}.cache_amax"  # of both, if they are one tensor
            before, amax = found.get(name), getattr(self._cache_quantizer(layer, role), "amax", None)
            found[name] = amax if before is None or amax is None else torch.maximum(before, amax)
        missing = [name for name, value in found.items() if value is None]
        if missing:
            raise StageFailed(
                f"ModelOpt {version('nvidia-modelopt')} measured no {missing[0]}",
                "its plugin for transformers does not know this model class; try other versions of the two",
            )
        values = torch.stack([value.reshape(()).float() for value in found.values()]).cpu().numpy()
        if not np.isfinite(values).all():
            raise StageFailed(
                f"activations of {self.names['q'].partition('.{}')[0]}.{index} are NaN or inf",
                "the source may be damaged, or its values too large for the dtype it is calibrated in",
            )
        return {name: values[place : place + 1] for place, name in enumerate(found)}

    def _cache_quantizer(self, layer: torch.nn.Module, role: str) -> Any:
        """ModelOpt's quantizer of keys or values on their way into the cache, or None."""
        return getattr(self.module(layer, role, parent=True), f"{role}_bmm_quantizer", None)

    def module(self, layer: torch.nn.Module, role: str, parent: bool = False) -> Any:
        """The linear layer with that role, or what contains it."""
        name = self.names[role].partition(".{}.")[2]
        return layer.get_submodule(name.rpartition(".")[0] if parent else name)


def _measure_in_one_pass(quantizer: Any) -> None:
    """Give a quantizer of ModelOpt a calibrator that finds the same largest magnitude.

    ModelOpt's own reads each tensor twice, for the largest and the smallest value, and makes the GPU wait three times
    to look for NaN. This one reads once and waits never; NaN stays NaN, and is found at the end of the layer.
    """
    import torch
    from modelopt.torch.quantization.calib import MaxCalibrator

    class OnePass(MaxCalibrator):  # type: ignore[misc]  # untyped
        _calib_amax: Any

        def collect(self, x: torch.Tensor) -> None:
            low, high = torch.aminmax(x.detach())
            amax = torch.maximum(-low, high)
            self._calib_amax = amax if self._calib_amax is None else torch.maximum(self._calib_amax, amax)

    if quantizer is not None:
        quantizer._calibrator = OnePass(quantizer.num_bits, None, quantizer.unsigned)


def measure(context: StageContext, source: checkpoint.SourceCheckpoint, maxima: Maxima) -> None:
    """Run the calibration text through the model and write what `maxima` finds."""
    options = context.options
    seq_len = int(options["seq_len"])
    start = perf_counter()
    texts = read_texts(str(options["data"]))
    rows = calibration.read_rows(texts, source.folder, int(options["size"]), seq_len, int(options["seed"]))
    seconds = {"tokenise": perf_counter() - start}
    start = perf_counter()
    import torch

    device = machine.choose(str(options["device"]))
    with machine.memory_errors(), torch.no_grad():
        model = LayeredModel(source, device, machine.compute_dtype(device))
        placed = _place_rows(rows, model, maxima, int(options["batch_size"]), seq_len)
        maxima.prepare(model.model)
        seconds["start"] = perf_counter() - start
        tensors = _measure_layers(model, placed, maxima)
    seconds.update(model.seconds, **maxima.seconds)
    about = {
        "method": maxima.method,
        **maxima.about,
        **_about(rows, seq_len, model, placed.parts.rows),
        "phases": {f"{phase}_seconds": round(spent, 3) for phase, spent in seconds.items()},
    }
    checkpoint.write_statistics(context.out, tensors, about)


def _place_rows(rows: Rows, model: LayeredModel, maxima: Maxima, asked: int, seq_len: int) -> Calibration:
    decoder, device, width = model.source.decoder, model.device, model.dtype.itemsize
    hidden = rows.tokens * decoder.hidden_size * width
    keep_on = machine.place_hidden(device, hidden)
    layers = 2 * width * decoder.parameters // decoder.layers
    taken = layers + KEPT_BYTES + maxima.extra_bytes() + (hidden if keep_on == device else 0)
    size = asked or machine.batch_size(decoder, device, seq_len, taken, width)
    return Calibration(model, rows.batches(size), keep_on)


def _measure_layers(model: LayeredModel, placed: Calibration, maxima: Maxima) -> dict[str, Array]:
    tensors = {}
    events.progress("calibrating", 0, len(model.layers), "layers")
    for index, layer in model.loaded():

        def forward(
            done: Callable[[], None], failed: Callable[[], None], index: int = index, layer: torch.nn.Module = layer
        ) -> None:
            placed.forward(index, layer, done, failed)

        tensors.update(maxima.layer(index, layer, forward))
        events.progress("calibrating", index + 1, len(model.layers), "layers")
    return tensors


def _about(rows: Rows, seq_len: int, model: LayeredModel, batch_size: int) -> dict[str, Any]:
    return {
        "rows": rows.count,
        "tokens": rows.tokens,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "device": machine.describe(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "peak_gpu_bytes": machine.peak_bytes(model.device),
        "versions": {name: version(name) for name in ("nvidia-modelopt", "torch", "transformers")},
    }


def _import_modelopt() -> Any:
    """`modelopt.torch.quantization`, without torch's compiler.

    ModelOpt decorates kernels for FP8 on GPUs with `torch.compile`, which imports the compiler: 2 of the 5 seconds
    that importing it takes. Nothing that is compiled runs here.
    """
    from unittest.mock import patch

    import torch

    with patch.object(torch, "compile", lambda *_, **__: lambda function: function):
        import modelopt.torch.quantization as mtq
    return mtq


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints its configuration, and warns of versions of transformers that it was not tested with."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
