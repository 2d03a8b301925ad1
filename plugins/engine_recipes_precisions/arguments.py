"""What a model passes to its layers beside the hidden states: masks that keep texts apart, rotary tables."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from engine_recipes import StageFailed

if TYPE_CHECKING:
    import torch

    Arguments = tuple[tuple[Any, ...], dict[str, Any]]

#: Bytes of arguments that are kept from layer to layer. Working them out again takes about a tenth of the time of a
#: small model's layer, less of a larger one's; masks of many long rows would fill the device.
KEPT_BYTES = 256 << 20


class Kept:
    """The arguments of parts of batches, as long as they are few."""

    def __init__(self) -> None:
        self._found: dict[Hashable, list[Arguments]] = {}
        self._bytes = 0

    def get(self, key: Hashable) -> list[Arguments] | None:
        """What was put there, if it was kept."""
        return self._found.get(key)

    def put(self, key: Hashable, calls: list[Arguments]) -> None:
        """Keep the arguments of all layers, unless they are too many."""
        size = nbytes(calls)
        if self._bytes + size <= KEPT_BYTES:
            self._found[key] = calls
            self._bytes += size

    def clear(self) -> None:
        """Drop everything."""
        self._found.clear()
        self._bytes = 0


def nbytes(calls: list[Arguments]) -> int:
    """Bytes of all tensors among the arguments; layers share most of them."""
    import torch

    sizes: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sizes[id(value)] = value.nbytes
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    look(calls)
    return sum(sizes.values())


def keep_apart(calls: list[Arguments], positions: torch.Tensor) -> list[Arguments]:
    """Add to the layers' masks that no text of a row sees another.

    transformers does that by itself where positions start again, but it may stop to do so, without a word. Its own
    masks stay: a layer with a sliding window sees less than the whole text.

    Args:
        calls: the arguments of each layer.
        positions: [rows, length], 0 where a text starts.

    Raises:
        StageFailed: the layers take no mask.
    """
    allowed = _own_text(positions)
    done: dict[int, torch.Tensor] = {}  # layers share masks
    found = []
    for args, kwargs in calls:
        if "attention_mask" not in kwargs:
            raise StageFailed(
                "this model of transformers passes no attention_mask to its layers, so texts in one row see each other",
                "calibrate with texts of at least calib.seq_len tokens, or with another version of transformers",
            )
        mask = kwargs["attention_mask"]
        if id(mask) not in done:
            done[id(mask)] = _both(mask, allowed)
        found.append((args, {**kwargs, "attention_mask": done[id(mask)]}))
    return found


def _own_text(positions: torch.Tensor) -> torch.Tensor:
    """Which token sees which, bool [rows, 1, length, length]: those before it in its own text, and itself."""
    import torch

    text = (positions == 0).cumsum(-1)
    length = positions.shape[-1]
    before = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    return ((text[:, :, None] == text[:, None, :]) & before)[:, None]


def _both(mask: torch.Tensor | None, allowed: torch.Tensor) -> torch.Tensor:
    """A mask in the form that transformers chose, bool or added to the scores, that also forbids the rest."""
    import torch

    if mask is None:  # it relies on the attention being causal
        return allowed
    if mask.dtype is torch.bool:
        return mask & allowed
    return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
