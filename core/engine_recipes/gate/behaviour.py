"""Run an engine over texts and prompts, and measure how far it is from its source and whether it talks sense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .. import events
from ..errors import RequestError
from ..types import Check, Findings, Measure, Runtime
from . import health, metrics
from .baseline import Answer, Baseline, answer, encoded, fitted
from .texts import Material

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

#: Fewer questions than this that the source answers right say nothing.
_FEW = 3
_READS = "reads the source's tokens"


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
    """Measure an engine; docs/metrics.md defines every number.

    With a baseline its token ids are what the engine gets, so that the engine's own tokenizer can neither hide nor fake
    a difference; that one ends and decodes the engine's answers.

    Args:
        runtime: the engine. Without logits only its answers are judged.
        tokenizer: the engine's.
        baseline: the source's side; None if there is none, and nothing is compared.
        window, max_tokens: as the baseline was recorded.
        not_compared: why there is no baseline, if there is none.

    Raises:
        RequestError: the baseline was recorded with other texts or sizes.
    """
    if baseline is not None:
        _require_same(baseline, material, window, max_tokens)
    try:
        found = Findings() if baseline is None else _compared(runtime, baseline)
        prompts = encoded(tokenizer, material) if baseline is None else [said.prompt_ids for said in baseline.answers]
        said = answer(runtime, tokenizer, prompts, max_tokens)
    except RequestError as error:
        return Findings(checks=(Check(_READS, "fail", note=error.message),))
    if baseline is None:
        note = f"{not_compared}: whether the engine says what its source says was not measured"
        found += Findings(checks=(Check("compared with the source", "warn", note=note),))
    return found + _spoken(material, said, baseline)


def _require_same(baseline: Baseline, material: Material, window: int, max_tokens: int) -> None:
    if (baseline.digest, baseline.window, baseline.max_tokens) != (material.digest, window, max_tokens):
        raise RequestError(
            "the baseline was recorded with other texts, window or max_tokens", "record it again with these"
        )


def _compared(runtime: Runtime, baseline: Baseline) -> Findings:
    """What the logits over the texts say."""
    parts = []
    for number, (text, summary) in enumerate(zip(baseline.texts, baseline.summaries, strict=True)):
        events.progress("reading texts with the engine", number, len(baseline.texts), "texts")
        ids = fitted(text, runtime)
        logits = runtime.logits(ids)
        if logits is None:
            note = "this engine gives no logits: divergence, agreement and perplexity were not measured"
            return Findings(checks=(Check("compared by logits", "warn", note=note),))
        if logits.shape[1] < baseline.vocabulary:
            raise RequestError(f"the engine knows {logits.shape[1]:,} tokens, the source {baseline.vocabulary:,}")
        # Engines may pad the vocabulary to a round number.
        parts.append(metrics.compare(summary, logits[:, : baseline.vocabulary], ids))
        del logits  # before the next ones: they are as large as the texts are long
    return Findings((*_divergence(parts), _perplexity_ratio(parts)))


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


def _spoken(material: Material, said: Sequence[Answer], baseline: Baseline | None) -> Findings:
    """What the answers say, beside the source's where there are any."""
    reference = baseline.answers if baseline else [None] * len(said)
    samples = tuple(
        {"prompt": prompt.text, "text": own.text, **({"source": known.text} if known else {})}
        for prompt, own, known in zip(material.prompts, said, reference, strict=True)
    )
    if not said:
        return Findings()
    own_health = _health(material, said, baseline)
    if baseline is None:
        return Findings(tuple(Measure(name, value) for name, value in own_health.items()), samples=samples)
    known_health = _health(material, baseline.answers, baseline)
    measures = tuple(Measure(name, value, known_health[name]) for name, value in own_health.items())
    prefixes = [metrics.shared_prefix(a.ids, b.ids) for a, b in zip(baseline.answers, said, strict=True)]
    prefix = Measure("greedy_prefix", sum(prefixes) / len(prefixes), note=f"mean of {len(prefixes)} answers")
    return Findings((prefix, *_questions(material, said, baseline), *measures), samples=samples)


def _health(material: Material, said: Sequence[Answer], baseline: Baseline | None) -> dict[str, float]:
    expected = [
        (prompt.text, baseline.answers[i].text if baseline else "") for i, prompt in enumerate(material.prompts)
    ]
    foreign = [health.foreign_script(a.text, texts) for a, texts in zip(said, expected, strict=True)]
    return {
        "repetition": sum(health.repetition(a.ids) for a in said) / len(said),
        "compressibility": health.compressibility(a.text for a in said),
        "entropy": health.entropy(a.ids for a in said),
        "foreign_script": sum(foreign) / len(said),
        "empty_answers": sum(health.is_empty(a.text) for a in said) / len(said),
    }


def _questions(material: Material, said: Sequence[Answer], baseline: Baseline) -> list[Measure]:
    """Of the questions that the source answers right, how many the engine does; nothing if they are too few."""
    asked = [
        (prompt, own)
        for prompt, own, known in zip(material.prompts, said, baseline.answers, strict=True)
        if prompt.is_answered_by(known.text)
    ]
    if len(asked) < _FEW:
        return []
    wrong = [prompt.text for prompt, own in asked if not prompt.is_answered_by(own.text)]
    note = f"wrong: {' '.join(wrong)}" if wrong else f"all {len(asked)} that the source answers right"
    return [Measure("questions", 1 - len(wrong) / len(asked), note=note)]
