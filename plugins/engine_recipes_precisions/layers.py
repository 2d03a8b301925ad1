"""A Hugging Face decoder, run one layer at a time over all calibration rows.

The model is built without weights, on torch's meta device. The rows are embedded; then each layer's weights are read
from the mapped source, all batches go through it, and its weights are dropped. What is held is one layer, the next
one, which is being read meanwhile, and the hidden states of all rows, whatever the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine_recipes import RequestError, StageFailed, checkpoint
from engine_recipes.calibration import Batch

from . import device as machine
from .arguments import Kept, keep_apart
from .skeleton import check_parameters, layers_of, without_weights

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[Any]]
    from .arguments import Arguments


class LayeredModel:
    """A model whose layers get their weights one at a time.

    Attributes:
        model: transformers' model; its parameters are on the meta device.
        layers: its decoder layers, in order.
        seconds: how long was spent on `load` (waiting for weights) and `forward`.
    """

    def __init__(self, source: checkpoint.SourceCheckpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.model = without_weights(source, dtype)
        self.prefix = source.decoder.names["q"].partition(".{}")[0]
        self.layers = layers_of(self.model, self.prefix)
        self.seconds = {"load": 0.0, "forward": 0.0}
        check_parameters(self.model, self.layers, self.prefix, source)
        self._place_buffers()
        self._leave_out_final_norm()

    def embed(self, batches: Sequence[Batch], keep_on: torch.device, parts: machine.Parts) -> list[torch.Tensor]:
        """What goes into the first layer: for each batch [rows, length, hidden] in the compute dtype, on `keep_on`."""
        import torch

        name = self.source.decoder.names["embedding"]
        module = self.model.get_submodule(name.removesuffix(".weight"))
        used, compact = _renumber(batches)
        if used[-1] >= self.source.decoder.vocab_size:
            raise RequestError(
                f"the tokenizer gives id {used[-1]} and the model has {self.source.decoder.vocab_size} ids",
                "tokenizer.json belongs to another model",
            )
        table = self._tensor(self.source.array(name)[used])  # only the rows of the table that occur
        self.source.forget(name)
        module.padding_idx = None
        module.weight = torch.nn.Parameter(table, requires_grad=False)
        hidden = []
        for batch in compact:
            shape = (*batch.ids.shape, self.source.decoder.hidden_size)
            kept = torch.empty(shape, dtype=self.dtype, device=keep_on, pin_memory=self._pinned(keep_on))
            parts.run(len(kept), self._embedding(batch, kept))
            hidden.append(kept)
        module.to("meta")
        return hidden

    def _embedding(self, batch: Batch, kept: torch.Tensor) -> Callable[[int, int], None]:
        """Embeds rows of a batch by the model's own code, which in some families multiplies what the table has."""
        import torch

        def run(start: int, stop: int) -> None:
            part = batch.part(start, stop)
            calls = self._record(input_ids=torch.from_numpy(part.ids).to(self.device), **self._positions(part))
            kept[start:stop].copy_(calls[0][0])

        return run

    def arguments(self, batch: Batch, rows: torch.Tensor) -> list[Arguments]:
        """What the model passes to each layer beside the hidden states: masks, rotary tables.

        Args:
            batch: the rows in question.
            rows: their hidden states; only the shape counts.
        """
        positions = self._positions(batch)
        calls = [(args, kwargs) for _, args, kwargs in self._record(inputs_embeds=rows, **positions)]
        return keep_apart(calls, positions["position_ids"]) if positions else calls

    def _record(self, **inputs: Any) -> list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]]:
        """Run the model with layers that do nothing but note how they are called."""
        calls: list[tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append((hidden, args, kwargs))
            return hidden

        for layer in self.layers:
            layer.forward = note
        try:
            self.model.base_model(**inputs, use_cache=False)
        finally:
            for layer in self.layers:
                del layer.forward
        if len(calls) != len(self.layers):
            raise StageFailed(
                f"{type(self.model).__name__} of transformers ran {len(calls)} of its {len(self.layers)} layers",
                "calibrate with another version of transformers",
            )
        return calls

    def loaded(self) -> Iterator[tuple[int, torch.nn.Module]]:
        """Each layer in turn with its weights on the device; they are dropped when the next one is asked for."""
        with ThreadPoolExecutor(1, thread_name_prefix="weights") as pool:
            ahead = pool.submit(self._weights, 0)
            for index, layer in enumerate(self.layers):
                start = perf_counter()
                weights = self._awaited(ahead, index)
                self.seconds["load"] += perf_counter() - start
                if index + 1 < len(self.layers):
                    ahead = pool.submit(self._weights, index + 1)
                layer.load_state_dict(weights, strict=False, assign=True)
                del weights
                yield index, layer
                layer.to("meta")

    def _awaited(self, ahead: Future[dict[str, torch.Tensor]], index: int) -> dict[str, torch.Tensor]:
        """A layer's weights; read again if there was no room for them beside the activations of the one before."""
        import torch

        error = ahead.exception()
        if not isinstance(error, torch.OutOfMemoryError):
            return ahead.result()
        error.with_traceback(None)  # which holds the weights that did fit
        machine.free_cached()
        return self._weights(index)

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's weights on the device, by their names within the layer. Called from another thread."""
        import torch

        prefix = f"{self.prefix}.{index}."
        cuda: Any = torch.cuda
        stream = cuda.Stream(self.device) if self.device.type == "cuda" else None
        found = {}
        with cuda.stream(stream):  # which does nothing with None
            for name in parameter_names(self.layers[index]):
                array = self.source.array(prefix + name)
                _require_finite(prefix + name, array)
                found[name] = self._tensor(array)
                self.source.forget(prefix + name)
        if stream is not None:
            stream.synchronize()
            for tensor in found.values():  # their memory must not be used again before the layer has run
                tensor.record_stream(cuda.default_stream(self.device))
        return found

    def _tensor(self, array: Array) -> torch.Tensor:
        """A copy of a weight on the device, in the compute dtype."""
        import torch

        kind = getattr(torch, array.dtype.name)
        host = torch.empty(array.shape, dtype=kind, pin_memory=self._pinned(torch.device("cpu")))
        integers = {2: torch.int16, 4: torch.int32}[kind.itemsize]  # numpy and torch share no bfloat16
        host.view(integers).numpy()[...] = array.view(f"i{kind.itemsize}")
        return host.to(self.device, non_blocking=True).to(self.dtype)

    def _pinned(self, place: torch.device) -> bool:
        return self.device.type == "cuda" and place.type == "cpu"

    def _positions(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Positions that start again are how transformers is told that a row holds several texts."""
        import torch

        if batch.positions is None:
            return {}
        return {"position_ids": torch.from_numpy(batch.positions).to(self.device)}

    def _place_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))

    def _leave_out_final_norm(self) -> None:
        import torch

        name = self.source.decoder.names["final_norm"].removesuffix(".weight")
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, torch.nn.Identity())


def _require_finite(name: str, array: Array) -> None:
    """Looking costs little here: it is done while the layer before is computed."""
    if not math.isfinite(checkpoint.largest(array)):
        raise checkpoint.not_finite(name)


def parameter_names(module: torch.nn.Module) -> list[str]:
    """Names of a module's parameters."""
    return [name for name, _ in module.named_parameters()]


class Calibration:
    """All batches and what they have become after the layers so far.

    Attributes:
        hidden: for each batch, [rows, length, hidden].
    """

    def __init__(self, model: LayeredModel, batches: Sequence[Batch], keep_on: torch.device) -> None:
        self._model, self._batches, self._kept = model, batches, Kept()
        rows, length = (max(batch.ids.shape[axis] for batch in batches) for axis in (0, 1))
        self.parts = machine.Parts(rows, f"a row of {length} tokens")
        self.hidden = model.embed(batches, keep_on, self.parts)

    def forward(
        self,
        index: int,
        layer: torch.nn.Module,
        done: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Run all batches through a layer; its outputs replace its inputs.

        Args:
            index, layer: which.
            done: called after each part of a batch that went through whole.
            failed: called to drop what is left of a part that ran out of memory on the way.
        """

        def drop() -> None:
            self._kept.clear()
            failed()

        start = perf_counter()
        for number, hidden in enumerate(self.hidden):
            self.parts.run(len(hidden), self._part(index, layer, number, done), drop)
        machine.wait(self._model.device)
        self._model.seconds["forward"] += perf_counter() - start

    def _part(
        self, index: int, layer: torch.nn.Module, number: int, done: Callable[[], None]
    ) -> Callable[[int, int], None]:
        hidden = self.hidden[number]

        def run(start: int, stop: int) -> None:
            rows = hidden[start:stop].to(self._model.device, non_blocking=True)
            args, kwargs = self._arguments_of(number, start, stop, rows)[index]
            out = layer(rows, *args, **kwargs)
            hidden[start:stop].copy_(out[0] if isinstance(out, tuple) else out, non_blocking=True)
            done()

        return run

    def _arguments_of(self, number: int, start: int, stop: int, rows: torch.Tensor) -> list[Arguments]:
        """Batches of the same shape without a mask of their own share them."""
        part = self._batches[number].part(start, stop)
        key = tuple(rows.shape[:2]) if part.positions is None else (number, start, stop)
        found = self._kept.get(key)
        if found is None:
            found = self._model.arguments(part, rows)
            self._kept.put(key, found)
        return found


def _renumber(batches: Sequence[Batch]) -> tuple[Array, list[Batch]]:
    """The ids that occur, ascending, and the batches with every id replaced by its place among them."""
    import numpy as np

    used = np.unique(np.concatenate([batch.ids.reshape(-1) for batch in batches]))
    return used, [Batch(np.searchsorted(used, batch.ids), batch.positions) for batch in batches]
