from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Recipes
from engine_recipes import api

LOUD = ("./toy-model:plain@echo", "--set", "loud=true")


def test_what_is_rejected_is_built_again_as_the_precision_offers(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", *LOUD, "--fallback", "--json")
    assert ran.code == 0
    (build,) = ran.json["builds"]
    assert build["status"] == "built" and build["validation"]["verdict"] == "pass"
    path = [(a["settings"], a["status"]) for a in build["attempts"]]
    assert path == [
        ({}, "rejected"),
        ({"style": "long"}, "rejected"),
        ({"style": "long", "loud": False}, "built"),
    ]
    assert "says something" in build["attempts"][0]["reason"]
    assert "falling back to --set style=long --set loud=False" in ran.err
    store = api.open_setup().store
    assert len(store.artifacts("engines")) == 3
    assert store.is_published(Path(build["engine_dir"]))


def test_each_attempt_is_a_cached_build(toy_model: Path, recipes: Recipes) -> None:
    recipes("build", *LOUD, "--fallback")
    again = recipes("build", *LOUD, "--fallback", "--json").json["builds"][0]
    assert again["status"] == "cached"
    assert len(again["attempts"]) == 3
    assert {stage["status"] for stage in again["stages"]} == {"cached"}


@pytest.mark.parametrize(
    ("budget", "attempts", "words"),
    [(("--max-builds", "1"), 2, "budget is spent after 2 builds"), (("--max-minutes", "0"), 1, "after 1 builds")],
)
def test_the_budget_ends_it(
    toy_model: Path, recipes: Recipes, budget: tuple[str, ...], attempts: int, words: str
) -> None:
    ran = recipes("build", *LOUD, "--fallback", *budget, "--json")
    assert ran.code == 5
    assert len(ran.json["builds"][0]["attempts"]) == attempts
    assert words in ran.err


def test_when_nothing_is_left_the_last_rejection_stands(toy_model: Path, recipes: Recipes) -> None:
    strict = ("--set", "style=long", "--set", "gate.perplexity_ratio.fail=0.5")
    ran = recipes("build", LOUD[0], *strict, "--fallback")
    assert ran.code == 5
    assert "plain has nothing else to offer" in ran.err
    assert "perplexity_ratio" in ran.error[0]


def test_a_hook_that_breaks_does_not_hide_the_rejection(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", LOUD[0], "--set", "scale=3", "--set", "gate.perplexity_ratio.fail=0.5", "--fallback")
    assert ran.code == 5
    assert "no fallback: asking for fallbacks failed: ValueError: three is too many" in ran.err
    assert "was built and rejected: perplexity_ratio" in ran.error[0]


def test_without_the_option_nothing_is_tried(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", *LOUD, "--json")
    assert ran.code == 5
    assert len(ran.json["builds"][0]["attempts"]) == 1


def test_an_attempt_that_fails_does_not_hide_the_rejection(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recipes("build", *LOUD).code == 5
    monkeypatch.setenv("TOY", "stage1 raise")
    ran = recipes("build", *LOUD, "--fallback", "--json")
    assert ran.code == 5
    (build,) = ran.json["builds"]
    assert [a["status"] for a in build["attempts"]] == ["rejected", "failed", "failed"]
    assert build["status"] == "rejected" and "the toy broke" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fallback", "--accept", "why not"), "--accept publishes what fails, --fallback builds something else"),
        (("--fallback", "--max-minutes", "nan"), "--max-minutes is no number"),
        (("--fallback", "--no-validate"), "--accept and --fallback are about the validation"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    toy_model: Path, recipes: Recipes, options: tuple[str, ...], message: str
) -> None:
    ran = recipes("build", *LOUD, *options)
    assert ran.code == 2 and message in ran.error[0]
