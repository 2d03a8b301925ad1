"""What is kept of a source: written, read back, and refused when it is damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowered
import tiny
from engine_recipes import RequestError, Tokenizer, testing
from engine_recipes.events import sink
from engine_recipes.gate import baseline
from engine_recipes.gate.metrics import summarise
from engine_recipes.gate.texts import Material, Prompt
from engine_recipes.types import Sampling
from engine_recipes_engines.onnxruntime.runtime import OnnxRuntime

MATERIAL = Material(("A first text to read.", "x", "Another one, " * 20), (Prompt("What?"), Prompt("Why?", ("b",))))
SIZES = {"window": 100, "max_tokens": 9}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny engine with a tokenizer, made once for this file."""
    work = tmp_path_factory.mktemp("engine")
    return testing.write_tokenizer(lowered.build(lowered.write_lively(work / "hf"), work))


@pytest.fixture
def recorded(folder: Path, tmp_path: Path) -> Path:
    """A baseline of it."""
    out = tmp_path / "baseline"
    out.mkdir()
    baseline.record(out, OnnxRuntime(folder, {}), Tokenizer.load(folder), MATERIAL, **SIZES, about={"reference": "r"})
    return out


def test_what_was_recorded_is_what_is_read(folder: Path, recorded: Path) -> None:
    runtime, tokenizer, found = OnnxRuntime(folder, {}), Tokenizer.load(folder), baseline.read(recorded)
    assert (found.about, found.window, found.max_tokens, found.vocabulary) == ({"reference": "r"}, 100, 9, 256)
    assert found.digest == MATERIAL.digest
    # The second text has one token, which nothing comes after; the third is cut to the window.
    ids = [tokenizer.encode(MATERIAL.texts[0]), tokenizer.encode(MATERIAL.texts[2])[:100]]
    assert [list(text) for text in found.texts] == ids
    for text, summary in zip(ids, found.summaries, strict=True):
        expected = summarise(runtime.logits(text), text)
        for name in ("ids", "log_probs", "rest", "scored"):
            np.testing.assert_array_equal(getattr(summary, name), getattr(expected, name))
    listed = json.loads((recorded / baseline.FACTS).read_text())["texts"]
    assert listed[0]["log_likelihood"] == pytest.approx(float(found.summaries[0].scored.sum()), rel=1e-5)


def test_prompts_go_through_the_chat_template_and_are_answered_greedily(folder: Path, recorded: Path) -> None:
    runtime, tokenizer = OnnxRuntime(folder, {}), Tokenizer.load(folder)
    for prompt, answer in zip(MATERIAL.prompts, baseline.read(recorded).answers, strict=True):
        assert answer is not None
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt.text}]), special=False)
        assert list(answer.prompt_ids) == ids
        assert list(answer.ids) == list(runtime.generate(ids, Sampling(9), tokenizer.stop_ids))
        assert answer.text == tokenizer.decode(answer.ids)


def test_without_a_chat_template_prompts_are_plain_text(folder: Path, tmp_path: Path) -> None:
    testing.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    tokenizer = Tokenizer.load(tmp_path)
    assert baseline.encoded(tokenizer, MATERIAL) == [tokenizer.encode("What?"), tokenizer.encode("Why?")]


def test_progress_is_told(folder: Path, tmp_path: Path) -> None:
    said: list[dict[str, Any]] = []
    with sink(said.append):
        baseline.record(tmp_path, OnnxRuntime(folder, {}), Tokenizer.load(folder), MATERIAL, **SIZES, about={})
    assert {event["unit"] for event in said} == {"texts", "prompts"}
    assert all(event["done"] < event["total"] for event in said)


class Narrow:
    """A runtime that takes few tokens, and fails if it is given more."""

    def __init__(self, most: int = 16) -> None:
        self.max_seq_len = most
        self.read: list[int] = []
        self.asked: list[list[int]] = []

    def logits(self, ids: Sequence[int]) -> Any:
        assert len(ids) <= self.max_seq_len
        self.read.append(len(ids))
        return np.zeros((len(ids), 256), np.float32)

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        assert len(prompt) + sampling.max_tokens <= self.max_seq_len
        self.asked.append(list(prompt))
        yield from [5] * sampling.max_tokens

    def close(self) -> None:
        pass


def test_texts_are_cut_to_what_the_model_takes_and_prompts_are_asked_whole_or_not_at_all(
    folder: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.load(folder)
    longer, shorter = baseline.encoded(tokenizer, MATERIAL)
    assert len(longer) == len(shorter) + 1
    most = len(shorter) + SIZES["max_tokens"]
    runtime = Narrow(most)
    baseline.record(tmp_path, runtime, tokenizer, MATERIAL, **SIZES, about={})
    assert runtime.read == [min(len(tokenizer.encode(MATERIAL.texts[i])), most) for i in (0, 2)]
    assert runtime.asked == [shorter]
    first, second = baseline.read(tmp_path).answers
    assert first is None and second is not None
    assert (list(second.prompt_ids), list(second.ids)) == (shorter, [5] * 9)


def test_a_source_that_takes_no_prompt_is_refused_before_anything_is_run(folder: Path, tmp_path: Path) -> None:
    runtime = Narrow()
    with pytest.raises(RequestError, match=r"no prompt fits the model's 16 tokens with gate\.max_tokens 9") as caught:
        baseline.record(tmp_path, runtime, Tokenizer.load(folder), MATERIAL, **SIZES, about={})
    assert "--set gate.max_tokens=" in caught.value.hint and not runtime.read and not list(tmp_path.glob("baseline*"))


def test_what_a_runtime_tells_of_itself_is_kept(folder: Path, tmp_path: Path) -> None:
    runtime: Any = Narrow(99)
    runtime.about = {"dtype": "bfloat16", "device": "cuda"}
    baseline.record(tmp_path, runtime, Tokenizer.load(folder), MATERIAL, **SIZES, about={"reference": "r"})
    assert baseline.read(tmp_path).about == {"reference": "r", "dtype": "bfloat16", "device": "cuda"}


def test_a_source_that_cannot_be_measured_is_refused_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    class Silent(Narrow):
        def logits(self, ids: Sequence[int]) -> Any:
            return None

    tokenizer = Tokenizer.load(folder)
    with pytest.raises(RequestError, match="gives no logits"):
        baseline.record(tmp_path, Silent(99), tokenizer, MATERIAL, **SIZES, about={})
    with pytest.raises(RequestError, match="no text has two tokens"):
        baseline.record(tmp_path, Narrow(), tokenizer, Material(("x",), ()), **SIZES, about={})
    assert not list(tmp_path.glob("baseline*"))


def change(name: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        facts = json.loads((folder / baseline.FACTS).read_text())
        facts[name] = value
        (folder / baseline.FACTS).write_text(json.dumps(facts))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / baseline.FACTS).unlink(),
        lambda folder: (folder / baseline.TENSORS).unlink(),
        lambda folder: (folder / baseline.FACTS).write_text("{"),
        lambda folder: (folder / baseline.FACTS).write_text("[]"),
        lambda folder: (folder / baseline.FACTS).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / baseline.TENSORS).write_bytes((folder / baseline.TENSORS).read_bytes()[:-5]),
        lambda folder: (folder / baseline.TENSORS).write_bytes(b""),
        lambda folder: (
            tiny.write_tensors(folder, {}, {"ids": np.zeros((3, 2), np.float32)})
            .joinpath("model.safetensors")
            .replace(folder / baseline.TENSORS)
        ),
        change("schema", 2),
        change("texts", []),
        change("texts", [{"ids": [1, 2, 3]}]),
        change("answers", None),
        change("answers", [{"ids": []}]),
    ],
)
def test_a_damaged_baseline_is_refused_in_two_lines(recorded: Path, damage: Callable[[Path], Any]) -> None:
    damage(recorded)
    with pytest.raises(RequestError) as caught:
        baseline.read(recorded)
    assert "cannot be used" in caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message
