from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine_recipes import Check, testing
from engine_recipes.checks import CACHE_LIMITS, ROUNDING_LIMITS, judge_numbers, judge_vocabulary
from stepped import VOCABULARY, Summing


def verdicts(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.verdict for check in checks}


def test_an_engine_that_is_right_passes() -> None:
    found = judge_numbers(Summing(), "float32", ())
    assert verdicts(found) == {"logits are finite": "pass", "cache agrees with prefill": "pass"}
    assert found[1].value is not None and found[1].value < 1e-5


@pytest.mark.parametrize("compute", CACHE_LIMITS)
def test_a_cache_that_forgets_fails_in_every_type(compute: str) -> None:
    found = judge_numbers(Summing(fault="forgets"), compute, ROUNDING_LIMITS)
    assert verdicts(found)["cache agrees with prefill"] == "fail"


def test_a_cache_that_is_a_little_wrong_fails_unless_rounding_explains_it() -> None:
    engine = Summing(fault="drifts")
    assert verdicts(judge_numbers(engine, "float32", ()))["cache agrees with prefill"] == "fail"
    assert verdicts(judge_numbers(engine, "float16", ["int8"]))["cache agrees with prefill"] == "pass"


def test_the_limit_is_the_loosest_of_what_is_rounded_to() -> None:
    for compute, rounding, limit in (
        ("float32", [], CACHE_LIMITS["float32"]),
        ("float16", ["int8", "float8_e4m3fn"], ROUNDING_LIMITS["float8_e4m3fn"]),
        ("bfloat16", ["int8"], CACHE_LIMITS["bfloat16"]),
    ):
        assert judge_numbers(Summing(), compute, rounding)[1].limit == limit


def test_one_number_that_is_none_fails_and_ends_the_matter() -> None:
    (only,) = judge_numbers(Summing(piece=1, fault="breaks"), "float32", ())
    assert (only.name, only.verdict) == ("logits are finite", "fail")
    assert only.value and only.value >= 1


def test_an_engine_that_hides_its_logits_is_not_judged_by_them() -> None:
    class Hiding(Summing):
        def logits(self, ids: Sequence[int]) -> Any:
            return None

    (only,) = judge_numbers(Hiding(), "float32", ())
    assert (only.name, only.verdict) == ("logits are finite", "not run")


def test_an_engine_for_short_sequences_is_judged_on_what_it_takes() -> None:
    engine = Summing(max_seq_len=5)
    assert set(verdicts(judge_numbers(engine, "float32", ())).values()) == {"pass"}
    assert engine.lengths == [(5, 1), (5, 1)]


@pytest.mark.parametrize(("size", "verdict"), [(VOCABULARY, "pass"), (38, "pass"), (30, "warn"), (44, "fail")])
def test_a_tokenizer_is_held_against_the_engines_rows(tmp_path: Path, size: int, verdict: str) -> None:
    testing.write_tokenizer(tmp_path, size)
    check = judge_vocabulary(Summing(), tmp_path)
    assert (check.verdict, check.value, check.limit) == (verdict, size, VOCABULARY)


def test_an_engine_without_a_tokenizer_is_warned_of(tmp_path: Path) -> None:
    assert judge_vocabulary(Summing(), tmp_path).verdict == "warn"
