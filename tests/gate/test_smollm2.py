"""A real model through the command line: good engines pass, and spoilt checkpoints are rejected for what they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import sabotage
import smollm2
from conftest import command
from engine_recipes import gate
from engine_recipes.checkpoint import open_source, read_statistics
from engine_recipes.gate import artifact, limits
from engine_recipes.registry import load

#: Less than the default, for the sake of time: 128 tokens of each text.
LITTLE = {"gate.window": "128", "gate.max_tokens": "24", "gate.reference": "onnxruntime"}
CALIBRATE = {"calib.size": "32", "calib.seq_len": "256"}
Build = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Build]:
    """One build each, in one workspace: the baseline is made once."""
    workspace = tmp_path_factory.mktemp("workspace")
    return {
        "fp16": build(workspace, "fp16", LITTLE),
        "fp8": build(workspace, "fp8", {**LITTLE, **CALIBRATE, "kv_cache": "fp8"}),
        "int4-awq": build(workspace, "int4-awq", {**LITTLE, **CALIBRATE}),
    }


def build(workspace: Path, precision: str, settings: dict[str, str]) -> Build:
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    line = command("build", f"{smollm2.folder()}:{precision}", *words, "--workspace", workspace, "--json", "-q")
    done = subprocess.run(
        line, stdout=subprocess.PIPE, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    found: Build = json.loads(done.stdout)["builds"][0]
    return found


def test_good_engines_pass_and_cost_one_baseline(built: dict[str, Build]) -> None:
    for precision, found in built.items():
        assert found["status"] == "built", found["validation"]
        bad = [check for check in found["validation"]["checks"] if check["verdict"] not in ("pass", "not run")]
        assert not bad, (precision, bad)
    baselines = [
        stage["status"] for found in built.values() for stage in found["stages"] if stage["name"] == "baseline"
    ]
    assert baselines == ["run", "cached", "cached"]
    kls = [found["validation"]["metrics"]["mean_kl"] for found in built.values()]
    assert kls[0] < 1e-4 < kls[1] < kls[2]


@pytest.mark.parametrize(
    ("precision", "name", "check"),
    [
        ("fp16", "rope_base", "settings equal the source's"),
        ("fp16", "swap_qk", "weight_rounding"),
        ("fp16", "norms_one", "weight_rounding"),
        ("fp16", "head_4_bits", "weight_rounding"),
        ("fp16", "drop_last_layer", "settings equal the source's"),
        ("fp16", "nan_in_one", "weights are finite"),
        ("fp8", "permute_layer", "weight_rounding"),
        ("fp8", "swap_fc_gate", "weight_rounding"),
        ("fp8", "scale_times_8", "weight_error"),
        ("fp8", "activation_scale_quarter", "scale_drift"),
        ("fp8", "kv_scale_times_8", "scale_drift"),
        ("fp8", "head_int8", "quantised as named"),
        ("int4-awq", "swap_nibbles", "weight_error"),
        ("int4-awq", "one_group_times_8", "weight_rounding"),
    ],
)
def test_spoilt_checkpoints_are_rejected_before_anything_is_run(
    built: dict[str, Build], tmp_path: Path, precision: str, name: str, check: str
) -> None:
    stages = {stage["name"]: Path(stage["path"]) for stage in built[precision]["stages"]}
    bad = Path(shutil.copytree(stages["stage1"], tmp_path / "bad"))
    getattr(sabotage, name)(bad)
    registry = load()
    entry = registry.precisions[precision]
    statistics = read_statistics(stages["calibrate"]) if "calibrate" in stages else None
    with open_source(stages["resolve"]) as source:
        findings = artifact.examine(bad, source, algorithm=entry.algorithm, bits=entry.bits, statistics=statistics)
    options = limits.options(registry, entry, parameters=134_515_008)
    chosen = {key: option.default for key, option in options.items()}
    report = gate.judge(findings, limits.bounds(registry, chosen))
    assert check in report.failed, report.checks
