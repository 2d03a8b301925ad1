from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from conftest import Recipes
from engine_recipes import Check, Findings, Measure, api, gate
from engine_recipes.errors import Rejected
from engine_recipes.gate import Bound
from engine_recipes.runner import How

KL = Bound("above", 0.1, 0.5, "divergence")
QUESTIONS = Bound("below", 0.9, 0.5)
REF = "./toy-model:plain@echo"


@pytest.mark.parametrize(
    ("bound", "value", "verdict", "limit"),
    [
        (KL, 0.1, "pass", 0.1),
        (KL, 0.2, "warn", 0.1),
        (KL, 0.51, "fail", 0.5),
        (KL, math.nan, "fail", 0.5),
        (KL, math.inf, "fail", 0.5),
        (QUESTIONS, 0.9, "pass", 0.9),
        (QUESTIONS, 0.6, "warn", 0.9),
        (QUESTIONS, 0.4, "fail", 0.5),
        (Bound("above", fail=1.0), 0.9, "pass", 1.0),
        (Bound("above"), 1e9, "pass", None),
        (Bound("above", warn=1.0), math.nan, "warn", 1.0),
    ],
)
def test_limits_decide_in_their_direction(bound: Bound, value: float, verdict: str, limit: float | None) -> None:
    assert bound.verdict(value) == (verdict, limit)


def test_the_worst_check_is_the_verdict_and_what_has_no_limit_is_only_told() -> None:
    findings = Findings((Measure("kl", 0.2), Measure("mine", 7.0)), (Check("loads", "pass", 1.0),))
    report = gate.judge(findings, {"kl": KL})
    assert report.verdict == "warn"
    assert report.metrics == {"kl": 0.2, "mine": 7.0}
    assert [(c.name, c.verdict, c.note) for c in report.checks] == [("loads", "pass", ""), ("kl", "warn", "divergence")]
    assert gate.judge(Findings(), {}).verdict == "not run"


def test_nobody_is_blamed_for_what_the_source_does_too() -> None:
    def verdict(value: float, base: float) -> str:
        return gate.judge(Findings((Measure("loops", value, base),)), {"loops": KL}).verdict

    assert [verdict(value, 0.01) for value in (0.05, 0.3, 0.8)] == ["pass", "warn", "fail"]
    assert [verdict(value, 0.4) for value in (0.4, 0.5, 0.79, 0.81)] == ["pass", "warn", "warn", "fail"]
    assert verdict(0.9, math.nan) == "fail"
    (check,) = gate.judge(Findings((Measure("loops", 0.5, 0.4),)), {"loops": KL}).checks
    assert check.limit == 0.4 and "the source's own is 0.4" in check.note


def test_findings_come_back_from_their_file_numbers_that_json_lacks_too(tmp_path: Path) -> None:
    findings = Findings(
        (Measure("kl", math.inf, base=math.nan),), (Check("c", "fail", math.nan, 1.0),), ({"prompt": "p"},), {"l": 0.5}
    )
    gate.write(tmp_path, "key", findings, gate.judge(findings, {"kl": KL}))
    again = gate.found(tmp_path, "key")
    assert again is not None and again.measures[0].value == math.inf
    assert math.isnan(again.measures[0].base or 0) and math.isnan(again.checks[0].value or 0)
    assert (again.samples, again.layers) == (findings.samples, findings.layers)
    assert gate.found(tmp_path, "other") is None
    report = gate.read(tmp_path)
    assert report is not None and report.failed == {"kl", "c"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": "k", "findings": {"measures": 3}}'])
def test_a_damaged_verdict_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "validation.json").write_text(text)
    assert gate.read(tmp_path) is None
    assert gate.found(tmp_path, "k") is None


def test_another_limit_judges_anew_and_runs_nothing(toy_model: Path, workspace: Path) -> None:
    first = api.build(REF)
    metrics = first.report.metrics
    assert abs(metrics["perplexity_ratio"] - 1) < 1e-5 and metrics["mean_kl"] < 1e-5
    with pytest.raises(Rejected, match=r"perplexity_ratio \(1, limit 0.9\)"):
        api.build(REF, settings={"gate.perplexity_ratio.fail": "0.9"})
    engine = first.path("stage2")
    assert engine is not None and not api.open_setup().store.is_published(engine)
    again = api.build(REF)
    assert again.status == "cached" and again.report == first.report
    assert api.open_setup().store.is_published(engine)


def test_an_engine_that_is_no_longer_good_gives_its_name_to_the_newest_that_is(toy_model: Path) -> None:
    api.build(REF)
    other = api.build(REF, settings={"scale": "2"}).path("stage2")
    assert other is not None
    store = api.open_setup().store
    assert store.is_published(other)
    with pytest.raises(Rejected):
        api.build(REF, settings={"scale": "2", "gate.perplexity_ratio.fail": "0.9"})
    assert not store.is_published(other) and store.plain(other).exists()


def test_an_engine_that_thinks_something_else_is_rejected_and_keeps_its_folder(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_SOURCE", "quiet")
    ran = recipes("build", REF, "--json")
    assert ran.code == 5
    (build,) = ran.json["builds"]
    assert build["status"] == "rejected"
    failed = {check["name"] for check in build["validation"]["checks"] if check["verdict"] == "fail"}
    assert "mean_kl" in failed
    assert "was built and rejected" in ran.error[0]
    assert build["engine_dir"] in ran.error[1]
    engine = Path(build["engine_dir"])
    assert engine.is_dir() and not engine.with_name("toy-model-plain-echo-cpu").exists()


def test_what_is_accepted_is_published_with_its_reason_and_stays_so(toy_model: Path, recipes: Recipes) -> None:
    loud = (REF, "--set", "loud=true")
    assert recipes("build", *loud).code == 5
    ran = recipes("build", *loud, "--accept", "only a demo", "--json")
    assert ran.code == 0
    (build,) = ran.json["builds"]
    assert (build["validation"]["verdict"], build["validation"]["accepted"]) == ("fail", "only a demo")
    store = api.open_setup().store
    ((engine, manifest),) = store.artifacts("engines")
    assert store.is_published(engine) and manifest["accepted"] == "only a demo"
    assert recipes("build", *loud).code == 0
    (row,) = recipes("engines", "--json").json["engines"]
    assert (row["status"], row["accepted"]) == ("accepted", "only a demo")
    # another failure was not accepted, nor the same one measured again
    assert recipes("build", *loud, "--set", "gate.perplexity_ratio.fail=0.9").code == 5
    assert not store.is_published(engine)
    assert recipes("build", *loud, "--accept", "only a demo").code == 0
    assert store.is_published(engine)
    assert recipes("validate", *loud, "--force").code == 5
    assert not store.is_published(engine)


def test_nothing_that_passes_is_called_accepted(toy_model: Path) -> None:
    build = api.build(REF, how=How(accept="no need"))
    assert (build.report.verdict, build.report.accepted) == ("pass", "")


def test_what_is_accepted_takes_the_plain_name_from_another_build(toy_model: Path, recipes: Recipes) -> None:
    loud = (REF, "--set", "loud=true")
    assert [recipes("build", REF).code, recipes("build", *loud).code] == [0, 5]
    (build,) = recipes("build", *loud, "--accept", "louder is better", "--json").json["builds"]
    assert api.open_setup().store.is_published(Path(build["engine_dir"]))


def test_a_forced_rebuild_that_is_not_judged_leaves_the_name_to_an_older_good_engine(toy_model: Path) -> None:
    older, newer = (api.build(REF, settings={"scale": scale}).path("stage2") for scale in ("1", "2"))
    assert older is not None and newer is not None
    api.build(REF, settings={"scale": "2"}, how=How(force=True, validate=False))
    assert api.open_setup().store.is_published(older)


def test_judging_leaves_names_outside_the_workspace_alone(toy_model: Path, recipes: Recipes, tmp_path: Path) -> None:
    engine = api.build(REF).path("stage2")
    assert engine is not None
    strict = ("--set", "gate.perplexity_ratio.fail=0.5")
    deployed = Path(shutil.copytree(engine, tmp_path / "prod-1"))
    link = tmp_path / "prod"
    link.symlink_to("prod-1")
    assert recipes("validate", deployed, *strict).code == 5
    assert link.is_symlink()
    assert recipes("validate", Path(shutil.copytree(engine, tmp_path / "plain")), *strict).code == 5


def spoilt(folder: Path, *path: str | int, value: object) -> Path:
    """A verdict's file in which one value is another."""
    findings = Findings(
        (Measure("kl", 0.2, 0.1, "n"),), (Check("c", "pass", 1.0, 2.0),), ({"prompt": "p"},), {"layer": 0.5}, 3.0
    )
    gate.write(folder, "key", findings, gate.judge(findings, {"kl": KL}, "a demo"))
    data = json.loads((folder / "validation.json").read_text())
    inner = data
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    (folder / "validation.json").write_text(json.dumps(data))
    return folder


JUDGED: list[tuple[tuple[str | int, ...], object]] = [
    (("verdict",), "bogus"),
    (("verdict",), ["pass"]),
    (("accepted",), 1),
    (("checks",), 5),
    (("checks", 0), ["c"]),
    (("checks", 0, "verdict"), "good"),
    (("checks", 0, "name"), 1),
    (("checks", 0, "note"), None),
    (("checks", 0, "value"), "1"),
    (("checks", 0, "limit"), []),
]
FOUND: list[tuple[tuple[str | int, ...], object]] = [
    (("samples",), [5]),
    (("samples",), [{"prompt": 1}]),
    (("measures", 0, "value"), None),
    (("measures", 0, "value"), True),
    (("measures", 0, "value"), "0.2"),
    (("measures", 0, "value"), 10**400),
    (("measures", 0, "base"), [1]),
    (("measures", 0, "name"), None),
    (("measures", 0, "note"), 5),
    (("measures", 0, "more"), 5),
    (("layers",), [1]),
    (("layers", "layer"), None),
    (("seconds",), "nan"),
    (("seconds",), None),
]


@pytest.mark.parametrize(("path", "value"), JUDGED)
def test_a_verdict_of_another_type_is_none_and_what_was_measured_stays(
    tmp_path: Path, path: tuple[str | int, ...], value: object
) -> None:
    spoilt(tmp_path, *path, value=value)
    assert gate.read(tmp_path) is None
    assert gate.found(tmp_path, "key") is not None


@pytest.mark.parametrize(("path", "value"), FOUND)
def test_a_measurement_of_another_type_is_none(tmp_path: Path, path: tuple[str | int, ...], value: object) -> None:
    spoilt(tmp_path, "findings", *path, value=value)
    assert gate.read(tmp_path) is None
    assert gate.found(tmp_path, "key") is None


def test_a_verdict_that_is_nested_without_end_is_none(tmp_path: Path) -> None:
    (tmp_path / "validation.json").write_text("[" * 100_000)
    assert gate.read(tmp_path) is None


def test_commands_take_a_spoilt_verdict_for_none(toy_model: Path, recipes: Recipes) -> None:
    engine = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"])
    spoilt(engine, "verdict", value=["x"])
    for command in (("engines",), ("compare", REF), ("compare", REF, "--json", "--html", "page.html")):
        assert recipes(*command).code == 0
    (build,) = recipes("build", REF, "--json").json["builds"]
    assert build["validation"]["verdict"] == "pass"
    report = gate.read(engine)
    assert report is not None and report.verdict == "pass"


def test_numbers_that_json_lacks_are_null_in_every_document(toy_model: Path, recipes: Recipes) -> None:
    engine = Path(recipes("build", REF, "--json").json["builds"][0]["engine_dir"])
    key = json.loads((engine / "validation.json").read_text())["key"]
    findings = Findings((Measure("mine", math.nan, math.inf),), (Check("c", "pass", math.nan, -math.inf),))
    gate.write(engine, key, findings, gate.judge(findings, {}))
    manifest = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").write_text(json.dumps({**manifest, "seconds": math.inf}))
    short = ("--prompt-tokens", "4", "--new-tokens", "2", "--repeat", "1")
    for command in (("build", REF), ("validate", REF), ("compare", REF), ("engines",), ("bench", REF, *short)):
        ran = recipes(*command, "--json")
        assert ran.code == 0, ran.err
        assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", ran.out))
        told = ran.json.get("builds") or [e for model in ran.json.get("models", ()) for e in model["engines"]]
        for one in told:
            judged = one.get("validation", one)
            assert (judged["metrics"], judged["checks"][0]["value"]) == ({"mine": None}, None)
