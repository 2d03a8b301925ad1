"""The examples of the hooks, as they stand in the docs, are one package: it builds, is judged and generates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import engine_recipes
import tiny
from conftest import HOOKS, Recipes, install, package
from engine_recipes import (
    Artifact,
    Check,
    Report,
    RequestError,
    Sampling,
    StageContext,
    checkpoint,
    testing,
)
from engine_recipes.host import Host
from engine_recipes.runner import Build
from engine_recipes.types import Provider

#: Which hooks the build calls, in workers; their tests look at what came of it.
BY_BUILD = {"resolve_checkpoint", "calibrate", "stage1", "stage2", "load_source", "validate"}
REGISTRY = """\
api = 1

[families.acme]
module = "engine_recipes_acme.family"
architectures = ["AcmeForCausalLM"]
references = ["acme"]

[calibrations.acme-bounds]
module = "engine_recipes_acme.bounds"

[precisions.acme]
module = "engine_recipes_acme.precision"
calibration = "acme-bounds"
options.dtype = { default = "float16", choices = ["float16", "bfloat16"], help = "of the weights" }

[engines.acme]
module = "engine_recipes_acme.engine"
takes = ["trtllm-checkpoint"]
gives = "acme-engine"
targets = ["cpu", "sm*"]

[engines.acme-tool]
module = "engine_recipes_acme.tool"
takes = ["trtllm-checkpoint"]
gives = "acme-tool-engine"
targets = ["cpu"]
programs = { local = ["acme-build"] }

[references.acme]
module = "engine_recipes_acme.reference"

[metrics.acme_gigabytes]
worse = "above"
help = "size of the engine on disk"
warn = 1.0
fail = 2.0
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the names of the hooks that were called, in this process and in workers."""
    file = tmp_path_factory.mktemp("calls") / "hooks"
    file.touch()
    return file


@pytest.fixture(scope="module")
def folder(generate: ModuleType, calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package: each example goes into the module that its first line names, with a line that notes each call."""
    modules: dict[str, str] = {}
    for name, spec in generate.hook_specs().items():
        example = generate.Doc(spec).example
        stem = example.partition(".py")[0].removeprefix("# engine_recipes_acme/")
        assert stem.isidentifier(), example
        note = f'    with open({str(calls)!r}, "a") as noted:\n        noted.write("{name}\\n")\n'
        body = re.sub(rf"(@hookimpl\ndef {name}\(.*:\n)", lambda head, note=note: head[1] + note, example)
        assert body != example
        modules[stem] = modules.get(stem, "") + body
    return package(tmp_path_factory.mktemp("acme"), "engine-recipes-acme", REGISTRY, **modules)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tiny.write(
        tmp_path_factory.mktemp("models") / "m", "qwen2", architectures=["AcmeForCausalLM"], vocab_size=256
    )
    return testing.write_tokenizer(written)


@pytest.fixture(scope="module")
def built(folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Build]:
    """A real build with the package, in worker processes."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_WORKSPACE", str(home / "workspace"))
        patch.setenv("XDG_CONFIG_HOME", str(home))
        install(patch, folder)
        yield engine_recipes.build(f"{model}:acme@acme")


@pytest.fixture(autouse=True)
def acme(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, folder)


@pytest.fixture(autouse=True)
def called(request: pytest.FixtureRequest, calls: Path, acme: None) -> Iterator[None]:
    """A test named for a hook calls it: itself, or by the build that it looks at."""
    hook = next(name for name in HOOKS if request.node.name.startswith(f"test_{name}_"))
    before = 0 if hook in BY_BUILD and "built" in request.fixturenames else len(calls.read_text())
    yield
    assert hook in calls.read_text()[before:].split(), f"{request.node.name} did not call {hook}"


def provider(module: str) -> Provider:
    return Provider("engine", "acme", f"engine_recipes_acme.{module}", "engine-recipes-acme", "0.3")


def test_resolve_checkpoint_describes_the_model_or_refuses_it(built: Build, model: Path) -> None:
    decoder = json.loads((built.path("resolve") / "decoder.json").read_text())
    assert (decoder["architecture"], decoder["qkv_bias"], decoder["dense_bias"]) == ("AcmeForCausalLM", True, False)
    config = json.loads((model / "config.json").read_text())
    with pytest.raises(RequestError, match="attends within a window"):
        Host().resolve_checkpoint(provider("family"), built_context(built, "resolve"), {**config, "sliding_window": 64})


def test_check_decoder_refuses_before_stage_1(tmp_path: Path) -> None:
    tied = tiny.write(tmp_path / "tied", "qwen2", architectures=["AcmeForCausalLM"], tie_word_embeddings=True)
    testing.write_tokenizer(tied)
    with pytest.raises(RequestError, match="the head of this model is its embedding"):
        engine_recipes.build(f"{tied}:acme@acme")
    assert not list((tmp_path / "home" / "workspace").glob("c*/*"))  # no calibration, no checkpoint


def test_calibrate_leaves_bounds_that_stage_1_can_read(built: Build, model: Path) -> None:
    found = checkpoint.read_statistics(built.path("calibrate"))
    weights = tiny.tensors(json.loads((model / "config.json").read_text()))
    norm = np.abs(weights["model.layers.1.input_layernorm.weight"].astype(np.float32)).max()
    assert found.number("model.layers.1.self_attn.k_proj.input_amax") == pytest.approx(norm * 8)
    assert found.about["method"] == "acme-bounds"
    assert len(found.names()) == 3 * 5


def test_stage1_writes_a_checkpoint_that_verifies(built: Build, model: Path) -> None:
    source = tiny.tensors(json.loads((model / "config.json").read_text()))
    checkpoint.verify(built.path("stage1"))
    with checkpoint.open_checkpoint(built.path("stage1")) as weights:
        head = weights.array("lm_head.weight")
        assert weights.dtype == "float16"
        assert np.array_equal(head, source["lm_head.weight"].astype(np.float16))


def test_stage2_writes_the_engine_and_tells_the_manifest(built: Build) -> None:
    engine = built.path("stage2")
    assert {"weights.npz", "tokenizer.json", "manifest.json"} <= {file.name for file in engine.iterdir()}
    assert json.loads((engine / "manifest.json").read_text())["result"] == {"layers": 0}


def test_command_is_what_plan_shows(model: Path, recipes: Recipes) -> None:
    shown = recipes("plan", f"{model}:acme@acme-tool", "--json").json
    (stage,) = [stage for stage in shown["stages"] if stage["name"] == "stage2"]
    assert Path(stage["command"][0]).name == "acme-build"
    assert stage["command"][2] == "--output"
    assert "/engines/m-acme-acme-tool-cpu" in stage["command"][3]


def test_simulate_judges_an_engine_whose_gpu_is_not_here(model: Path) -> None:
    built = engine_recipes.build(f"{model}:acme@acme", target="sm89")
    assert built.report.verdict == "warn"
    assert any("simulated" in check.note for check in built.report.checks)
    assert built.report.metrics["mean_kl"] < 1e-4


def test_load_source_gives_the_baseline_that_the_engine_is_held_against(built: Build) -> None:
    manifest = json.loads((built.path("baseline") / "manifest.json").read_text())
    assert manifest["provider"]["module"] == "engine_recipes_acme.reference"
    assert 0 <= built.report.metrics["mean_kl"] < 1e-4


def test_validate_adds_a_check_and_a_number_with_limits(built: Build) -> None:
    checks = {check.name: check for check in built.report.checks}
    assert checks["weights are whole"].verdict == "pass"
    assert checks["acme_gigabytes"].limit == 1.0
    assert 0 < built.report.metrics["acme_gigabytes"] < 0.001


def test_fallbacks_offer_another_type_after_an_overflow(built: Build) -> None:
    context = StageContext("m:acme@acme", "stage1", {"dtype": "float16"}, (), Path())
    overflow = Report("fail", checks=(Check("logits are finite", "fail"),))
    assert Host().fallbacks(provider("precision"), context, overflow) == [{"dtype": "bfloat16"}]
    assert Host().fallbacks(provider("precision"), context, Report("fail")) == []


def test_load_engine_generates_what_its_logits_say(built: Build) -> None:
    runtime = Host().load_engine(provider("engine"), built.path("stage2"), {})
    ids = [5, 7]
    for token in runtime.generate(ids[:], Sampling(max_tokens=8)):
        assert token == int(runtime.logits(ids)[-1].argmax())
        ids.append(token)
    assert len(ids) == 10
    runtime.close()


def built_context(built: Build, stage: str) -> StageContext:
    return StageContext("m:acme@acme", stage, {}, (Artifact("hf-checkpoint", built.path("resolve"), ""),), Path())  # type: ignore[arg-type]
