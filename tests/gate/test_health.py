"""Signs of nonsense that need no reference."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from engine_recipes.gate.health import compressibility, entropy, foreign_script, is_empty, repetition, scripts


def test_a_loop_repeats_itself_and_a_sentence_does_not() -> None:
    assert repetition(list(range(48))) == 0
    assert repetition([1, 2, 3] * 16) == pytest.approx(1 - 3 / 45)
    assert repetition([7] * 7) == 0, "too short to tell"
    assert repetition([1, 2, 3, 4, 5, 1, 2, 3, 4, 6]) == pytest.approx(1 / 7)


def test_a_loop_compresses_and_noise_does_not() -> None:
    prose = "The sky is blue because air scatters short waves more than long ones, and blue light has short waves."
    noise = "xq7 Vb!z 9Kd# pw~R m0^Lt Yf&2 jH5% oc8@ uE3* gN1? sA6= iT4+ rZ}x"
    assert compressibility([noise]) < compressibility([prose]) < 2 < compressibility(["the the " * 30])
    assert compressibility([]) == compressibility(["", " "]) == 1


def test_entropy_is_that_of_the_counts() -> None:
    assert entropy([[1, 2], [3, 4]]) == 2
    assert entropy([[1, 1], [1, 2]]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)
    assert entropy([[5] * 9]) == entropy([[]]) == entropy([]) == 0


def test_letters_of_a_script_that_nobody_used_are_foreign() -> None:
    assert foreign_script("Grüße, naïve œuvre", ["hello"]) == 0
    assert foreign_script("ab вг", ["hello"]) == 0.5
    assert foreign_script("ab вг", ["hello", "да"]) == 0
    assert foreign_script("12 + 3 = 15 → ✓ 🙂", ["hello"]) == 0, "no letters"


def test_japanese_writes_three_scripts_at_once() -> None:
    assert foreign_script("東京タワーへ行きます。人々", ["首都はどこ"]) == 0


def test_characters_that_are_no_text_count_unless_the_answer_was_cut_in_one() -> None:
    assert foreign_script("a\ufffdb\x00", ["a\ufffd\x00"]) == pytest.approx(0.5)
    assert foreign_script("ab\ufffd", ["a"]) == 0
    assert foreign_script("a\tb\r\n", ["a"]) == 0


@pytest.mark.parametrize(
    ("text", "empty"), [("", True), (" \n\t", True), ("\ufffd ", True), (".", False), ("a", False)]
)
def test_an_answer_is_empty_if_nothing_can_be_seen(text: str, empty: bool) -> None:
    assert is_empty(text) is empty


@given(st.lists(st.integers(0, 9), max_size=60))
def test_repetition_and_entropy_are_bounded(ids: list[int]) -> None:
    assert 0 <= repetition(ids) < 1
    assert 0 <= entropy([ids]) <= math.log2(max(len(set(ids)), 1)) + 1e-9


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_text_at_all_can_be_judged(text: str, expected: str) -> None:
    assert 0 <= foreign_script(text, [expected]) <= 1
    assert 0 < compressibility([text]) < 1000
    assert scripts(text).total() <= len(text) and is_empty(text) in (True, False)
