"""Engines against their source: the same, another, a broken one, and those that tell little."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowered
from engine_recipes import Findings, Runtime, StageFailed, Tokenizer, testing
from engine_recipes.gate import baseline, texts
from engine_recipes.gate.behaviour import observe
from engine_recipes.types import Measure, Sampling
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime

SIZES = {"window": 120, "max_tokens": 12}
COMPARED = ("mean_kl", "p99_kl", "top1_agreement", "confident_flips", "perplexity_ratio")
HEALTH = ("repetition", "compressibility", "entropy", "foreign_script", "empty_answers")
MATERIAL = texts.Material(
    ("The first text, which is read.", "Another one, and longer. " * 10, "def f(x):\n    return x\n"),
    tuple(texts.Prompt(text) for text in ("What?", "Why is it?", "Who?", "When?")),
)


class Other:
    """An engine with something wrong: what `bend` makes of the logits, or none at all."""

    def __init__(self, runtime: OnnxRuntime, bend: Any = None) -> None:
        self._runtime, self._bend, self.max_seq_len = runtime, bend, runtime.max_seq_len

    def logits(self, ids: Sequence[int]) -> Any:
        return None if self._bend is None else self._bend(self._runtime.logits(ids))

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        yield from self._runtime.generate(prompt, sampling, stop)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine with a tokenizer; beside it, in `baseline`, what it says."""
    work = tmp_path_factory.mktemp("source")
    folder = testing.write_tokenizer(lowered.build(lowered.write_lively(work / "hf"), work))
    (folder / "baseline").mkdir()
    runtime, tokenizer = OnnxRuntime(folder, {}), Tokenizer.load(folder)
    baseline.record(folder / "baseline", runtime, tokenizer, MATERIAL, **SIZES, about={})
    return folder


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of another model, with fewer tokens."""
    work = tmp_path_factory.mktemp("smaller")
    return testing.write_tokenizer(lowered.build(lowered.write_lively(work / "hf", vocab_size=128), work), 128)


def look(source: Path, runtime: Runtime, tokenizer: Tokenizer | None = None, **changes: Any) -> Findings:
    """Observe an engine against the source's baseline."""
    known = replace(baseline.read(source / "baseline"), **changes)
    return observe(runtime, tokenizer or Tokenizer.load(source), MATERIAL, known, **SIZES)


def by_name(found: Findings) -> dict[str, Measure]:
    assert len({measure.name for measure in found.measures}) == len(found.measures)
    return {measure.name: measure for measure in found.measures}


def test_a_source_is_like_itself(source: Path) -> None:
    found = look(source, OnnxRuntime(source, {}))
    measures = by_name(found)
    assert measures.keys() == {*COMPARED, "greedy_prefix", *HEALTH} and not found.checks
    assert measures["mean_kl"].value == pytest.approx(0, abs=1e-7)
    assert [measures[name].value for name in ("top1_agreement", "confident_flips", "greedy_prefix")] == [1, 0, 1]
    assert measures["perplexity_ratio"].value == pytest.approx(1, abs=1e-6)
    assert all(measures[name].value == measures[name].base for name in HEALTH)
    assert [sample["prompt"] for sample in found.samples] == [prompt.text for prompt in MATERIAL.prompts]
    assert all(sample["text"] == sample["source"] for sample in found.samples)
    assert Findings.from_json(json.loads(json.dumps(found.as_json()))) == found


def test_an_engine_that_computes_otherwise_is_seen(source: Path, tmp_path: Path) -> None:
    hf = lowered.write_lively(tmp_path / "hf", rope_theta=50.0)
    measures = by_name(look(source, OnnxRuntime(lowered.build(hf, tmp_path), {})))
    assert measures["mean_kl"].value > 1e-3 and measures["p99_kl"].value > measures["mean_kl"].value
    assert measures["top1_agreement"].value < 1 and measures["greedy_prefix"].value < 1
    assert "text " in measures["mean_kl"].note and "95 % interval" in measures["perplexity_ratio"].note


def test_an_engine_that_computes_nothing_sensible_is_measured_all_the_same(source: Path) -> None:
    found = look(source, Other(OnnxRuntime(source, {}), lambda logits: logits * math.nan))
    measures = by_name(found)
    assert all(math.isnan(measures[name].value) for name in ("mean_kl", "p99_kl", "perplexity_ratio"))
    assert measures["top1_agreement"].value == 0
    json.dumps(found.as_json(), allow_nan=False)


def test_an_engine_that_hides_its_logits_is_judged_by_its_answers(source: Path) -> None:
    found = look(source, Other(OnnxRuntime(source, {})))
    assert by_name(found).keys() == {"greedy_prefix", *HEALTH} and len(found.samples) == 4
    (check,) = found.checks
    assert (check.name, check.verdict) == ("compared by logits", "warn") and "were not measured" in check.note


def test_without_a_baseline_only_what_needs_none_is_measured(source: Path) -> None:
    found = observe(OnnxRuntime(source, {}), Tokenizer.load(source), MATERIAL, None, **SIZES)
    assert by_name(found).keys() == set(HEALTH) and all(measure.base is None for measure in found.measures)
    assert [(check.name, check.verdict) for check in found.checks] == [("compared with the source", "warn")]
    assert [sample.keys() for sample in found.samples] == [{"prompt", "text"}] * 4


def test_a_vocabulary_that_is_padded_is_the_same_and_one_that_is_smaller_fails(source: Path, smaller: Path) -> None:
    padded = Other(OnnxRuntime(source, {}), lambda logits: np.pad(logits, ((0, 0), (0, 8)), constant_values=99.0))
    assert by_name(look(source, padded))["mean_kl"].value == pytest.approx(0, abs=1e-7)
    for runtime in (Other(OnnxRuntime(source, {}), lambda logits: logits[:, :200]), OnnxRuntime(smaller, {})):
        found = look(source, runtime)
        assert [(check.name, check.verdict) for check in found.checks] == [("reads the source's tokens", "fail")]
        assert found.checks[0].note and not found.measures


def test_the_engines_own_tokenizer_changes_its_answers_and_not_what_it_computes(source: Path, tmp_path: Path) -> None:
    testing.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    words = list(settings["model"]["vocab"])
    settings["model"]["vocab"] = {word: i for i, word in enumerate(words[:3] + words[3:][::-1])}
    path.write_text(json.dumps(settings))
    found = look(source, OnnxRuntime(source, {}), Tokenizer.load(tmp_path))
    assert by_name(found)["mean_kl"].value == pytest.approx(0, abs=1e-7)
    assert any(sample["text"] != sample["source"] for sample in found.samples)


@pytest.mark.parametrize(("right", "value"), [(4, 0.75), (3, 2 / 3), (2, None)])
def test_questions_count_if_the_source_answers_three_or_more(source: Path, right: int, value: float | None) -> None:
    """The source's answers are replaced, and the engine's kept: it says what the prompts expect, but for the first."""
    runtime, tokenizer = OnnxRuntime(source, {}), Tokenizer.load(source)
    known = baseline.read(source / "baseline")
    said = [answer.text for answer in known.answers if answer]
    prompts = [texts.Prompt(p.text, (answer,)) for p, answer in zip(MATERIAL.prompts, said, strict=True)]
    prompts[0] = texts.Prompt("What?", ("no such word",))
    material = replace(MATERIAL, prompts=tuple(prompts))
    answers = [
        replace(answer, text=prompt.answers[0] if i < right else "")
        for i, (prompt, answer) in enumerate(zip(prompts, known.answers, strict=True))
        if answer
    ]
    known = replace(known, digest=material.digest, answers=tuple(answers))
    found = by_name(observe(runtime, tokenizer, material, known, **SIZES))
    assert ("questions" in found) == (value is not None)
    if value is not None:
        assert found["questions"].value == pytest.approx(value) and found["questions"].note == "wrong: What?"


def test_texts_that_changed_since_the_baseline_was_recorded_are_no_measure(source: Path) -> None:
    with pytest.raises(StageFailed, match="changed while it was being used") as caught:
        look(source, OnnxRuntime(source, {}), digest="0" * 64)
    assert caught.value.hint == "run the same command again"


@pytest.mark.parametrize("changes", [{"window": 121}, {"max_tokens": 11}])
def test_sizes_that_the_baseline_does_not_have_are_a_bug(source: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="another window or max_tokens"):
        look(source, OnnxRuntime(source, {}), **changes)


def narrow(source: Path, most: int) -> OnnxRuntime:
    """The source's engine, as if built for few tokens."""
    runtime = OnnxRuntime(source, {})
    runtime.max_seq_len = most
    return runtime


def room(source: Path) -> list[int]:
    """Tokens that each prompt and its answer may take."""
    return [len(ids) + SIZES["max_tokens"] for ids in baseline.encoded(Tokenizer.load(source), MATERIAL)]


def test_an_engine_that_takes_less_is_compared_over_what_it_takes(source: Path) -> None:
    runtime = narrow(source, 40)
    measures = by_name(look(source, runtime))
    known = baseline.read(source / "baseline")
    tokens = sum(min(len(text), 40) - 1 for text in known.texts)
    assert measures["mean_kl"].note.startswith(f"over {tokens} tokens")
    assert measures["mean_kl"].value == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("with_baseline", [True, False])
def test_prompts_that_an_engine_cannot_take_are_left_out_and_not_cut(source: Path, with_baseline: bool) -> None:
    needs = room(source)
    runtime, most = narrow(source, sorted(needs)[2]), sorted(needs)[2]
    if with_baseline:
        found = look(source, runtime)
        measures = by_name(found)
        assert (measures["greedy_prefix"].value, measures["greedy_prefix"].note) == (1, "mean of 3 answers")
        assert all(measures[name].value == measures[name].base for name in HEALTH)
    else:
        found = observe(runtime, Tokenizer.load(source), MATERIAL, None, **SIZES)
        assert by_name(found).keys() == set(HEALTH)
    fitting = [prompt.text for prompt, need in zip(MATERIAL.prompts, needs, strict=True) if need <= most]
    assert [sample["prompt"] for sample in found.samples] == fitting
    check = found.checks[-1]
    assert (check.name, check.verdict, check.value) == ("prompts that fit", "warn", 3)
    assert check.note.startswith("1 of 4 prompts were not asked")


def test_prompts_that_the_source_was_not_asked_are_not_asked(source: Path) -> None:
    known = baseline.read(source / "baseline")
    found = look(source, OnnxRuntime(source, {}), answers=(None, *known.answers[1:]))
    assert [sample["prompt"] for sample in found.samples] == [prompt.text for prompt in MATERIAL.prompts[1:]]
    assert by_name(found)["greedy_prefix"].value == 1
    assert [(check.name, check.value) for check in found.checks] == [("prompts that fit", 3)]


@pytest.mark.parametrize("most", [1, 2, 8])
def test_an_engine_that_takes_no_prompt_is_not_judged_by_answers(source: Path, most: int) -> None:
    found = look(source, narrow(source, most))
    assert by_name(found).keys() == (set(COMPARED) if most > 1 else set()) and not found.samples
    assert {check.name: check.verdict for check in found.checks} == {
        "prompts that fit": "warn",
        **({} if most > 1 else {"compared by logits": "warn"}),
    }
    assert "no prompt was asked" in found.checks[-1].note
