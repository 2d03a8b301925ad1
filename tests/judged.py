"""Tiny engines and all that judging one takes, in this process: for tests of what the gate lets through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import tiny
from converted import resolve
from engine_recipes import Artifact, Report, StageContext, Tokenizer, checkpoint, gate, testing
from engine_recipes.gate import baseline, limits, measuring
from engine_recipes.host import Host
from engine_recipes.registry import load
from engine_recipes.stages import provider
from engine_recipes.tokenizer import copy_tokenizer
from engine_recipes_engines import onnxruntime as engine
from engine_recipes_precisions import amax, awq
from precisions import calibrating

#: Large enough for groups of 64.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 128, "head_dim": 32}
SIZES = {"window": 96, "max_tokens": 16}
KINDS = {"checkpoint": "trtllm-checkpoint", "calibration": "calibration", "source": "hf-checkpoint"}
Spoil = Callable[[Path], None]


@dataclass(frozen=True)
class Made:
    """A source and what was made from it, in folders of these names: source, calibration, checkpoint, baseline.

    Attributes:
        precision: a name of the registry.
        sizes: window and max_tokens of the baseline.
    """

    folder: Path
    precision: str
    sizes: Mapping[str, int]

    def path(self, name: str) -> Path:
        """One of the folders."""
        return self.folder / name

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """What there is, as hooks get it."""
        return tuple(Artifact(kind, self.path(name), name) for name, kind in KINDS.items() if self.path(name).exists())


def from_build(folder: Path, build: Mapping[str, Any], sizes: Mapping[str, int]) -> Made:
    """What a build of `build --json` left, linked together in a new folder."""
    names = {"resolve": "source", "calibrate": "calibration", "stage1": "checkpoint", "baseline": "baseline"}
    folder.mkdir(parents=True)
    for stage in build["stages"]:
        if stage["name"] in names:
            (folder / names[stage["name"]]).symlink_to(stage["path"])
    return Made(folder, build["precision"], sizes)


def make(folder: Path, monkeypatch: Any, arch: str, precision: str, kv: str = "none", seed: int = 0) -> Made:
    """A tiny lively source, calibrated, converted, and the baseline of it.

    Args:
        folder: a new one.
        arch: a key of tiny.CONFIGS.
        precision: fp16, bf16, fp8 or int4-awq.
        kv: none, fp8 or int8.
        seed: of the weights.
    """
    made = Made(folder, precision, SIZES)
    settings = tiny.config(arch, **SHAPE)
    arrays = tiny.tensors(settings, seed)
    random = np.random.default_rng(seed)
    for name, array in arrays.items():
        if array.ndim == 2:  # lively enough that logits spread, and every tensor of a size of its own
            arrays[name] = (array.astype(np.float32) * random.uniform(2, 5)).astype(array.dtype)
        elif "bias" in name:
            arrays[name] = (array.astype(np.float32) * 8).astype(array.dtype)
    testing.write_tokenizer(tiny.write_tensors(made.path("source"), settings, arrays), 128)
    resolve(made.path("source"))
    made.path("checkpoint").mkdir()
    with checkpoint.open_source(made.path("source")) as source:
        if precision in ("fp16", "bf16"):
            dtype: Any = {"fp16": "float16", "bf16": "bfloat16"}[precision]
            checkpoint.convert(source, made.path("checkpoint"), dtype)
        else:
            module: Any = {"fp8": amax, "int4-awq": awq}[precision]
            statistics = calibrating.calibrate(module, made.path("source"), made.path("calibration"), monkeypatch)
            algorithm: Any = load().precisions[precision].algorithm
            checkpoint.quantize(source, made.path("checkpoint"), statistics, algorithm, kv_cache=kv)  # type: ignore[arg-type]
    _record(made)
    return made


def _context(made: Made, stage: Any, out: Path, *inputs: Artifact) -> StageContext:
    options: dict[str, Any] = {**made.sizes, "texts": measuring.BUILTIN, "max_seq_len": 0}
    return StageContext(f"m:{made.precision}@onnxruntime", stage, options, inputs, out)


def _record(made: Made) -> None:
    scratch = made.folder / "scratch"
    for folder in (made.path("baseline"), scratch):
        folder.mkdir()
    context = _context(made, "baseline", scratch, *made.artifacts)
    runtime = engine.load_source(context)
    tokenizer, material = Tokenizer.load(made.path("source")), measuring.material(context)
    baseline.record(made.path("baseline"), runtime, tokenizer, material, **SIZES, about={"reference": "test"})
    runtime.close()
    shutil.rmtree(scratch)


def judge(made: Made, folder: Path, spoil: Spoil | None = None, spoil_engine: Spoil | None = None) -> Report:
    """Copy the checkpoint, spoil it, compile it, spoil the engine, and judge as `recipes validate` does.

    Args:
        folder: a new one.

    Raises:
        RequestError: what was made of the checkpoint is refused before anything is run.
    """
    copy = Made(folder, made.precision, made.sizes)
    folder.mkdir()
    for name in ("source", "calibration", "baseline"):
        if made.path(name).exists():
            copy.path(name).symlink_to(made.path(name).resolve())
    shutil.copytree(made.path("checkpoint"), copy.path("checkpoint"))
    if spoil:
        spoil(copy.path("checkpoint"))
    out = copy.path("engine")
    out.mkdir()
    engine.stage2(_context(copy, "stage2", out, *copy.artifacts))
    with checkpoint.open_source(copy.path("source")) as source:
        copy_tokenizer(source.folder, out)
    if spoil_engine:
        spoil_engine(out)
    return _judged(copy)


def _judged(made: Made) -> Report:
    registry = load()
    precision = registry.precisions[made.precision]
    providers = [
        provider("family", registry.families["llama"]),
        provider("precision", precision),
        provider("engine", registry.engines["onnxruntime"]),
    ]
    first, last = (Artifact(kind, made.path(kind), kind) for kind in ("engine", "baseline"))
    context = _context(made, "validate", made.folder, first, *made.artifacts, last)
    claims = {
        "algorithm": precision.algorithm,
        "bits": precision.bits,
        "gives": precision.gives,
        "not_compared": "",
        "unwitnessed": "",
    }
    claims |= {"cannot_run": "", "engine_options": {}}
    findings = measuring.measure(Host(providers), providers, context, claims)
    options = limits.options(registry, precision, parameters=1_000_000)
    return gate.judge(findings, limits.bounds(registry, {name: option.default for name, option in options.items()}))


def said(report: Report) -> str:
    """What a report found wrong, for a message of a failing test."""
    bad = [c for c in report.checks if c.verdict != "pass"]
    return json.dumps([[c.name, c.verdict, c.value, c.limit, c.note] for c in bad], default=str)
