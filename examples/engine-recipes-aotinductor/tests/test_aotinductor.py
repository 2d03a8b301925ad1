"""What is special to this engine. One tiny model is compiled, once, with a compiler that counts its calls."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from engine_recipes_aotinductor import engine, machine

import engine_recipes
from engine_recipes import (
    Decoder,
    MachineError,
    RequestError,
    Sampling,
    StageContext,
    StageFailed,
    from_hf,
    read_manifest,
    testing,
)

CONFIG = testing.tiny_config(tie_word_embeddings=True)
PROMPT = [5, 9, 2, 77, 130, 31]


@dataclass(frozen=True)
class World:
    """A workspace with a model that was built in it.

    Attributes:
        model: the source, float16.
        engine: the built engine's folder.
        calls: one line for each call of the compiler.
        temporary: where temporary files went.
    """

    model: Path
    engine: Path
    calls: Path
    temporary: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    temporary, calls, script = folder / "temporary", folder / "calls", folder / "compiler"
    temporary.mkdir()
    script.write_text(f'#!/bin/sh\necho "$*" >> {shlex.quote(str(calls))}\nexec g++ "$@"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RECIPES_WORKSPACE", str(folder / "workspace"))
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        patch.setenv("TMPDIR", str(temporary))
        patch.setenv("CXX", str(script))
        model = testing.write_checkpoint(folder / "tiny-llama", CONFIG, from_hf(CONFIG))
        build = engine_recipes.build(f"{model}:fp16@aotinductor")
        assert build.status == "built"
        built = build.path("stage2")
        assert built
        yield World(model, built, calls, temporary)


def test_it_computes_what_transformers_computes(world: World) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world.model, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    with closing(engine.load_engine(world.engine, {})) as runtime:
        error = np.sqrt(np.mean((runtime.logits(PROMPT) - expected) ** 2)) / expected.std()
    assert error < 1e-5


def test_weights_are_stored_once_as_the_checkpoint_has_them(world: World) -> None:
    parameters = from_hf(CONFIG).parameters  # the tied head counts once
    tables = 2 * 256 * 16 * 4  # cosine and sine
    size = (world.engine / "weights.safetensors").stat().st_size
    assert 2 * parameters + tables < size < 1.1 * (2 * parameters + tables)


def test_another_checkpoint_of_the_same_shape_compiles_nothing(world: World) -> None:
    before = compilations(world)
    assert before >= 2
    build = engine_recipes.build(f"{world.model}:bf16@aotinductor")
    folder = build.path("stage2")
    assert folder and compilations(world) == before
    assert (folder / "model.pt2").read_bytes() == (world.engine / "model.pt2").read_bytes()
    assert (folder / "weights.safetensors").read_bytes() != (world.engine / "weights.safetensors").read_bytes()


def compilations(world: World) -> int:
    """How often the compiler was asked for more than its version."""
    return sum("--version" not in line for line in world.calls.read_text().splitlines())


def test_nothing_is_left_outside_of_the_workspace(world: World) -> None:
    left = [path for path in world.temporary.rglob("*") if path.is_file()]
    assert left == []


def test_the_manifest_says_what_it_was_compiled_for_and_by(world: World) -> None:
    manifest = read_manifest(world.engine)
    assert manifest
    assert manifest["result"]["cpu"] == "x86-64-v3"
    assert "g++" in manifest["result"]["compiler"].lower() or "gcc" in manifest["result"]["compiler"].lower()
    assert manifest["machine"]["versions"]["torch"]


def test_running_an_engine_needs_neither_a_compiler_nor_inductor(world: World) -> None:
    code = (
        "import sys; from pathlib import Path; from engine_recipes import Sampling\n"
        "from engine_recipes_aotinductor.engine import load_engine\n"
        "runtime = load_engine(Path(sys.argv[1]), {'threads': 1})\n"
        f"print(list(runtime.generate({PROMPT}, Sampling(max_tokens=3))))\n"
        "print([name for name in sys.modules if name.startswith('torch._inductor.c')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(world.engine)],
        env={**os.environ, "PATH": "", "CXX": "/no/compiler"},
        capture_output=True,
        text=True,
        check=True,
    )
    said, modules = done.stdout.splitlines()
    assert len(said.split(",")) == 3 and modules == "[]"


def test_closing_while_an_answer_is_read_harms_nothing(world: World) -> None:
    runtime = engine.load_engine(world.engine, {})
    whole = list(runtime.generate(PROMPT, Sampling(max_tokens=6)))
    answer = runtime.generate(PROMPT, Sampling(max_tokens=6))
    first = next(answer)
    runtime.close()
    assert [first, *answer] == whole


@pytest.mark.parametrize("file", ["model.pt2", "weights.safetensors", "engine.json"])
def test_a_file_that_was_cut_off_is_said(world: World, tmp_path: Path, file: str) -> None:
    shutil.copytree(world.engine, tmp_path / "engine")
    path = tmp_path / "engine" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(StageFailed, match="cannot load this engine"):
        engine.load_engine(tmp_path / "engine", {})


def test_without_a_compiler_it_is_refused_before_the_checkpoint_is_converted(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MachineError, match="needs the program no-such-compiler") as error:
        engine_recipes.build(f"{world.model}:fp16@aotinductor", workspace=tmp_path)
    assert "CXX" in error.value.hint
    assert not list(tmp_path.rglob("rank0.safetensors"))


def test_what_the_compiler_refuses_is_a_failed_stage_with_its_words(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\ncase "$*" in *--version*) exec g++ "$@";; esac\necho "out of ideas" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(StageFailed, match=r"C\+\+ compiler failed") as error:
        engine_recipes.build(f"{world.model}:fp16@aotinductor", settings={"build.max_seq_len": "64"})
    assert "out of ideas" in error.value.output


def test_a_cpu_that_cannot_run_it_is_said(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_flags", lambda: ["sse4_2", "avx"])
    with pytest.raises(MachineError, match="AVX2"):
        engine.load_engine(world.engine, {})
    with pytest.raises(MachineError, match="AVX2"):
        check(from_hf(CONFIG))


def check(decoder: Decoder, **options: int) -> None:
    engine.check_decoder(StageContext("m:fp16@aotinductor", "stage2", options, (), Path()), decoder)


@pytest.mark.parametrize(
    ("changes", "options", "what"),
    [
        ({"hidden_act": "relu"}, {}, "activation 'relu'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {}, "rope scaling 'dynamic'"),
        ({}, {"max_seq_len": 257}, "max_seq_len = 257"),
    ],
)
def test_a_model_that_cannot_be_compiled_is_refused_early(
    changes: dict[str, object], options: dict[str, int], what: str
) -> None:
    with pytest.raises(RequestError, match=what):
        check(from_hf({**CONFIG, **changes}), **options)


def test_a_quantised_checkpoint_is_refused_when_planned(world: World) -> None:
    plan = engine_recipes.plan(f"{world.model}:int8-wo@aotinductor")
    assert "does not run int8-wo" in plan.lacking["stage2"].message
