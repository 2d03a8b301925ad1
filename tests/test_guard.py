from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from engine_recipes import RequestError, Sampling, StageFailed
from engine_recipes.guard import Guarded, blamed
from engine_recipes.types import Provider

PROVIDER = Provider("engine", "evil", "acme.evil", "acme", "1.0")


class Engine:
    """A runtime that generates what it is told to."""

    max_seq_len = 77

    def __init__(self, generate: Callable[[], Any]) -> None:
        self.answer, self.closed = generate, False

    def generate(self, prompt: Any, sampling: Any, stop: Any = frozenset()) -> Any:
        return self.answer()

    def logits(self, ids: Any) -> Any:
        raise OSError("line one\nline two")

    def close(self) -> None:
        raise SystemExit(0)


def raising(error: BaseException) -> Callable[[], Any]:
    def generate() -> Any:
        raise error

    return generate


def later(*tokens: Any) -> Callable[[], Iterator[Any]]:
    def generate() -> Iterator[Any]:
        yield from tokens
        raise ValueError("at the end")

    return generate


@pytest.mark.parametrize(
    ("generate", "reason"),
    [
        (raising(ValueError("boo")), "ValueError: boo"),
        (raising(StopIteration()), "StopIteration"),
        (raising(type("Mute", (BaseException,), {"__str__": lambda self: 1 / 0})()), "Mute"),
        (lambda: None, "'NoneType' object is not iterable"),
        (lambda: ["a"], "'str' object cannot be interpreted as an integer"),
        (lambda: [1.0], "'float' object cannot be interpreted as an integer"),
        (lambda: [-1], "-1 is no token id"),
        (lambda: [10**30], "is no token id"),
        (later(1, 2), "ValueError: at the end"),
    ],
)
def test_an_engine_that_cannot_generate_is_two_lines_that_name_it(generate: Callable[[], Any], reason: str) -> None:
    with pytest.raises(StageFailed) as caught:
        list(Guarded(Engine(generate), PROVIDER).generate([1], Sampling()))
    assert caught.value.message.startswith("engine evil (acme 1.0) cannot generate: ")
    assert reason in caught.value.message
    assert "authors of acme" in caught.value.hint and "\n" not in str(caught.value.message)


def test_logits_and_closing_are_guarded_as_well_and_the_cause_is_kept() -> None:
    runtime = Guarded(Engine(list), PROVIDER)
    with pytest.raises(StageFailed, match="cannot be closed: SystemExit: 0"):
        runtime.close()
    with pytest.raises(StageFailed, match=r"cannot compute logits: OSError: line one\nreport this") as caught:
        runtime.logits([1])
    assert isinstance(caught.value.__cause__, OSError)


def test_tokens_come_one_by_one_as_int_and_other_attributes_are_the_runtimes_own() -> None:
    runtime = Guarded(Engine(later(np.int64(5), 6)), PROVIDER)
    tokens = runtime.generate([1], Sampling())
    assert (type(next(tokens)), next(tokens)) == (int, 6)
    tokens.close()  # type: ignore[attr-defined]
    assert runtime.max_seq_len == 77
    assert not hasattr(runtime, "generate_batch")


def test_what_an_engine_says_to_the_user_arrives_as_two_lines() -> None:
    with pytest.raises(RequestError) as caught, blamed(PROVIDER, "it failed"):
        raise RequestError("too\nlong", 3)  # type: ignore[arg-type]
    assert (caught.value.message, caught.value.hint) == ("too long", "3")


def test_an_interruption_is_nobodys_fault() -> None:
    with pytest.raises(KeyboardInterrupt):
        Guarded(Engine(raising(KeyboardInterrupt())), PROVIDER).generate([1], Sampling())
