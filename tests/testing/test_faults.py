"""Every promise of the conformance suite is broken once, and the suite says what is wrong."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import install, package
from engine_recipes import testing
from engine_recipes.testing import folders
from engine_recipes.testing.lab import Lab
from engine_recipes.testing.processes import left_over
from engine_recipes.testing.suite import without_ours
from testing import broken

#: Case -> what its failure says.
FAULTS = {
    "family many-heads: holds the tensors of transformers": r"k_proj.weight is \[128, 128\], transformers has \[64",
    "family careless: answers a strange config with an error": "without hidden_act: KeyError",
    "family moody: describes its configs": "twice gives two descriptions",
    "family other-rope: agrees with transformers": "of their spread away from transformers'",
    "family window-blind: leaves out no key of its configs": "with sliding_window = 8 in its config the model is desc",
    "family own-epsilon: leaves out no key of its configs": "with rms_norm_eps = 2e-05 in its config transformers comp",
    "family unknown: describes its configs": r'give conformance\(…, configs=\{"unknown"',
    "precision dated: two builds give the same bytes": "differ in config.json: time",
    "precision messy: keeps to its folder and says what it made": "here/notes.txt",
    "precision mislabelled: keeps to its folder and says what it made": "says quant_algo null, the registry .*W8A16",
    "precision coarse: stays close to the source": "on a tiny plain model its logits are .* 0.002 is allowed",
    "precision lopsided: split parts join to the whole": "tp_size 2: .* is not what it is without a split",
    "precision open-ended: refuses bad options when planned": "level=-1000000000 is accepted",
    "precision whole: split parts join to the whole": "tp_size 2: there are 1 rank files, not 2",
    "precision unkeyed: options that are in no key change no bytes": "with unkeyed = 1 and without differ in config",
    "precision locking: keeps to its folder and says what it made": r"leaves config.json.lock in context.out",
    "precision half-right: stays close to the source": "with bits = 4, its logits are",
    "precision third: options that are in no key change no bytes": "with device = tpu and without differ in config",
    "precision wide: two builds give the same bytes": r"refuses every tiny model:(.|\n)*configs=\{\"wide\": \[CONFIG",
    "calibration random: measures the same twice in its folder": "two runs of the same differ in statistics",
    "calibration by-rows: options that are in no key change no bytes": "with calib.rows = 2 and without differ",
    "calibration lingering: measures the same twice in its folder": "after the stage has ended:",
    "reference mirrored: computes what others compute": "logits are .* away from those of transformers",
    "precision own-noting: keeps to its folder and says what it made": "precision_own_noting.py.txt",
    "family noting: keeps to its folder when it describes": "home/notes.txt",
    "engine moody: two builds give the same bytes": 'differ in extra.bin: .*skip={"engine moody: two builds',
    "engine silu-only: computes or refuses early what few models say": "model with the activation gelu.* are",
    "engine rope-blind: computes or refuses early what few models say": "model with llama3's rope_scaling logits are",
    "engine unscaled: computes or refuses early what few models say": "model with embedding_scale 8 logits are",
    "engine norm-blind: agrees with the source": r"tiny plain model logits .*\n.*\n.*\n.*tiny tied model",
    "engine clinging: loads wherever its folder lies": "cannot load engine: AssertionError",
    "precision parent: keeps to its folder and says what it made": "after the stage has ended:\n.* left 1 running",
    "precision hiding: keeps to its folder and says what it made": "after the stage has ended:\nsleep 60",
    "precision hiding: a killed stage leaves nothing behind": "after the worker was killed there still runs",
    "engine forgetful: generates what its logits say": "is the cache, or the position of new tokens, wrong",
    "engine deaf: stops where it is told to": "which end before it",
    "engine endless: stops where it is told to": "max_tokens is 0, and 8 tokens came",
    "engine trusting: refuses prompts that it cannot take": "logits takes an empty prompt",
    "engine dicing: samples by its seed": "the same seed gives two answers",
    "engine rooted: loads wherever its folder lies": "cannot load",
    "engine scribbling: loads wherever its folder lies": "loading writes into the engine's folder: .*loaded",
    "engine brittle: a damaged folder is an error of two lines": "extra.bin cut short: it loads, and then ValueError",
    "engine crashing: a damaged folder is an error of two lines": "killed by signal 6 while it was at: extra.bin cut",
    "engine late: computes or refuses early every algorithm": "can be planned, and stage2 then says: no quantised",
    "engine unbound: keeps to its folder and says what it was built with": "binds acme-runtime, and the manifest does",
    "engine closing-once: two work at once and close twice": "AttributeError",
    "engine one-stop: stops where it is told to": r"stop is \[0, .* which end before it",
    "engine zero-is-none: samples by its seed": "the same seed gives two answers: 0 was",
    "engine lukewarm: samples by its seed": "are logits divided by the temperature",
    "engine greedy: samples by its seed": "five seeds at temperature 1 give 1 answers",
    "engine stale: generates what its logits say": "does it take more of their cache than is theirs",
    "engine global: two work at once and close twice": "engines of two models loaded, the one loaded first says",
    "engine one-cache: two work at once and close twice": "two generations of one engine .* disturb each other",
    "engine echoing: says in a batch what each prompt says alone": "this is prompt 1 of a batch, alone it says",
    "engine buffering: gives the same logits twice": "give the caller an array, no view of a buffer",
    "engine appending: generates what its logits say": "generate changes the list that it is given",
    "engine short-sighted: agrees with the source": "on a tiny plain model logits are",
    "engine even-only: computes or refuses early what few models say": "model with 251 words logits are",
    "engine secretive: agrees with the source": "plain model, after .* tokens, its greedy answer is .* the source's is",
    "engine first-rank: computes or refuses early what few models say": "model that is split for tp_size 2 logits",
    "engine float16-only: computes or refuses early every algorithm": "model in bf16 .* logits are",
    "engine rounding: agrees with the source": r"if that is how it rounds: conformance\(…, tolerance=\{\"fp16\": 0.01",
    "engine peeking: later tokens do not change earlier logits": "first 10 logits change by",
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, testing.Case]]:
    """The cases of all broken plugins, which share one lab."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, broken.write(tmp_path_factory.mktemp("broken")))
        configs = {name: [testing.tiny_config()] for name in broken.FAMILIES if name != "unknown"}
        yield {case.id: case for case in testing.cases("engine-recipes-broken", configs=configs)}


def test_a_precision_is_tried_on_a_model_that_it_takes(cases: Mapping[str, testing.Case]) -> None:
    cases["precision choosy: two builds give the same bytes"]()


def test_a_stage_that_ends_just_before_it_is_killed_is_no_fault(
    cases: Mapping[str, testing.Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, met = folders._wait_for_the_stage, []

    def late(child: subprocess.Popen[bytes], *arguments: Any) -> int | None:
        met.append(worker := real(child, *arguments))
        if len(met) < 3:
            child.wait()
        return worker

    monkeypatch.setattr(folders, "_wait_for_the_stage", late)
    cases["precision dated: a killed stage leaves nothing behind"]()
    assert len(met) > 2


def test_a_workers_traceback_shows_the_plugins_own_code_alone() -> None:
    frames = [f'  File "{file}", line 3, in f\n    here()\n    ^^^^^^' for file in (folders.__file__, "acme/acme.py")]
    output = "\n".join(["Traceback (most recent call last):", *frames, "KeyError: 'x'", "stage1 of acme failed"])
    shown = without_ours(output, "stage1 of acme failed")
    assert shown == "\n".join(["Traceback (most recent call last):", frames[1], "KeyError: 'x'"])


def test_a_description_may_say_another_architecture_than_its_config(cases: Mapping[str, testing.Case]) -> None:
    cases["family renaming: knows its architectures"]()


def test_an_engine_is_tried_on_a_model_that_it_takes(cases: Mapping[str, testing.Case]) -> None:
    for case in ("generates what its logits say", "two work at once and close twice", "agrees with the source"):
        cases[f"engine choosy: {case}"]()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_promise_is_noticed_and_explained(cases: Mapping[str, testing.Case], fault: str) -> None:
    with pytest.raises(pytest.fail.Exception, match=FAULTS[fault]) as caught:
        cases[fault]()
    assert str(caught.value).startswith(f"{fault}\n")
    assert f"\nWhy: {cases[fault].promise}\nMore: docs/" in str(caught.value)


REGISTRY = """api = 1
[precisions.acme]
module = "engine_recipes_acme.acme"
"""
MODULE = "from engine_recipes import hookimpl\n@hookimpl\ndef stage1(context): pass\n"


@pytest.mark.parametrize(
    ("registry", "module", "promise", "message"),
    [
        (REGISTRY.replace("api = 1", ""), MODULE, "its registry is read without problems", "add `api = 1`"),
        (REGISTRY + 'bits = "many"', MODULE, "its registry is read without problems", "precisions.acme.bits"),
        (REGISTRY + "bits = ", MODULE, "its registry is read without problems", "cannot be read"),
        (
            REGISTRY.replace("acme]", "fp16]"),
            MODULE,
            "its registry is read without problems",
            "precisions.fp16: engine-recipes has one of that name",
        ),
        (REGISTRY, "x = 1 / 0", "its modules have the hooks that they need", "ZeroDivisionError"),
        (REGISTRY, MODULE.replace("stage1", "stage9"), "its modules have the hooks that they need", "stage9"),
        (REGISTRY, "", "its modules have the hooks that they need", "no `@hookimpl def stage1`"),
        (REGISTRY, f"import numpy\n{MODULE}", "importing its modules loads nothing heavy", "imports numpy"),
        (REGISTRY + "#" * 200_000, MODULE, "listing it costs one small file", "has 200,0.. bytes"),
        (REGISTRY + "options = { size = 3 }", MODULE, "its entries say what users need", "options.size has no help"),
        (REGISTRY + 'requires = ["acme"]', MODULE, "its entries say what users need", "has no `install`"),
        (REGISTRY + "limits = { tempo = { warn = 1 } }", MODULE, "its entries say what users need", "no metric tempo"),
    ],
    ids=lambda value: value[:30] if "\n" not in value else "",
)
def test_a_fault_of_the_whole_package_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str, module: str, promise: str, message: str
) -> None:
    install(monkeypatch, package(tmp_path / "site", "engine-recipes-acme", registry, acme=module))
    found = {case.id: case for case in testing.cases("engine-recipes-acme")}
    with pytest.raises(pytest.fail.Exception, match=message):
        found[f"package engine-recipes-acme: {promise}"]()


@pytest.mark.parametrize(
    ("entry", "case", "message"),
    [
        ('[models."acme-3b"]\nparameters = 3_000', "model acme-3b: its parameters are plausible", "its name says 3b"),
        (
            '[models."acme-3b"]\nsource = "nowhere:x"',
            "package engine-recipes-acme: its registry is read without problems",
            "nowhere:x",
        ),
        ('[aliases]\nacme = "nobody"', "alias acme: it leads to a model", "there is no model nobody"),
    ],
)
def test_a_name_that_leads_nowhere_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, case: str, message: str
) -> None:
    model = '\nfamily = "llama"' + '\nsource = "file:x"' * ("source" not in entry) if "models" in entry else ""
    install(monkeypatch, package(tmp_path / "site", "engine-recipes-acme", f"api = 1\n{entry}{model}\n"))
    found = {one.id: one for one in testing.cases("engine-recipes-acme")}
    with pytest.raises(pytest.fail.Exception, match=message):
        found[case]()


def test_a_package_that_is_not_installed_is_told_how_to_be() -> None:
    found = testing.cases("engine-recipes-nowhere", configs={"acme": [testing.tiny_config()]}, skip={"x": "y"})
    assert all(case.id.startswith("package ") for case in found)
    for case in found:
        with pytest.raises(pytest.fail.Exception, match=r"run `pip install -e \.` in its folder"):
            case()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"configs": {"toi": [{}]}}, "configs: there is no 'toi'; did you mean toy"),
        ({"settings": {"plian": {"delay": 1}}}, "settings: there is no 'plian'; did you mean plain"),
        ({"tolerance": {"fp61": 0.1}}, "tolerance: there is no 'fp61'; did you mean fp16"),
        ({"skip": {"engine echo: agrees with": "no model"}}, "skip: no case is 'engine echo: agrees with'; did you"),
    ],
    ids=["configs", "settings", "tolerance", "skip"],
)
def test_a_name_that_nobody_has_is_no_argument(toy: None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        testing.conformance("engine-recipes-toy", **arguments)


ENGINE = '[engines.bad]\nmodule = "engine_recipes_acme.bad"\ntakes = ["acme"]\ngives = "bad"\ntargets = ["cpu"]\n'


@pytest.mark.parametrize(
    ("body", "message"),
    [("import time; time.sleep(30)", "took more than 10 seconds"), ("import os; os._exit(3)", "exit code 3")],
    ids=["hangs", "ends the process"],
)
def test_a_module_that_cannot_be_imported_fails_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    install(monkeypatch, package(tmp_path / "site", "engine-recipes-acme", REGISTRY + ENGINE, acme=MODULE, bad=body))
    found = {case.id: case for case in testing.cases("engine-recipes-acme")}
    with pytest.raises(pytest.fail.Exception, match=f"engines.bad: .*{message}"):
        found["package engine-recipes-acme: its modules have the hooks that they need"]()
    for case in (case for case in found.values() if case.id.startswith("engine bad: ")):
        with pytest.raises(pytest.skip.Exception, match="cannot be imported"):
            case()


def test_a_traceback_shows_the_plugins_own_code_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "from engine_recipes import hookimpl\n@hookimpl\ndef resolve_checkpoint(config):\n    return 1 / 0\n"
    registry = 'api = 1\n[families.acme]\nmodule = "engine_recipes_acme.acme"\narchitectures = ["AcmeForCausalLM"]\n'
    install(monkeypatch, package(tmp_path / "site", "engine-recipes-acme", registry, acme=module))
    configs = {"acme": [testing.tiny_config("AcmeForCausalLM")]}
    found = {case.id: case for case in testing.cases("engine-recipes-acme", configs=configs)}
    with pytest.raises(pytest.fail.Exception, match="ZeroDivisionError: division by zero") as caught:
        found["family acme: describes its configs"]()
    assert str(caught.value).count('  File "') == 1
    assert "engine_recipes_acme/acme.py" in str(caught.value)


def test_what_pytests_own_process_started_is_no_left_over(toy: None) -> None:
    lab = Lab("engine-recipes-toy")
    with lab.world():
        ours = subprocess.Popen(["sleep", "60"])
        with lab.marked():
            theirs = subprocess.Popen(["sleep", "61"])
        try:
            assert left_over(lab, patience=0) == ["sleep 61"]
        finally:
            for process in (ours, theirs):
                process.kill()
                process.wait()


def test_a_pattern_skips_cases_and_says_why(toy: None) -> None:
    mark = testing.conformance("engine-recipes-toy", skip={"engine *: *": "the toy is no model"})
    (name, found), ids = mark.args, mark.kwargs["ids"]
    assert name == "case"
    assert [id.replace("-", " ") for id in ids] == [case.id.replace(": ", ":").replace("-", " ") for case in found]
    assert not [id for id in ids if " " in id]
    skipped = [case for case in found if case.id.startswith("engine echo: ")]
    assert len(skipped) > 10
    with pytest.raises(pytest.skip.Exception, match="the toy is no model"):
        skipped[0]()


def test_what_a_user_set_up_takes_no_part(toy: None, own_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("registry.toml").write_text("nonsense = 1\n")
    monkeypatch.setenv("RECIPES_PLUGINS", "0")
    found = {case.id: case for case in testing.cases("engine-recipes-toy")}
    with contextlib.suppress(pytest.skip.Exception):
        found["package engine-recipes-toy: its registry is read without problems"]()
    assert Path.cwd() == own_world / "here"
