"""Generation step by step, for engines that are fed tokens and give logits. Knows token ids, no text.

An engine writes two methods: `Run.feed`, and `Stepper.start`, and has `generate`, `generate_batch`, `logits`.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from .errors import RequestError
from .types import Sampling

if TYPE_CHECKING:
    import numpy as np

    #: A float32 array of any shape, of logits for the most part.
    Floats = np.ndarray[Any, np.dtype[np.float32]]
    #: An int64 array of any shape, of token ids for the most part.
    Integers = np.ndarray[Any, np.dtype[np.int64]]
else:  # numpy is not loaded for names of types
    Floats = Integers = Any

#: Tokens a run takes at most, of all sequences: attention scores need heads × CHUNK × cache × 4 bytes at once, and
#: logits CHUNK × vocabulary × 4, 300 MB at 150,000 words.
CHUNK = 512


class Run(abc.ABC):
    """Sequences of one length and their cache. Shapes: B sequences, S new tokens each.

    Attributes:
        piece: most tokens of each sequence that are fed at once.
    """

    def __init__(self, batch: int, vocab_size: int, piece: int) -> None:
        import numpy as np

        self.piece = piece
        self._last: Floats = np.empty((batch, 1, vocab_size), np.float32)

    @abc.abstractmethod
    def feed(self, ids: Integers, out: Floats) -> None:
        """Run int64 [B, S] at once; `out`, float32 [B, L, vocabulary], gets the logits of the last L tokens."""

    def prefill(self, ids: Integers) -> Floats:
        """Feed prompts, int64 [B, S]; logits after the last tokens, float32 [B, vocabulary]. Overwritten by `step`."""
        for start in range(0, ids.shape[1], self.piece):
            self.feed(ids[:, start : start + self.piece], self._last)
        last: Floats = self._last[:, 0]
        return last

    def step(self, tokens: Sequence[int]) -> Floats:
        """Feed one token for each sequence; logits as from `prefill`."""
        import numpy as np

        self.feed(np.array(tokens)[:, None], self._last)
        last: Floats = self._last[:, 0]
        return last

    def close(self) -> None:  # noqa: B027 (most caches go with the object)
        """Give back the cache."""


class Stepper(abc.ABC):
    """A loaded engine (see `engine_recipes.Runtime`). Each generation has a cache of its own.

    Attributes:
        session: what runs, the engine's own; None once it was closed.
        max_seq_len: most tokens of a prompt and its answer.
        vocab_size: of the logits.
    """

    def __init__(self, session: Any, max_seq_len: int, vocab_size: int) -> None:
        self.session = session
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size

    @abc.abstractmethod
    def start(self, length: int, batch: int) -> Run:
        """An empty cache for `batch` sequences of up to `length` tokens."""

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield new token ids; the prompt is looked at before the first is asked for.

        Raises:
            RequestError: the prompt is empty, too long, or has ids outside the vocabulary.
        """
        self._check(prompt)
        return self._until(stop, self._steps([prompt], sampling))

    def _until(self, stop: frozenset[int], steps: Iterator[list[int]]) -> Iterator[int]:
        for (token,) in steps:
            if token in stop:
                return
            yield token

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Yield one new token id for each prompt, step by step: what `generate` gives for each of them alone.

        Raises:
            RequestError: as for `generate`, or there are no prompts, or of different lengths.
        """
        if len({len(prompt) for prompt in prompts}) != 1:
            raise RequestError("a batch needs prompts of one length", "give at least one, and all as long as the first")
        for prompt in prompts:
            self._check(prompt)
        return self._steps(prompts, sampling)

    def _steps(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        import numpy as np

        length = len(prompts[0])
        # the last token is never fed back, so it needs no room in the cache
        most = min(sampling.max_tokens, self.max_seq_len - length + 1)
        if most < 1:
            return
        randoms = [np.random.default_rng(sampling.seed) for _ in prompts]
        with closing(self.start(length + most - 1, len(prompts))) as run:
            rows = run.prefill(np.array(prompts, np.int64))
            for left in reversed(range(most)):
                tokens = [choose(row, sampling.temperature, random) for row, random in zip(rows, randoms, strict=True)]
                yield tokens
                if left:
                    rows = run.step(tokens)

    def logits(self, ids: Sequence[int]) -> Floats:
        """Next-token logits for every position, float32 [len(ids), vocabulary].

        Raises:
            RequestError: as for `generate`.
        """
        return self._all_logits(ids)

    def stepwise_logits(self, ids: Sequence[int]) -> Floats:
        """As `logits`, but through the cache, one token at a time: the way `generate` works.

        Raises:
            RequestError: as for `generate`.
        """
        return self._all_logits(ids, 1)

    def _all_logits(self, ids: Sequence[int], piece: int = 0) -> Floats:
        import numpy as np

        self._check(ids)
        found = np.empty((len(ids), self.vocab_size), np.float32)
        with closing(self.start(len(ids), 1)) as run:
            piece = piece or run.piece
            for start in range(0, len(ids), piece):
                run.feed(np.array([ids[start : start + piece]], np.int64), found[None, start : start + piece])
        return found

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        self.session = None

    def _check(self, ids: Sequence[int]) -> None:
        if self.session is None:
            raise ValueError("this engine was closed")
        check_ids(ids, self.max_seq_len, self.vocab_size)


def check_ids(ids: Sequence[int], most: int, vocab_size: int, larger: str = "build.max_seq_len") -> None:
    """Refuse a prompt that an engine cannot take.

    Args:
        most: tokens that it takes.
        larger: what to set larger for a longer prompt.

    Raises:
        RequestError: it is empty, too long, or has ids outside the vocabulary.
    """
    if not len(ids):
        raise RequestError("the prompt is empty", "give at least one token")
    if len(ids) > most:
        raise RequestError(
            f"the prompt has {len(ids):,} tokens, this engine takes {most:,}",
            f"shorten it, or build with a larger --set {larger}",
        )
    if not 0 <= min(ids) <= max(ids) < vocab_size:
        raise RequestError(
            f"token ids from {min(ids)} to {max(ids)}, but the vocabulary is {vocab_size}",
            "use the tokenizer of this model",
        )


def choose(logits: Floats, temperature: float, random: np.random.Generator) -> int:
    """The next token: the likeliest at temperature 0, else drawn from softmax(logits / temperature).

    Args:
        logits: float32 [vocabulary].
        temperature: 0 or more.
        random: drawn from once, unless greedy.
    """
    import numpy as np

    if temperature <= 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    heights = np.cumsum(np.exp(scaled - scaled.max()))  # [vocabulary], not normalised
    return int(np.searchsorted(heights, random.random() * heights[-1], side="right"))
