"""Run an engine over texts and prompts, and measure how far it is from its source and whether it talks sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import events
from ..errors import RequestError, StageFailed
from ..types import Check, Findings, Measure, Runtime
from . import health, metrics
from .baseline import Answer, Baseline, answer, encoded, fitted
from .texts import Material, Prompt

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

#: Fewer questions than this that the source answers right say nothing.
_FEW = 3
_READS = "reads the source's tokens"
#: A prompt, the engine's answer and, if there is a baseline, the source's.
_Asked = tuple[Prompt, Answer, Answer | None]


def observe(
    runtime: Runtime,
    tokenizer: Tokenizer,
    material: Material,
    baseline: Baseline | None,
    *,
    window: int,
    max_tokens: int,
    not_compared: str = "there is no baseline",
) -> Findings:
    """Measure an engine; docs/reference/metrics.md defines every number.

    With a baseline its token ids are what the engine gets, so that the engine's own tokenizer can neither hide nor fake
    a difference; that one ends and decodes the engine's answers.

    Args:
        runtime: the engine. Without logits only its answers are judged.
        tokenizer: the engine's.
        baseline: the source's side; None if there is none, and nothing is compared.
        window, max_tokens: as the baseline was recorded.
        not_compared: why there is no baseline, if there is none.

    Raises:
        StageFailed: the texts are not those that the baseline was recorded with.
        ValueError: `window` or `max_tokens` is not.
    """
    if baseline is not None:
        _require_same(baseline, material, window, max_tokens)
    try:
        found = Findings() if baseline is None else _compared(runtime, baseline)
        said = answer(runtime, tokenizer, _prompts(tokenizer, material, baseline), max_tokens)
    except RequestError as error:
        return Findings(checks=(Check(_READS, "fail", note=error.message),))
    if baseline is None:
        note = f"{not_compared}: whether the engine says what its source says was not measured"
        found += Findings(checks=(Check("compared with the source", "warn", note=note),))
    reference = baseline.answers if baseline else [None] * len(said)
    asked = [(prompt, own, known) for prompt, own, known in zip(material.prompts, said, reference, strict=True) if own]
    return found + _left_out(len(said) - len(asked), len(said), max_tokens) + _spoken(asked)


def _prompts(tokenizer: Tokenizer, material: Material, baseline: Baseline | None) -> Sequence[Sequence[int] | None]:
    """Token ids of each prompt, as the source got them if there is a baseline; None if it did not."""
    if baseline is None:
        return encoded(tokenizer, material)
    return [known.prompt_ids if known else None for known in baseline.answers]


def _require_same(baseline: Baseline, material: Material, window: int, max_tokens: int) -> None:
    if (baseline.window, baseline.max_tokens) != (window, max_tokens):
        raise ValueError("the baseline was recorded with another window or max_tokens")
    if baseline.digest != material.digest:  # its key has theirs, so the file was another when the build was planned
        raise StageFailed("gate.texts changed while it was being used", "run the same command again")


def _compared(runtime: Runtime, baseline: Baseline) -> Findings:
    """What the logits over the texts say."""
    parts = []
    for number, (text, summary) in enumerate(zip(baseline.texts, baseline.summaries, strict=True)):
        events.progress("reading texts with the engine", number, len(baseline.texts), "texts")
        ids = fitted(text, runtime)
        if len(ids) < 2:
            return _not_by_logits("takes one token, and nothing comes after it")
        logits = runtime.logits(ids)
        if logits is None:
            return _not_by_logits("gives no logits")
        if logits.shape[1] < baseline.vocabulary:
            raise RequestError(f"the engine knows {logits.shape[1]:,} tokens, the source {baseline.vocabulary:,}")
        # Engines may pad the vocabulary to a round number.
        parts.append(metrics.compare(summary, logits[:, : baseline.vocabulary], ids))
        del logits  # before the next ones: they are as large as the texts are long
    return Findings((*_divergence(parts), _perplexity_ratio(parts)))


def _not_by_logits(why: str) -> Findings:
    note = f"this engine {why}: divergence, agreement and perplexity were not measured"
    return Findings(checks=(Check("compared by logits", "warn", note=note),))


def _divergence(parts: Sequence[metrics.Comparison]) -> list[Measure]:
    whole = metrics.joined(parts)
    means = [float(part.kl.mean()) for part in parts]
    worst = max(range(len(parts)), key=lambda i: math.inf if math.isnan(means[i]) else means[i])
    where = f"over {len(whole.kl):,} tokens; text {worst + 1} is worst with {means[worst]:.3g}"
    sure = int(whole.sure.sum())
    flipped = int((whole.sure & ~whole.agrees).sum())
    return [
        Measure("mean_kl", float(whole.kl.mean()), note=where),
        Measure("p99_kl", metrics.quantile(whole.kl, 0.99)),
        Measure("top1_agreement", float(whole.agrees.mean())),
        Measure(
            "confident_flips", flipped / max(sure, 1), note=f"{flipped:,} of {sure:,} tokens the source is sure of"
        ),
    ]


def _perplexity_ratio(parts: Sequence[metrics.Comparison]) -> Measure:
    whole = metrics.joined(parts)
    engine, source = metrics.perplexity(whole.engine), metrics.perplexity(whole.source)
    low, high = metrics.ratio_interval(parts)
    note = f"95 % interval {low:.4g} to {high:.4g}; perplexity {engine:.4g}, the source's {source:.4g}"
    return Measure("perplexity_ratio", metrics.perplexity(whole.engine - whole.source), note=note)


def _left_out(count: int, of: int, max_tokens: int) -> Findings:
    """How many prompts were not asked, if any."""
    if not count:
        return Findings()
    what = f"{count} of {of} prompts were not asked" if count < of else "no prompt was asked, no answer measured"
    note = f"{what}: with {max_tokens:,} tokens of an answer, source or engine takes no prompt so long"
    return Findings(checks=(Check("prompts that fit", "warn", of - count, note=note),))


def _spoken(asked: Sequence[_Asked]) -> Findings:
    """What the answers say, beside the source's where there are any."""
    if not asked:
        return Findings()
    samples = tuple(
        {"prompt": prompt.text, "text": own.text, **({"source": known.text} if known else {})}
        for prompt, own, known in asked
    )
    own_health = _health(asked)
    compared = [(prompt, own, known) for prompt, own, known in asked if known]
    if not compared:
        return Findings(tuple(Measure(name, value) for name, value in own_health.items()), samples=samples)
    known_health = _health([(prompt, known, known) for prompt, _, known in compared])
    measures = tuple(Measure(name, value, known_health[name]) for name, value in own_health.items())
    prefixes = [metrics.shared_prefix(known.ids, own.ids) for _, own, known in compared]
    prefix = Measure("greedy_prefix", sum(prefixes) / len(prefixes), note=f"mean of {len(prefixes)} answers")
    return Findings((prefix, *_questions(compared), *measures), samples=samples)


def _health(asked: Sequence[_Asked]) -> dict[str, float]:
    said = [own for _, own, _ in asked]
    foreign = [
        health.foreign_script(own.text, (prompt.text, known.text if known else "")) for prompt, own, known in asked
    ]
    return {
        "repetition": sum(health.repetition(a.ids) for a in said) / len(said),
        "compressibility": health.compressibility(a.text for a in said),
        "entropy": health.entropy(a.ids for a in said),
        "foreign_script": sum(foreign) / len(said),
        "empty_answers": sum(health.is_empty(a.text) for a in said) / len(said),
    }


def _questions(compared: Sequence[tuple[Prompt, Answer, Answer]]) -> list[Measure]:
    """Of the questions that the source answers right, how many the engine does; nothing if they are too few."""
    asked = [(prompt, own) for prompt, own, known in compared if prompt.is_answered_by(known.text)]
    if len(asked) < _FEW:
        return []
    wrong = [prompt.text for prompt, own in asked if not prompt.is_answered_by(own.text)]
    note = f"wrong: {' '.join(wrong)}" if wrong else f"all {len(asked)} that the source answers right"
    return [Measure("questions", 1 - len(wrong) / len(asked), note=note)]
