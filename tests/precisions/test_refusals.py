"""What people ask of a calibrated build and cannot have: two lines, the exit code, nothing half-written, no waiting."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tiny
from conftest import Ran, Recipes, install
from engine_recipes import testing

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
LITTLE = ("--set", "calib.size=2", "--set", "calib.seq_len=32")
UP = "model.layers.1.mlp.up_proj.weight"


def write(change: Callable[[dict[str, Any]], object] = lambda arrays: None, **changes: Any) -> Path:
    """A tiny Llama in the current folder, under `model`."""
    settings = tiny.config("llama", **{**SIZES, **changes})
    arrays = tiny.tensors(settings)
    change(arrays)
    return testing.write_tokenizer(tiny.write_tensors(Path("model"), settings, arrays))


def refused(ran: Ran, workspace: Path, code: int = 2) -> list[str]:
    """The error's two lines, and nothing is left that a later build could take for a result."""
    assert ran.code == code, ran.err
    for place in ("calibrations", "checkpoints", "engines"):
        assert not list((workspace / place).glob("*"))
    assert all(ran.error)
    return ran.error


@pytest.fixture
def before_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports torch to measure something fails with a crash, and not with the error that is expected."""
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "torch.py").write_text("raise RuntimeError('too late to refuse')\n")
    path = os.pathsep.join(filter(None, [str(tmp_path / "trap"), os.environ.get("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)


NINE = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
IMPOSSIBLE: list[tuple[str, dict[str, Any], list[str], str, str]] = [
    ("fp8", NINE, ["tp_size=2"], "num_attention_heads 9 cannot be split over tp_size 2", "tp_size 1"),
    ("int4-awq", NINE, ["tp_size=2"], "num_attention_heads 9 cannot be split over tp_size 2", "tp_size 1"),
    ("int4-awq", {"intermediate_size": 176}, [], "group_size 64 does not divide the 176 inputs of mlp.proj", "fp8"),
    (
        "int4-awq",
        {},
        ["tp_size=2", "group_size=128"],
        "group_size 128 does not divide the 64 inputs of attention.dense",
        "group_size 64 would work",
    ),
    ("fp8", {"quantization_config": {"quant_method": "awq"}}, [], "already quantized", "unquantised original"),
    ("fp8", {"num_attention_heads": 32}, [], "heads of 4, and not of a multiple of 8", "another engine"),
    ("fp8", {}, ["build.max_seq_len=999"], "max_seq_len = 999", "choose 1 to 512"),
    ("fp8", {}, ["kv_cache=fp4"], "kv_cache = 'fp4': must be one of none, fp8, int8", ""),
    ("int4-awq", {}, ["group_size=96"], "group_size = 96: must be one of 0, 64, 128", ""),
    ("fp8", {}, ["exclude=*.mlp.down"], "exclude: *.mlp.down is no linear layer of this model", "attention.dense"),
    ("int4-awq", {}, ["exclude=*"], "exclude: every linear layer is excluded", "fp16 or bf16"),
    ("fp8", {}, ["exclude=*.0.mlp.fc", "pp_size=2"], "layers.1.mlp.fc would be excluded as well", "pp_size 1"),
    ("fp8", {}, ["calib.seq_len=513"], "calib.seq_len = 513 and the model has 512 positions", "calib.seq_len=512"),
]


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize(("precision", "changes", "options", "message", "hint"), IMPOSSIBLE)
def test_what_cannot_be_built_is_refused_before_it_is_calibrated(
    recipes: Recipes,
    workspace: Path,
    precision: str,
    changes: dict[str, Any],
    options: list[str],
    message: str,
    hint: str,
) -> None:
    write(**changes)
    settings = [word for text in ["calib.size=2", *options] for word in ("--set", text)]
    ran = recipes("build", f"./model:{precision}", *settings)
    first, second = refused(ran, workspace)
    assert message in first
    assert hint in second


TEXTS: dict[str, tuple[bytes | None, str]] = {
    "missing.txt": (None, "there is no file missing.txt"),
    "empty.txt": (b"", "empty.txt is empty"),
    "binary.txt": (bytes(range(256)) * 99, "binary.txt is no text file"),
    "blank.txt": (b" \n\t\n" * 99, "blank.txt holds no text"),
    "padding.txt": (b"</s>" * 99, "the calibration text has no tokens"),
}


@pytest.mark.usefixtures("before_torch")
@pytest.mark.parametrize("name", TEXTS)
def test_data_that_is_no_text_is_refused(recipes: Recipes, workspace: Path, name: str) -> None:
    write()
    contents, message = TEXTS[name]
    if contents is not None:
        Path(name).write_bytes(contents)
    ran = recipes("build", "./model:fp8", *LITTLE, "--set", f"calib.data={name}")
    assert message in refused(ran, workspace)[0]


def overflow(arrays: dict[str, Any]) -> None:
    """Values that are fine for themselves, and whose product is not."""
    for name in (UP, UP.replace("up", "gate")):
        arrays[name] = (arrays[name].astype(np.float32) * 1e37).astype(ml_dtypes.bfloat16)


def test_a_layer_that_overflows_is_named(recipes: Recipes, workspace: Path) -> None:
    write(overflow)
    first, _ = refused(recipes("build", "./model:fp8", *LITTLE), workspace, code=4)
    assert first == "activations of model.layers.1 are NaN or inf"


def test_another_modelopt_is_said_at_once_with_the_command_that_installs_the_right_one(
    recipes: Recipes, workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write()
    info = tmp_path / "site" / "nvidia_modelopt-0.50.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-modelopt\nVersion: 0.50.0\n")
    install(monkeypatch, tmp_path / "site")
    first, second = refused(recipes("build", "./model:fp8", *LITTLE), workspace, code=3)
    assert "needs nvidia-modelopt>=0.47,<0.49" in first
    assert "here is 0.50.0" in first
    assert second == "pip install 'engine-recipes[modelopt]'"
    stages = recipes("plan", "./model:fp8", "--json").json["stages"]
    assert [stage["name"] for stage in stages if stage["status"] == "blocked"] == ["calibrate"]
    assert recipes("build", "./model:int4-wo", "--until", "stage1").code == 0
