"""Calibration `awq`: what each linear layer's inputs are multiplied by before its weights become 4-bit numbers.

The maxima that `amax` finds are measured in the same pass, so that a quantised KV cache needs no second one.
"""

from __future__ import annotations

import contextlib
from time import perf_counter
from typing import TYPE_CHECKING, Any

from engine_recipes import StageContext, checkpoint, hookimpl

from . import awq_search
from .amax import Maxima, check_decoder, measure

if TYPE_CHECKING:
    import numpy as np
    import torch

    from .amax import Forward

    Array = np.ndarray[Any, np.dtype[Any]]

__all__ = ["check_decoder"]

#: Linear layers that read the same input; within it, those whose weights are one matrix in the checkpoint and so have
#: one scale, which is searched for all of them at once.
INPUTS = ((("q", "k", "v"),), (("dense",),), (("gate",), ("up",)), (("down",),))
#: Columns of XᵀX that are worked out at a time: wide enough for a GPU, narrow enough to leave out nearly half.
BLOCK = 2048


@hookimpl
def calibrate(context: StageContext) -> None:
    """Search scales. Options: those of `amax`, and `group_size`: 0, 64 or 128 weights that share a step."""
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        group_size = checkpoint.choose_group_size(source.decoder, int(context.options["group_size"]))
        measure(context, source, Awq(source, group_size))


class Awq(Maxima):
    """Sums over all tokens of what goes into the linear layers, and the search that needs nothing else."""

    method = "awq"

    def __init__(self, source: checkpoint.SourceCheckpoint, group_size: int) -> None:
        super().__init__(source)
        self.decoder, self.group_size = source.decoder, group_size
        self.about = {"group_size": group_size}
        self.seconds = {"search": 0.0}

    def extra_bytes(self) -> int:
        """Sums of all four inputs, and the half of each that is to be added."""
        d = self.decoder
        widths = (d.hidden_size, d.heads * d.head_size, d.hidden_size, d.intermediate_size)
        return 6 * sum(width**2 for width in widths)

    def layer(self, index: int, layer: torch.nn.Module, forward: Forward) -> dict[str, Array]:
        """See `Maxima.layer`; adds `<linear>.pre_quant_scale`, float32 [in]."""
        sums = [InputSums() for _ in INPUTS]
        with contextlib.ExitStack() as stack:
            for group, total in zip(INPUTS, sums, strict=True):
                hook = self.module(layer, group[0][0]).register_forward_pre_hook(total.look)
                stack.callback(hook.remove)
            self._max_calibrate(layer, lambda: forward(lambda: _add(sums), lambda: _drop(sums)))
        found = self.read(index, layer)
        found.update(self._search(index, layer, sums))
        return found

    def _search(self, index: int, layer: torch.nn.Module, sums: list[InputSums]) -> dict[str, Array]:
        import torch

        start = perf_counter()
        scales = {}
        for group, total in zip(INPUTS, sums, strict=True):
            gram, mean = total.gram(), total.absolute / total.tokens
            for roles in group:
                weights = [module.weight for module in dict.fromkeys(self.module(layer, role) for role in roles)]
                weight = weights[0] if len(weights) == 1 else torch.cat(weights)
                scale = awq_search.search(weight, gram, mean, self.group_size)
                scales.update({f"{self.names[role].format(index)}.pre_quant_scale": scale for role in roles})
        found = {name: scale.cpu().numpy() for name, scale in scales.items()}
        self.seconds["search"] += perf_counter() - start
        return found


def _add(sums: list[InputSums]) -> None:
    for total in sums:
        total.add()


def _drop(sums: list[InputSums]) -> None:
    for total in sums:
        total.drop()


class InputSums:
    """What is kept of all that goes into a linear layer.

    Attributes:
        absolute: sum of |x| over all tokens, float32 [in].
        tokens: how many.
    """

    absolute: torch.Tensor
    _gram: torch.Tensor

    def __init__(self) -> None:
        self.tokens = 0
        self._noted: tuple[list[torch.Tensor], torch.Tensor, int] | None = None

    def look(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook: work out what to add for this input. It counts only after `add`: if the device runs out of memory
        further on in the layer, the same rows come again."""
        import torch

        x = args[0].flatten(0, -2)
        if not self.tokens:
            self._gram = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            self.absolute = torch.zeros(x.shape[1], device=x.device)
        products = [_product(x[:, :stop], x[:, start:stop]) for start, stop in _columns(x.shape[1])]
        self._noted = (products, x.abs().sum(0, dtype=torch.float32), len(x))

    def add(self) -> None:
        """Add what was noted last. Takes no memory."""
        assert self._noted is not None
        products, absolute, tokens = self._noted
        self._noted = None
        for (start, stop), product in zip(_columns(len(self._gram)), products, strict=True):
            self._gram[:stop, start:stop] += product
        self.absolute += absolute
        self.tokens += tokens

    def drop(self) -> None:
        """Forget what was noted last, which is as large as half the sums: the device ran out of memory since."""
        self._noted = None

    def gram(self) -> torch.Tensor:
        """XᵀX over all tokens, float32 [in, in]."""
        for start, stop in _columns(len(self._gram)):
            self._gram[start:stop, :start] = self._gram[:start, start:stop].T
        return self._gram


def _columns(width: int) -> list[tuple[int, int]]:
    """XᵀX is worked out some columns at a time, down to the diagonal: what is below is the same mirrored."""
    return [(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ right, rounded to their dtype only where the device cannot give float32 sums of bfloat16 products."""
    import torch

    if left.is_cuda and left.dtype is not torch.float32:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return torch.mm(left.T, right)
