from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from engine_recipes import api, gate
from engine_recipes.entries import SMALL, Limit
from engine_recipes.errors import RequestError
from engine_recipes.gate import limits
from engine_recipes.registry import Registry, load


@pytest.fixture
def registry() -> Registry:
    return load()


def test_a_precision_says_more_than_the_metric_and_size_more_than_that(registry: Registry) -> None:
    mine = replace(
        registry.precisions["fp16"],
        limits={"mean_kl": Limit(0.2, 0.3)},
        small_limits={"mean_kl": Limit(fail=0.9)},
    )
    large, small = (limits.options(registry, mine, parameters) for parameters in (SMALL, SMALL - 1))
    assert [large[f"mean_kl.{which}"].default for which in ("warn", "fail")] == [0.2, 0.3]
    assert [small[f"mean_kl.{which}"].default for which in ("warn", "fail")] == [0.2, 0.9]
    assert limits.options(registry, mine, 0) == large
    entry = registry.metrics["perplexity_ratio"]
    assert small["perplexity_ratio.fail"].default == entry.fail


def test_no_limit_never_decides(registry: Registry) -> None:
    options = limits.options(registry, registry.precisions["fp16"], 0)
    chosen = {name: option.default for name, option in options.items()}
    bound = limits.bounds(registry, {**chosen, "p99_kl.warn": math.inf, "p99_kl.fail": math.inf})["p99_kl"]
    assert bound == gate.Bound("above", None, None, registry.metrics["p99_kl"].help)
    assert bound.verdict(1e9)[0] == "pass"


def test_every_limit_in_the_registry_is_of_a_metric_and_warns_before_it_fails(registry: Registry) -> None:
    for precision in registry.precisions.entries.values():
        assert {*precision.limits, *precision.small_limits} <= set(registry.metrics.entries), precision.name
        for parameters in (SMALL, SMALL - 1):
            options = limits.options(registry, precision, parameters)
            for name, metric in registry.metrics.entries.items():
                warn, fail = (float(options[f"{name}.{which}"].default) for which in ("warn", "fail"))
                assert warn <= fail if metric.worse == "above" else warn >= fail, (precision.name, name)


def test_models_and_users_set_limits_like_any_other_option(toy_model: Path) -> None:
    plan = api.plan("./toy-model:plain@echo", settings={"gate.mean_kl.fail": "0.07"})
    assert plan.bounds["mean_kl"].fail == 0.07
    assert plan.stage("validate").key == api.plan("./toy-model:plain@echo").stage("validate").key
    assert plan.recipe == {} and plan.given == {"gate.mean_kl.fail": 0.07}
    with pytest.raises(RequestError, match=r"no option 'gate.mean_kl.fial'"):
        api.plan("./toy-model:plain@echo", settings={"gate.mean_kl.fial": "1"})
    Path("registry.toml").write_text('[precisions.plain.settings]\n"gate.mean_kl.warn" = 0.001\n')
    assert api.plan("./toy-model:plain@echo").bounds["mean_kl"].warn == 0.001


def test_a_direction_that_is_none_is_refused_with_its_place(own_world: Path) -> None:
    Path("registry.toml").write_text('[metrics.mean_kl]\nworse = "sideways"\n')
    with pytest.raises(RequestError, match=r"metrics.mean_kl.worse: must be above or below, not 'sideways'"):
        load()
