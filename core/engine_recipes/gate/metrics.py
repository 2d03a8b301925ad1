"""How far an engine's next token is from the source's: numpy, on logits and on what was kept of them.

The source's logits over a text are too large to keep (a vocabulary of 150,000 makes 600 kB a token), so a `Summary`
keeps the likeliest 512 ids of every position, and the probability of all others together. `compare` holds an engine's
logits against it. Logits that are NaN or infinite make numbers NaN or infinite; nothing raises or warns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
    Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]
    Truths = np.ndarray[Any, np.dtype[np.bool_]]

#: How many of the likeliest ids a summary keeps of each position.
KEPT = 512
#: The source is sure of a token that has this probability, and this many times that of the next.
SURE, SURE_TIMES = 0.5, 2.0
#: Positions that are worked on at once: with 150,000 ids a temporary array has 38 MB.
_ROWS = 64


@dataclass(frozen=True)
class Summary:
    """What is kept of a source's logits over one text of n tokens. Row i is about the token at i + 1.

    Attributes:
        ids: int32 [n - 1, K], the likeliest first.
        log_probs: float32 [n - 1, K], theirs, in nats.
        rest: float32 [n - 1], log-probability of all others together; -inf if there are none.
        scored: float32 [n - 1], log-probability of the token that comes.
    """

    ids: Integers
    log_probs: Floats
    rest: Floats
    scored: Floats

    def __getitem__(self, rows: slice) -> Summary:
        return Summary(self.ids[rows], self.log_probs[rows], self.rest[rows], self.scored[rows])


@dataclass(frozen=True)
class Comparison:
    """An engine against a source, over the same tokens.

    Attributes:
        kl: float64 [positions], KL divergence in nats; 0 or more, NaN or inf.
        agrees: bool [positions], both think the same token likeliest.
        sure: bool [positions], the source is sure of its likeliest token.
        source, engine: float64 [positions], log-probability of the token that comes.
    """

    kl: Floats
    agrees: Truths
    sure: Truths
    source: Floats
    engine: Floats


def summarise(logits: Floats, ids: Sequence[int], kept: int = KEPT) -> Summary:
    """What to keep of a source's logits.

    Args:
        logits: [n, vocabulary] over the n tokens of `ids`.
        ids: two or more, all in the vocabulary.
    """
    import numpy as np

    blocks = []
    for start in range(0, len(ids) - 1, _ROWS):
        block = logits[start : min(start + _ROWS, len(ids) - 1)]
        best = _likeliest(block, min(kept, logits.shape[1]))
        blocks.append((best, *_picked(block, best, ids[start + 1 : start + 1 + len(block)])))
    top, log_probs, rest, scored = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    as_floats = (array.astype(np.float32) for array in (log_probs, rest, scored))
    return Summary(top.astype(np.int32), *as_floats)


def compare(summary: Summary, logits: Floats, ids: Sequence[int]) -> Comparison:
    """Hold an engine's logits against a source's summary over the same tokens.

    KL(source‖engine) is taken over K + 1 events: the K kept ids, and any other. Merging events never makes it larger
    (data processing inequality, Cover and Thomas, Elements of Information Theory, 2.8 and 2.9), so it is a lower
    bound, and exact if K is the vocabulary.

    Args:
        logits: [n, vocabulary], as wide as the source's.
        ids: the n tokens.
    """
    import numpy as np

    parts = []
    for start in range(0, len(ids) - 1, _ROWS):
        block = logits[start : min(start + _ROWS, len(ids) - 1)]
        known = summary[start : start + len(block)]
        log_probs, rest, engine = _picked(block, known.ids, ids[start + 1 : start + 1 + len(block)])
        source = np.column_stack([known.log_probs, known.rest]).astype(np.float64)
        kl = _kl(source, np.column_stack([log_probs, rest]))
        agrees = (block.argmax(axis=1) == known.ids[:, 0]) & ~np.isnan(rest)
        parts.append((kl, agrees, _is_sure(known), known.scored.astype(np.float64), engine))
    return Comparison(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def joined(parts: Sequence[Comparison]) -> Comparison:
    """Comparisons over several texts as one."""
    import numpy as np

    return Comparison(*(np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])))


def perplexity(log_probs: Floats) -> float:
    """exp of the mean negative log-likelihood of a token."""
    import numpy as np

    with np.errstate(all="ignore"):
        return float(np.exp(-log_probs.mean()))


def quantile(values: Floats, share: float) -> float:
    """The smallest value that at least that share of the values does not exceed; NaN if one is NaN."""
    import numpy as np

    if np.isnan(values).any():
        return float("nan")
    return float(np.sort(values)[max(int(np.ceil(share * len(values))), 1) - 1])


def ratio_interval(texts: Sequence[Comparison], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the perplexity ratio, by percentiles of a bootstrap over texts.

    As many texts as there are are drawn with replacement, and their log-likelihoods and tokens summed, so that a text
    weighs what its tokens weigh. Tokens of one text depend on one another, so whole texts are drawn (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).
    """
    import numpy as np

    losses = np.array([(text.source - text.engine).sum() for text in texts])
    counts = np.array([len(text.source) for text in texts])
    drawn = np.random.default_rng(seed).integers(0, len(texts), (resamples, len(texts)))
    with np.errstate(all="ignore"):
        ratios = np.exp(losses[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return quantile(ratios, 0.025), quantile(ratios, 0.975)


def shared_prefix(source: Sequence[int], engine: Sequence[int]) -> float:
    """Tokens before the first that differs, as a share of the source's. 1 if all of the source's come; 0 to 1."""
    if not source:
        return float(not engine)
    shared = next((i for i, (a, b) in enumerate(zip(source, engine, strict=False)) if a != b), None)
    return (min(len(source), len(engine)) if shared is None else shared) / len(source)


def _likeliest(logits: Floats, kept: int) -> Integers:
    """Ids of the `kept` largest logits of each row, the largest first; of equals, the smallest id first."""
    import numpy as np

    width = logits.shape[1]
    found = np.sort(np.argpartition(logits, width - kept, axis=1)[:, width - kept :], axis=1)
    order = np.argsort(-np.take_along_axis(logits, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _picked(logits: Floats, ids: Integers, following: Sequence[int]) -> tuple[Floats, Floats, Floats]:
    """Log-probabilities, float64, of `ids` [rows, K], of all others together [rows], of `following` [rows]."""
    import numpy as np

    with np.errstate(all="ignore"):
        shifted = logits.astype(np.float32) - logits.max(axis=1, keepdims=True)
        raised = np.exp(shifted)
        total = np.log(raised.sum(axis=1, dtype=np.float64))
        np.put_along_axis(raised, ids, 0, axis=1)
        # Summed, and not one minus the others: of a small rest nothing would be left but rounding.
        rest = np.log(raised.sum(axis=1, dtype=np.float64)) - total
        log_probs = np.take_along_axis(shifted, ids, axis=1) - total[:, None]
        return log_probs, rest, shifted[np.arange(len(shifted)), np.asarray(following)] - total


def _kl(source: Floats, engine: Floats) -> Floats:
    """Σ p (log p - log q) over each row of log-probabilities; an event that the source never expects adds nothing."""
    import numpy as np

    with np.errstate(all="ignore"):
        chance = np.exp(source)
        terms = np.where(chance == 0, 0, chance * (source - engine))
        # Rounding may leave a little less than nothing.
        kl: Floats = np.maximum(terms.sum(axis=1), 0)
        return np.where(np.isnan(engine).any(axis=1), np.nan, kl)


def _is_sure(summary: Summary) -> Truths:
    import numpy as np

    chance = np.exp(summary.log_probs[:, :2])
    best, next_best = chance[:, 0], chance[:, 1:].max(axis=1, initial=0)
    sure: Truths = (best >= SURE) & (best >= SURE_TIMES * next_best)
    return sure
