from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine_recipes import RequestError, Sampling
from engine_recipes.stepping import check_ids, choose
from stepped import VOCABULARY, Summing

PROMPT = list(range(1, 21))  # longer than two pieces of 8


def greedy(engine: Summing, prompt: list[int], count: int) -> list[int]:
    """What an engine must say, from its logits of all tokens at once."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_generation_says_what_the_logits_say() -> None:
    engine = Summing()
    assert list(engine.generate(PROMPT, Sampling(max_tokens=6))) == greedy(engine, PROMPT, 6)


def test_a_long_prompt_is_fed_in_pieces_and_answers_one_token_at_a_time() -> None:
    engine = Summing()
    list(engine.generate(PROMPT, Sampling(max_tokens=3)))
    assert engine.fed == [(1, 8), (1, 8), (1, 4), (1, 1), (1, 1)]


def test_the_last_token_needs_no_room_in_the_cache() -> None:
    engine = Summing(max_seq_len=22)
    assert len(list(engine.generate(PROMPT, Sampling(max_tokens=50)))) == 3
    assert engine.lengths == [(22, 1)]


def test_generation_ends_before_a_stop_token_and_gives_the_cache_back() -> None:
    engine = Summing()
    said = greedy(engine, PROMPT, 6)
    engine.open = 0
    stop = said[3]
    assert list(engine.generate(PROMPT, Sampling(max_tokens=6), frozenset({stop}))) == said[: said.index(stop)]
    assert engine.open == 0


def test_an_answer_that_is_given_up_gives_its_cache_back() -> None:
    engine = Summing()
    answer = engine.generate(PROMPT, Sampling(max_tokens=6))
    next(answer)
    assert engine.open == 1
    answer.close()  # type: ignore[attr-defined]
    assert engine.open == 0


def test_no_tokens_are_wanted_and_none_come() -> None:
    engine = Summing()
    assert list(engine.generate(PROMPT, Sampling(max_tokens=0))) == []
    assert engine.lengths == []


def test_a_batch_says_what_each_prompt_says_alone() -> None:
    engine = Summing()
    prompts = [PROMPT, PROMPT[::-1], [5] * len(PROMPT)]
    alone = [list(engine.generate(prompt, Sampling(max_tokens=5))) for prompt in prompts]
    together = [list(row) for row in zip(*engine.generate_batch(prompts, Sampling(max_tokens=5)), strict=True)]
    assert together == alone


def test_a_batch_draws_for_each_prompt_what_it_draws_alone() -> None:
    engine, sampling = Summing(), Sampling(max_tokens=6, temperature=2.0, seed=4)
    alone = list(engine.generate(PROMPT, sampling))
    assert list(engine.generate_batch([PROMPT, PROMPT], sampling)) == [[token, token] for token in alone]


@pytest.mark.parametrize("prompts", [[], [[1, 2], [1]]])
def test_a_batch_of_different_lengths_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(RequestError, match="prompts of one length"):
        Summing().generate_batch(prompts, Sampling())


def test_logits_are_the_same_in_pieces_and_step_by_step() -> None:
    engine, whole = Summing(), Summing(piece=64)
    expected = whole.logits(PROMPT)
    assert expected.shape == (len(PROMPT), VOCABULARY) and expected.dtype == np.float32
    np.testing.assert_allclose(engine.logits(PROMPT), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(engine.stepwise_logits(PROMPT), expected, rtol=1e-5, atol=1e-5)
    assert engine.fed[-len(PROMPT) :] == [(1, 1)] * len(PROMPT)
    assert engine.open == 0


@pytest.mark.parametrize(
    ("ids", "what"),
    [
        ([], "empty"),
        ([1] * 65, "65 tokens, this engine takes 64"),
        ([VOCABULARY], "from 40 to 40"),
        ([-1, 3], "from -1"),
    ],
)
def test_a_prompt_that_cannot_be_taken_is_refused_before_any_token_is_asked_for(ids: list[int], what: str) -> None:
    engine = Summing()
    calls: list[Any] = [lambda: engine.generate(ids, Sampling()), lambda: engine.logits(ids)]
    for call in [*calls, lambda: engine.generate_batch([ids], Sampling()), lambda: engine.stepwise_logits(ids)]:
        with pytest.raises(RequestError, match=what):
            call()
    assert engine.fed == []


def test_a_prompt_that_is_too_long_says_which_option_to_raise() -> None:
    with pytest.raises(RequestError) as error:
        check_ids([1] * 9, 8, VOCABULARY, larger="build.max_input_len")
    assert "--set build.max_input_len" in error.value.hint


def test_a_closed_engine_says_so_and_closes_twice() -> None:
    engine = Summing()
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.logits([1])


def test_choosing_is_greedy_at_temperature_0() -> None:
    random = np.random.default_rng(0)
    before = random.bit_generator.state
    assert choose(np.array([0.0, 3.0, 2.9], np.float32), 0.0, random) == 1
    assert random.bit_generator.state == before


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    random, logits = np.random.default_rng(0), np.array([1.0, -50.0, 2.0, 0.0], np.float32)
    temperature = 0.8
    drawn = np.bincount([choose(logits, temperature, random) for _ in range(4000)], minlength=4) / 4000
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    np.testing.assert_allclose(drawn, expected, atol=0.025)
    assert drawn[1] == 0


def test_large_logits_do_not_overflow_when_drawn() -> None:
    assert choose(np.array([3e38, -3e38, 1e30], np.float32), 0.5, np.random.default_rng(0)) == 0
