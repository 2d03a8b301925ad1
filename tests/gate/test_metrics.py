"""Divergence, agreement and perplexity, against torch, transformers and lm-eval; and numbers that are none."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import lowered
import smollm2
from engine_recipes import Tokenizer
from engine_recipes.gate.metrics import (
    Comparison,
    compare,
    joined,
    perplexity,
    quantile,
    ratio_interval,
    shared_prefix,
    summarise,
)

Array = np.ndarray[Any, Any]
TEXT = "The Danube is the second-longest river in Europe, after the Volga. It begins in the Black Forest, where " * 2


def random_logits(seed: int, rows: int = 150, width: int = 300, spread: float = 3.0) -> tuple[Array, Array, list[int]]:
    """A source's logits, those of something near to it, and token ids."""
    random = np.random.default_rng(seed)
    source = random.normal(0, spread, (rows, width)).astype(np.float32)
    engine = source + random.normal(0, 0.5, source.shape).astype(np.float32)
    return source, engine, random.integers(0, width, rows).tolist()


def exact_kl(source: Array, engine: Array) -> Array:
    """torch's KL divergence of each row, in float64."""
    p, q = (torch.log_softmax(torch.from_numpy(logits).double(), dim=1) for logits in (source, engine))
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(dim=1).numpy()


def measured(source: Array, engine: Array, ids: list[int], kept: int = 512) -> Comparison:
    return compare(summarise(source, ids, kept), engine, ids)


# -- against others


def test_divergence_over_the_whole_vocabulary_is_torchs() -> None:
    source, engine, ids = random_logits(1)
    found = measured(source, engine, ids)
    np.testing.assert_allclose(found.kl, exact_kl(source, engine)[:-1], rtol=0, atol=1e-6)
    assert found.agrees.tolist() == (source.argmax(1) == engine.argmax(1))[:-1].tolist()
    assert 0 < found.agrees.mean() < 1


def test_sure_is_half_the_probability_and_twice_the_next_ones() -> None:
    source = np.log(np.array([[0.6, 0.35, 0.05], [0.6, 0.2, 0.2], [0.45, 0.2, 0.35], [0.9, 0.1, 0.0]]) + 1e-9)
    assert measured(source, source, [0, 1, 2, 0]).sure.tolist() == [False, True, False]


def test_perplexity_is_transformers_loss(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(lowered.write_lively(tmp_path / "hf"), dtype=torch.float32)
    ids = np.random.default_rng(3).integers(3, 256, 200).tolist()
    with torch.no_grad():
        out = model(torch.tensor([ids]), labels=torch.tensor([ids]))
    found = perplexity(summarise(out.logits[0].numpy(), ids).scored)
    assert found == pytest.approx(math.exp(out.loss), rel=1e-6)


@pytest.fixture(scope="module")
def model() -> Any:
    """SmolLM2 as transformers runs it in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2.folder(), dtype=torch.float32).eval()


def logits_of(model: Any, ids: list[int]) -> Array:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0].numpy())


def test_perplexity_is_lm_evals_rolling_one(model: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    judge = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(smollm2.folder()), device="cpu")
    (theirs,) = judge.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)], disable_tqdm=True)
    # It scores every token of the text, the first one after the token that stands for nothing.
    ids = [judge.prefix_token_id, *Tokenizer.load(smollm2.folder()).encode(TEXT)]
    ours = summarise(logits_of(model, ids), ids).scored
    assert len(ours) > 40
    assert perplexity(ours) == pytest.approx(math.exp(-theirs / len(ours)), rel=1e-5)


def test_on_a_real_model_what_is_not_kept_hardly_counts(model: Any) -> None:
    ids = Tokenizer.load(smollm2.folder()).encode(TEXT)
    source = logits_of(model, ids)
    engine = source + np.random.default_rng(5).normal(0, 0.3, source.shape).astype(np.float32)
    exact = exact_kl(source, engine)[:-1].mean()
    assert 0.85 * exact < measured(source, engine, ids).kl.mean() < exact
    everything = measured(source, engine, ids, source.shape[1]).kl.mean()
    assert everything == pytest.approx(exact, abs=1e-6)


# -- what always holds


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), kept=st.integers(1, 60), spread=st.floats(0.01, 30))
def test_divergence_is_never_negative_and_keeping_less_never_makes_it_larger(
    seed: int, kept: int, spread: float
) -> None:
    source, engine, ids = random_logits(seed, 12, 60, spread)
    found = measured(source, engine, ids, kept)
    assert (found.kl >= 0).all()
    assert (found.kl <= exact_kl(source, engine)[:-1] + 1e-5).all()
    assert measured(source, source, ids, kept).kl.max() < 1e-6


def test_equal_logits_agree_and_are_as_likely() -> None:
    source, _, ids = random_logits(2)
    found = measured(source, source, ids)
    assert found.agrees.all()
    np.testing.assert_allclose(found.source, found.engine, atol=1e-6)
    assert ratio_interval([found, found]) == pytest.approx((1, 1), abs=1e-6)


def test_a_constant_added_to_logits_changes_nothing() -> None:
    source, engine, ids = random_logits(4)
    np.testing.assert_allclose(
        measured(source + 40, engine - 40, ids).kl, measured(source, engine, ids).kl, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_make_numbers_that_are_none_and_no_noise(value: float) -> None:
    source, engine, ids = random_logits(6, 20, 30)
    engine[:] = value
    found = measured(source, engine, ids)
    assert np.isnan(found.kl).all() and not found.agrees.any()
    assert math.isnan(perplexity(found.engine)) and math.isnan(quantile(found.kl, 0.99))
    assert all(map(math.isnan, ratio_interval([found])))


def test_one_bad_logit_spoils_its_position_only() -> None:
    source, engine, ids = random_logits(7, 20, 30)
    engine[5, 3] = math.nan
    found = measured(source, engine, ids)
    assert np.flatnonzero(np.isnan(found.kl)).tolist() == [5]
    assert math.isnan(quantile(found.kl, 0.99)) and not found.agrees[5]


def test_what_an_engine_rules_out_and_the_source_does_not_is_infinitely_far() -> None:
    source, engine, ids = random_logits(8, 20, 30)
    engine[4, source[4].argmax()] = -math.inf
    found = measured(source, engine, ids)
    assert np.flatnonzero(np.isinf(found.kl)).tolist() == [4]
    assert quantile(found.kl, 0.99) == math.inf


# -- statistics


def test_a_quantile_is_a_value_that_was_there() -> None:
    values = np.arange(100.0)
    assert (quantile(values, 0.99), quantile(values, 0.5), quantile(values[:1], 0.99)) == (98.0, 49.0, 0.0)


def text_with(loss: float, tokens: int) -> Comparison:
    """A text on which the engine loses `loss` nats a token."""
    nothing = np.zeros(tokens)
    return Comparison(nothing, nothing == 0, nothing == 0, nothing, nothing - loss)


@settings(deadline=None, max_examples=30)
@given(loss=st.floats(-1, 3), tokens=st.integers(1, 50), count=st.integers(1, 8))
def test_texts_that_are_alike_leave_no_doubt(loss: float, tokens: int, count: int) -> None:
    low, high = ratio_interval([text_with(loss, tokens)] * count)
    assert low == pytest.approx(math.exp(loss)) and high == pytest.approx(math.exp(loss))


def test_the_interval_holds_the_ratio_weighs_by_tokens_and_is_the_same_each_time() -> None:
    texts = [text_with(0.01 * i, 100) for i in range(10)]
    low, high = ratio_interval(texts)
    whole = joined(texts)
    assert low < perplexity(whole.engine - whole.source) < high
    assert ratio_interval(texts) == (low, high)
    # What scipy.stats.bootstrap gives for the mean of 0 … 0.09, by percentiles: 0.027 to 0.063.
    assert (math.log(low), math.log(high)) == pytest.approx((0.027, 0.063), abs=0.003)
    short = [*(text_with(0.0, 1000) for _ in range(9)), text_with(9.0, 1)]
    assert ratio_interval(short)[1] < 1.01


@given(st.lists(st.integers(0, 5), max_size=12), st.lists(st.integers(0, 5), max_size=12))
def test_a_shared_prefix_is_a_share(a: list[int], b: list[int]) -> None:
    share = shared_prefix(a, b)
    assert 0 <= share <= 1 and shared_prefix(a, a) == 1
    assert (share == 1) == (b[: len(a)] == a if a else not b)


def test_a_prefix_ends_at_the_first_difference_or_where_the_engine_stops() -> None:
    assert shared_prefix([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert shared_prefix([1, 2, 3, 4], [1]) == 0.25
    assert shared_prefix([], [1]) == 0
