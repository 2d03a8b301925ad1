"""Workspaces with engines to compare: real folders, written by the functions that builds, the gate and benches use."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine_recipes import bench, gate
from engine_recipes.keys import key_of
from engine_recipes.store import Slot, Store
from engine_recipes.types import Check, Findings, Measure, Provider

SETTINGS = {"batch": 1, "prompt_tokens": 128, "new_tokens": 64, "warmup": 1, "repeat": 5, "threads": None}


def source(store: Store, model: str = "smollm2-135m", kilobytes: int = 250) -> tuple[Path, str]:
    """A resolved source of that size, at weights in float16; its folder and key."""
    files = store.workspace / "models" / model
    files.mkdir(parents=True, exist_ok=True)
    (files / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    (files / "model.safetensors").write_bytes(bytes(1000 * kilobytes))
    written = {"source.json": json.dumps({"folder": str(files)})}
    return _artifact(store, "sources", model, written, {"stage": "resolve", "kind": "hf-checkpoint", "seconds": 0.2})


def engine(
    store: Store,
    recipe: str,
    kilobytes: int,
    *,
    model: str = "smollm2-135m",
    given: Mapping[str, Any] | None = None,
    findings: Findings | None = None,
    accepted: str = "",
    calibrated: float = 0,
) -> Path:
    """A built engine, `fp8@onnxruntime`. `calibrated`: seconds of a calibration before it. `findings`: as judged."""
    ref = f"{model}:{recipe}"
    slots = {"ref": ref, "set": dict(given or {}), "source": {"spec": f"hf:acme/{model}", "revision": "abc"}}
    inputs = [("hf-checkpoint", *source(store, model))]
    if calibrated:
        made = {**slots, "stage": "calibrate", "kind": "calibration", "seconds": calibrated, "inputs": _named(inputs)}
        inputs.insert(0, ("calibration", *_artifact(store, "calibrations", f"{model}-amax", {}, made)))
    made = {**slots, "stage": "stage1", "kind": "toy-checkpoint", "seconds": 1.5, "inputs": _named(inputs)}
    precision = recipe.partition("@")[0]
    inputs.insert(0, ("toy-checkpoint", *_artifact(store, "checkpoints", f"{model}-{precision}", {}, made)))
    made = {**slots, "stage": "stage2", "kind": "toy-engine", "target": "cpu", "seconds": 2.5}
    made |= {"inputs": _named(inputs), "preimage": {"tools": {"toy": "1.0"}}, "machine": {"system": "Toy-1.0"}}
    label = f"{model}-{recipe.replace('@', '-')}-cpu"
    folder, key = _artifact(store, "engines", label, {"model.bin": "x" * 1000 * kilobytes}, made)
    if findings:
        report = gate.judge(findings, {"mean_kl": gate.Bound("above", 0.1, 0.5, "how far it is")}, accepted)
        gate.write(folder, key, findings, report)
        if report.verdict != "fail":
            store.link(folder)
    return folder


def baseline(store: Store, source_key: str, reference: str, perplexity: float) -> Path:
    """What the gate keeps about a source that `reference` ran."""
    inputs = [{"kind": "hf-checkpoint", "path": "", "key": source_key}]
    provider = asdict(Provider("reference", reference, "module", "package", "1.0"))
    manifest = {"stage": "baseline", "kind": "baseline", "provider": provider, "inputs": inputs}
    texts = [{"ids": [1, 2, 3], "log_likelihood": -2 * math.log(perplexity)}]
    files = {"baseline.json": json.dumps({"schema": 1, "texts": texts})}
    return _artifact(store, "baselines", "smollm2-135m", files, manifest)[0]


def judged(kl: float, ratio: float, top1: float, text: str = "The same.", *checks: Check) -> Findings:
    """Findings of an engine that said `text` where the source said `The same.`"""
    measures = [Measure("mean_kl", kl), Measure("perplexity_ratio", ratio), Measure("top1_agreement", top1)]
    return Findings(tuple(measures), checks, ({"prompt": "Say it.", "text": text, "source": "The same."},))


def timed(folder: Path, tokens: float, spread: float = 1.0, cpu: str = "Toy CPU", **settings: Any) -> None:
    """A measurement beside an engine: decode speed, and a load of 0.4 s."""
    metrics = {
        "load_seconds": _spread(0.4, 0.01),
        "first_token_seconds": _spread(0.05, 0.001),
        "decode_tokens_per_second": _spread(tokens, spread),
    }
    made = {"settings": {**SETTINGS, **settings}, "metrics": metrics, "machine": {"cpu": cpu, "gpus": []}}
    bench.keep(folder, {**made, "created": "2030-01-01T00:00:00+00:00"})


def _spread(median: float, half: float) -> dict[str, float]:
    return {"median": median, "min": median - 2 * half, "max": median + 2 * half, "iqr": 2 * half}


def _artifact(
    store: Store, place: str, label: str, files: Mapping[str, str], manifest: Mapping[str, Any]
) -> tuple[Path, str]:
    slot = Slot(place, label, key_of({"label": label, **manifest}))
    with store.staging(slot) as out:
        for name, text in files.items():
            (out / name).write_text(text)
        created = f"2030-01-01T00:00:{len(store.artifacts(place)):02d}+00:00"
        return store.commit(slot, out, {"schema": 1, "created": created, **manifest}), slot.key


def _named(inputs: Sequence[tuple[str, Path, str]]) -> list[dict[str, str]]:
    return [{"kind": kind, "path": str(path), "key": key} for kind, path, key in inputs]
