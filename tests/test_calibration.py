from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine_recipes import RequestError, Tokenizer, calibration, events, read_texts, testing
from engine_recipes.calibration import Rows, _fill, _pieces, read_rows

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so again. " * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer that makes one token of each character."""
    return testing.write_tokenizer(tmp_path)


def warnings_of(collected: list[events.Event]) -> list[str]:
    return [event["text"] for event in collected if event["event"] == "warn"]


def spans(ids: np.ndarray, positions: np.ndarray) -> list[list[int]]:
    """The texts of a row, cut where positions start again."""
    starts = np.flatnonzero(positions == 0)
    for part in np.split(positions, starts[1:]):
        assert part.tolist() == list(range(len(part)))
    return [part.tolist() for part in np.split(ids, starts[1:])]


def test_a_long_text_becomes_windows(folder: Path) -> None:
    found = read_rows([TEXT], folder, size=4, seq_len=32, seed=0)
    assert (found.ids.shape, found.rest_ids.size, found.tokens, found.count) == ((4, 32), 0, 128, 4)
    assert (found.positions == np.arange(32)).all()
    text = Tokenizer.load(folder).encode(TEXT)
    for row in found.ids.tolist():
        assert any(text[start : start + 32] == row for start in range(0, len(text), 32))


def test_short_texts_share_rows_and_nothing_is_padded() -> None:
    ids, positions = _fill([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11], [12]], seq_len=4, rows=9)
    windows, rest = ids[:12].reshape(3, 4), ids[12:]
    assert [spans(*row) for row in zip(windows, positions[:12].reshape(3, 4), strict=True)] == [
        [[1, 2, 3], [4]],  # the second text goes on in the next row, as a text of its own
        [[6, 7, 8, 9]],
        [[5], [10, 11], [12]],
    ]
    assert rest.size == 0


@pytest.mark.parametrize("seed", range(5))
def test_no_token_is_lost_or_invented(seed: int) -> None:
    random = np.random.RandomState(seed)
    texts = [list(random.randint(0, 99, random.randint(1, 9))) for _ in range(30)]
    ids, positions = _fill(texts, seq_len=8, rows=1000)
    assert Counter(ids.tolist()) == Counter(token for text in texts for token in text)
    whole = len(ids) // 8 * 8
    for start in [*range(0, whole, 8), whole]:
        if start < len(ids):
            spans(ids[start : start + 8], positions[start : start + 8])


def test_too_little_text_is_used_up_and_said(folder: Path) -> None:
    seen: list[events.Event] = []
    with events.sink(seen.append):
        found = read_rows(["abcdefghij", "klmnop"], folder, size=9, seq_len=6, seed=0)
    assert found.ids.shape == (2, 6)
    assert (found.rest_ids.size, found.count, found.tokens) == (4, 3, 16)
    assert warnings_of(seen) == [
        "the calibration text has 16 tokens, fewer than the 9 x 6 asked for: calibrating with 3 rows"
    ]


def test_less_than_a_row(folder: Path) -> None:
    found = read_rows(["abc"], folder, size=1, seq_len=6, seed=0)
    assert (found.ids.shape, found.rest_positions.tolist()) == ((0, 6), [0, 1, 2])
    (batch,) = found.batches(4)
    assert (batch.ids.shape, batch.positions) == ((1, 3), None)


@pytest.mark.parametrize("texts", [[], [""], ["  \n\t", "\n"], ["<s>", "</s> ", "<s></s>"]])
def test_no_tokens(folder: Path, texts: list[str]) -> None:
    with pytest.raises(RequestError, match="has no tokens") as caught:
        read_rows([text.strip(" ") for text in texts], folder, size=4, seq_len=8, seed=0)
    assert len(str(caught.value).splitlines()) == 2


def test_the_seed_chooses(folder: Path) -> None:
    def chosen(seed: int) -> list[list[int]]:
        rows: list[list[int]] = read_rows([TEXT], folder, size=5, seq_len=16, seed=seed).ids.tolist()
        return rows

    assert chosen(1) == chosen(1) != chosen(2)


def test_a_large_file_is_not_read_to_its_end(folder: Path) -> None:
    read = 0

    def texts() -> Iterator[str]:
        nonlocal read
        for _ in range(1000):
            read += 1
            yield "a text of thirty-two characters."

    read_rows(texts(), folder, size=3, seq_len=32, seed=0)
    assert read == calibration._POOL * 3


def test_of_one_enormous_line_only_the_start_is_tokenised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "line.txt").write_bytes(b"0123456789" * 3_000_000)
    tokenised = 0
    encode = Tokenizer.encode

    def count(self: Tokenizer, text: str, special: bool = True) -> list[int]:
        nonlocal tokenised
        tokenised += len(text)
        return encode(self, text, special)

    monkeypatch.setattr(Tokenizer, "encode", count)
    found = read_rows(read_texts(str(folder / "line.txt")), folder, size=4, seq_len=64, seed=0)
    assert found.ids.shape == (4, 64)
    assert tokenised < 2 * calibration._PART


@pytest.mark.parametrize("text", ["line\n" * 9, "word " * 9, "x" * 45, "one long line " * 3 + "\nx"])
def test_long_texts_are_tokenised_in_parts(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(calibration, "_PART", 16)
    found = list(calibration._parts(text))
    parts = [part for _, part in found]
    assert "".join(parts) == text
    assert [start for start, _ in found] == [sum(map(len, parts[:i])) for i in range(len(parts))]
    assert max(map(len, parts)) <= 16
    assert text == "x" * 45 or all(part[-1] in " \n" for part in parts[:-1])


def test_special_tokens_only_at_a_text_s_start(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithStart:
        special = {"bos_token": "<s>"}  # noqa: RUF012

        def encode(self, text: str, special: bool = True) -> list[int]:
            return [1] * special + [1 if text == "<s>" else ord(letter) for letter in text.replace("<s>", "s")]

    monkeypatch.setattr(calibration, "_PART", 4)
    found = list(_pieces(["abcdefgh", "ij"], WithStart(), seq_len=3))  # type: ignore[arg-type]
    assert [len(piece) for piece in found] == [3, 2, 3, 1, 3]
    assert [piece[0] == 1 for piece in found] == [True, False, False, False, True]


def test_batches() -> None:
    positions = np.array([[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 0, 1]])
    found = Rows(np.arange(20).reshape(5, 4), positions, np.array([7, 8]), np.array([0, 0])).batches(2)
    assert [batch.ids[:, 0].tolist() for batch in found] == [[0, 8], [12], [4, 16], [7]]
    assert [batch.positions is None for batch in found] == [True, True, False, False]
