from __future__ import annotations

import json
from pathlib import Path

import pytest

import side_by_side
from engine_recipes import compare, words
from engine_recipes.api import Setup, open_setup
from engine_recipes.errors import MachineError, RequestError
from engine_recipes.store import Store, write_json
from engine_recipes.types import Check


@pytest.fixture
def setup(workspace: Path) -> Setup:
    return open_setup()


@pytest.fixture
def store(setup: Setup) -> Store:
    return setup.store


def names(groups: list[compare.Group]) -> list[list[str]]:
    return [[engine.recipe for engine in group.engines] for group in groups]


def test_a_workspace_with_nothing_in_it_has_nothing_to_compare(setup: Setup) -> None:
    assert compare.collect(setup, ()) == []
    assert not setup.store.workspace.exists()


def test_engines_are_grouped_by_their_source_and_sorted_by_size(setup: Setup, store: Store) -> None:
    for recipe, size in (("int4@toy", 60), ("fp16@toy", 250), ("fp8@toy", 130)):
        side_by_side.engine(store, recipe, size)
    side_by_side.engine(store, "fp16@toy", 10, model="another")
    groups = compare.collect(setup, ())
    assert [group.model for group in groups] == ["another", "smollm2-135m"]
    assert names(groups) == [["fp16@toy"], ["fp16@toy", "fp8@toy", "int4@toy"]]


def test_the_source_is_measured_where_it_lies_and_may_be_gone(setup: Setup, store: Store) -> None:
    side_by_side.engine(store, "fp16@toy", 500)
    (group,) = compare.collect(setup, ())
    assert (group.source.spec, group.source.revision, group.source.dtype) == ("hf:acme/smollm2-135m", "abc", "bfloat16")
    assert group.source.bytes == pytest.approx(250_000, rel=1e-3)
    assert words.in_words(group.engines[0], group.source)[2] == "2.00"
    (store.workspace / "models" / "smollm2-135m" / "model.safetensors").unlink()
    (group,) = compare.collect(setup, ())
    assert group.source.bytes is None
    assert words.in_words(group.engines[0], group.source)[2] == "-"
    assert words.source_in_words(group.source)[1] == "-"


def test_the_newest_build_of_a_name_stands_for_it_beside_the_one_in_use(setup: Setup, store: Store) -> None:
    good = side_by_side.judged(0.05, 1.0, 0.9)
    old = side_by_side.engine(store, "fp8@toy", 130, findings=good, given={"scale": 1})
    used = side_by_side.engine(store, "fp8@toy", 131, findings=good, given={"scale": 2})
    bad = side_by_side.engine(store, "fp8@toy", 132, findings=side_by_side.judged(9, 9, 0), given={"scale": 3})
    (group,) = compare.collect(setup, ())
    assert [(engine.folder, engine.verdict) for engine in group.engines] == [(bad, "fail"), (used, "pass")]
    (group,) = compare.collect(setup, [old.name, bad.name, old.name])
    assert [(engine.folder, engine.given) for engine in group.engines] == [(bad, "scale=3"), (old, "scale=1")]


def test_an_accepted_failure_is_called_accepted(setup: Setup, store: Store) -> None:
    side_by_side.engine(store, "fp8@toy", 130, findings=side_by_side.judged(9, 9, 0), accepted="a demo")
    (group,) = compare.collect(setup, ())
    assert group.engines[0].verdict == "accepted"


def test_building_counts_the_stages_before_the_engine_too(setup: Setup, store: Store) -> None:
    side_by_side.engine(store, "fp8@toy", 130, calibrated=60)
    (group,) = compare.collect(setup, ())
    (engine,) = group.engines
    assert list(engine.stages.items()) == [("resolve", 0.2), ("calibrate", 60), ("stage1", 1.5), ("stage2", 2.5)]
    assert engine.seconds == pytest.approx(64.2)


def test_only_speeds_of_the_same_settings_are_compared(setup: Setup, store: Store) -> None:
    first, second, third = (side_by_side.engine(store, f"{name}@toy", 100 - i) for i, name in enumerate("abc"))
    side_by_side.timed(first, 10)
    side_by_side.timed(first, 70, batch=8)
    side_by_side.timed(second, 20, repeat=9)  # how often says nothing about what
    side_by_side.timed(third, 90, batch=8, new_tokens=32)
    (group,) = compare.collect(setup, ())
    assert [engine.speed("decode_tokens_per_second") for engine in group.engines] == [10, 20, None]
    assert group.settings == {"batch": 1, "prompt_tokens": 128, "new_tokens": 64}
    assert group.notes == (
        "c@toy was timed with other settings (batch 8, prompt tokens 128, new tokens 32): not compared",
    )


def test_speeds_of_two_machines_are_said_to_be_that(setup: Setup, store: Store) -> None:
    for name in "ab":
        side_by_side.timed(side_by_side.engine(store, f"{name}@toy", 100), 10, cpu=f"CPU {name}")
    (group,) = compare.collect(setup, ())
    assert group.notes == ("speeds were measured on different machines",)
    assert compare.machines([group]) == ["CPU a", "CPU b"]


def test_the_baseline_of_the_source_names_what_ran_it(setup: Setup, store: Store) -> None:
    side_by_side.engine(store, "fp16@toy", 250)
    _, key = side_by_side.source(store)
    side_by_side.baseline(store, key, "transformers", 17.25)
    side_by_side.baseline(store, "0" * 64, "somebody else", 99.0)
    (group,) = compare.collect(setup, ())
    assert (group.source.reference, group.source.perplexity) == ("transformers", pytest.approx(17.25))
    (folder,) = [path for path, manifest in store.artifacts("baselines") if manifest["inputs"][0]["key"] == key]
    write_json(folder / "baseline.json", {"texts": [{"ids": [1]}]})
    (group,) = compare.collect(setup, ())
    assert (group.source.reference, group.source.perplexity) == ("transformers", None)


def test_numbers_that_are_none_are_told_from_those_that_are_missing(setup: Setup, store: Store) -> None:
    side_by_side.engine(store, "fp16@toy", 250, findings=side_by_side.judged(float("nan"), float("inf"), 0.0))
    (group,) = compare.collect(setup, ())
    row = dict(zip(words.COLUMNS, words.in_words(group.engines[0], group.source), strict=True))
    assert (row["VERDICT"], row["KL"], row["PPL×"], row["TOP-1"], row["TOK/S"]) == ("fail", "nan", "inf", "0.0%", "-")
    assert "NaN" not in json.dumps(group.as_json())


def test_files_that_are_damaged_count_as_not_there(setup: Setup, store: Store) -> None:
    folder = side_by_side.engine(store, "fp16@toy", 250, findings=side_by_side.judged(0.0, 1.0, 1.0))
    (folder / "validation.json").write_text("{")
    write_json(folder / "bench.json", {"benches": "none"})
    (group,) = compare.collect(setup, ())
    assert (group.engines[0].verdict, group.engines[0].bench) == ("not run", None)


def test_json_holds_everything_that_was_found(setup: Setup, store: Store) -> None:
    check = Check("scales are sane", "warn", 2.0, 1.0, "they drift")
    folder = side_by_side.engine(store, "fp8@toy", 130, findings=side_by_side.judged(0.05, 1.05, 0.9, "No.", check))
    side_by_side.timed(folder, 50)
    (group,) = compare.collect(setup, ())
    data = json.loads(json.dumps(group.as_json()))
    (engine,) = data["engines"]
    assert (data["model"], data["source"]["dtype"]) == ("smollm2-135m", "bfloat16")
    assert (engine["ref"], engine["precision"], engine["engine"]) == ("smollm2-135m:fp8@toy", "fp8", "toy")
    assert (engine["verdict"], engine["metrics"]["mean_kl"], engine["published"]) == ("warn", 0.05, True)
    assert engine["times_source"] == pytest.approx(0.53, abs=0.02)
    assert engine["bench"]["metrics"]["decode_tokens_per_second"]["iqr"] == 2
    assert engine["samples"] == [{"prompt": "Say it.", "text": "No.", "source": "The same."}]
    assert engine["checks"][0]["note"] == "they drift"


def test_what_is_not_built_or_unknown_is_an_error(toy_model: Path, setup: Setup) -> None:
    with pytest.raises(MachineError, match="is not built\nrun `recipes build"):
        compare.collect(setup, ["./toy-model:plain@echo"])
    with pytest.raises(RequestError):
        compare.collect(setup, ["no-such-engine-0123abcd"])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0254, "25 ms"),
        (0.534, "0.53 s"),
        (5.31, "5.3 s"),
        (47.6, "48 s"),
        (700, "12 min"),
        (11160, "3.1 h"),
        (float("nan"), "nan"),
    ],
)
def test_seconds_are_said_with_the_digits_that_matter(value: float | None, text: str) -> None:
    assert words.seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (1e-9, "<0.0001"), (0.02432, "0.0243"), (14.02491, "14.02")])
def test_small_numbers_keep_four_digits(value: float, text: str) -> None:
    assert words.small(value) == text
