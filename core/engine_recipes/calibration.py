"""What calibrations share: text as rows of tokens, all of one length, never padded, no text seeing another.

A text is cut into windows of `seq_len` tokens. What is left of it, and texts that are shorter, fill rows one after
another: a text that does not fit into the rest of a row goes on in the next one, as a text of its own. In such a row
the positions start at 0 with each text, by which the model's code knows where to mask. So every token that goes into
a layer is text, and none of the statistics is about padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import events
from .decoder import SAME_INPUT, Decoder
from .errors import RequestError
from .stepping import Integers
from .tokenizer import Tokenizer

__all__ = ["SAME_INPUT", "Batch", "Rows", "check_length", "read_rows"]

#: Texts are read in order until there are so many times the rows that are asked for: enough to choose from, and a
#: file of gigabytes is not tokenised to its end.
_POOL = 2
#: Long texts are tokenised in parts of at most so many characters, cut after a line, or a word: a book is not
#: tokenised to its end for a few rows.
_PART = 1 << 16


def check_length(decoder: Decoder, seq_len: int) -> None:
    """Refuse rows that are longer than the model's positions: for `check_decoder`, before anything runs.

    Args:
        seq_len: the calibration's option of that name.

    Raises:
        RequestError: they are.
    """
    if seq_len > decoder.max_positions:
        raise RequestError(
            f"calib.seq_len = {seq_len} and the model has {decoder.max_positions} positions",
            f"--set calib.seq_len={decoder.max_positions} at most",
        )


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Attributes:
        ids: int64 [rows, length].
        positions: int64 [rows, length]; None if each row is one text, which needs no mask but the causal one.
    """

    ids: Integers
    positions: Integers | None

    def part(self, start: int, stop: int) -> Batch:
        """Some of its rows."""
        return Batch(self.ids[start:stop], None if self.positions is None else self.positions[start:stop])


@dataclass(frozen=True)
class Rows:
    """Tokens to calibrate with.

    Attributes:
        ids: int64 [rows, seq_len].
        positions: int64 [rows, seq_len], each token's place in its text.
        rest_ids, rest_positions: int64 [fewer than seq_len]: a last, shorter row; empty if there were enough rows.
    """

    ids: Integers
    positions: Integers
    rest_ids: Integers
    rest_positions: Integers

    @property
    def tokens(self) -> int:
        """How many there are."""
        return int(self.ids.size + self.rest_ids.size)

    @property
    def count(self) -> int:
        """How many rows, the shorter one included."""
        return len(self.ids) + bool(self.rest_ids.size)

    def batches(self, size: int) -> list[Batch]:
        """Batches of at most `size` rows: first the rows of one text, then those of several, then the shorter one."""
        import numpy as np

        several = (self.positions == 0).sum(axis=1) > 1
        found = []
        for packed in (False, True):
            ids, positions = self.ids[several == packed], self.positions[several == packed]
            for start in range(0, len(ids), size):
                part = slice(start, start + size)
                found.append(Batch(ids[part], positions[part] if packed else None))
        if self.rest_ids.size:
            one_text = np.count_nonzero(self.rest_positions == 0) == 1
            found.append(Batch(self.rest_ids[None], None if one_text else self.rest_positions[None]))
        return found


def read_rows(texts: Iterable[str], folder: Path, size: int, seq_len: int, seed: int) -> Rows:
    """Tokenise texts with a model's tokenizer and choose `size` rows of `seq_len` tokens.

    The same texts, tokenizer and numbers give the same rows: texts are read in order until there are twice
    as many as `size`, which `seed` shuffles. With fewer than `size` rows all are taken, and a warning says so.

    Args:
        texts: read only as far as needed.
        folder: has the model's tokenizer.json.

    Raises:
        RequestError: there is no text in them.
    """
    import numpy as np

    ids, positions = _fill(_pieces(texts, Tokenizer.load(folder), seq_len), seq_len, _POOL * size)
    if not ids.size:
        raise RequestError(
            "the calibration text has no tokens: it is empty, or only spaces and special tokens",
            "give a text file that is like what the model will read: --set calib.data=FILE.txt",
        )
    whole = len(ids) // seq_len
    rows, places = (array[: whole * seq_len].reshape(whole, seq_len) for array in (ids, positions))
    rest = slice(whole * seq_len, None) if whole < size else slice(0, 0)
    order = np.random.RandomState(seed).permutation(whole)[:size]
    chosen = Rows(rows[order], places[order], ids[rest], positions[rest])
    if whole < size:
        events.warn(
            f"the calibration text has {chosen.tokens:,} tokens, fewer than the {size} x {seq_len} asked for: "
            f"calibrating with {chosen.count} row{'s' if chosen.count > 1 else ''}"
        )
    return chosen


def _pieces(texts: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> Iterator[list[int]]:
    """Token ids of each text, in lists of at most `seq_len`. A text starts with the tokenizer's special tokens.

    Texts of nothing but white space and special tokens give nothing.
    """
    special = {token for text in tokenizer.special.values() for token in tokenizer.encode(text, special=False)}
    special |= set(tokenizer.encode(""))
    for text in texts:
        for start, part in _parts(text):
            ids = tokenizer.encode(part, special=not start) if part.strip() else []
            if not special.issuperset(ids):
                yield from (ids[first : first + seq_len] for first in range(0, len(ids), seq_len))


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """The parts of a text with their places in it."""
    start = 0
    while start < len(text):
        stop = start + _PART
        if stop < len(text):
            ends = (text.rfind(mark, start, stop) + 1 for mark in "\n ")
            stop = next((end for end in ends if end > start), stop)
        yield start, text[start:stop]
        start = stop


def _fill(pieces: Iterable[list[int]], seq_len: int, rows: int) -> tuple[Integers, Integers]:
    """Lay pieces into rows of `seq_len`.

    A whole window is a row of its own; shorter pieces share rows, in order, and the one that reaches over a row's
    end is cut there.

    Args:
        pieces: lists of at most `seq_len` ids, read until there are `rows` full rows.

    Returns:
        ids and positions, int64 [tokens]: the full rows one after another, then what is left.
    """
    import numpy as np

    full: list[tuple[Integers, Integers]] = []
    ids: list[int] = []  # of the row that is being filled
    places: list[int] = []
    for piece in pieces:
        if len(piece) == seq_len:
            full.append((np.array(piece, np.int64), np.arange(seq_len, dtype=np.int64)))
        else:
            room = seq_len - len(ids)
            ids += piece[:room]
            places += range(len(piece[:room]))
            if len(ids) == seq_len:
                full.append((np.array(ids, np.int64), np.array(places, np.int64)))
                ids, places = piece[room:], list(range(len(piece[room:])))
        if len(full) >= rows:
            break
    empty = np.zeros(0, np.int64)
    last = (np.array(ids, np.int64), np.array(places, np.int64)) if ids else (empty, empty)
    return np.concatenate([row for row, _ in full] + [last[0]]), np.concatenate(
        [place for _, place in full] + [last[1]]
    )
