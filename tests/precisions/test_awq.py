from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelopt_oracle
import tiny
from engine_recipes import RequestError
from engine_recipes.calibration import read_rows
from engine_recipes_precisions import amax, awq, awq_search, device

from .calibrating import TEXT, calibrate, same, source

ROLES = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "dense": "self_attn.o_proj"}
ROLES |= {role: f"mlp.{role}_proj" for role in ("gate", "up", "down")}
#: Divides by 64.
WIDE = {"intermediate_size": 192}


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in float32, whatever this CPU has."""
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)


def test_sums_over_parts_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "BLOCK", 3)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    sums = awq.InputSums()
    for part in x:
        sums.look(torch.nn.Identity(), (part[None] * 100,))  # was not added: the device ran out of memory
        sums.look(torch.nn.Identity(), (part[None],))
        sums.add()
    flat = x.flatten(0, 1)
    torch.testing.assert_close(sums.gram(), flat.T @ flat)
    torch.testing.assert_close(sums.absolute / sums.tokens, flat.abs().mean(0))
    assert sums.tokens == 10


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_scales_that_modelopt_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None, arch: str
) -> None:
    hf = source(tmp_path / "hf", arch, **WIDE)
    found = calibrate(awq, hf, tmp_path / "out", monkeypatch)
    tokens = torch.from_numpy(read_rows([TEXT], hf, 4, 24, 1).ids)
    expected = modelopt_oracle.statistics(modelopt_oracle.calibrated(hf, "int4_awq", tokens=tokens))
    for layer in range(3):
        for role in ("dense", "gate", "up", "down"):
            name = f"model.layers.{layer}.{ROLES[role]}.pre_quant_scale"
            np.testing.assert_allclose(found.vector(name), expected[name], rtol=1e-4, err_msg=name)


def test_q_k_and_v_share_the_best_scale_for_all_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None
) -> None:
    hf = source(tmp_path / "hf", **WIDE)
    found = calibrate(awq, hf, tmp_path / "out", monkeypatch)
    inputs = modelopt_oracle.inputs(hf, torch.from_numpy(read_rows([TEXT], hf, 4, 24, 1).ids))
    weights = tiny.tensors(tiny.config("llama", vocab_size=103, **WIDE))
    names = [f"model.layers.1.{ROLES[role]}" for role in ("q", "k", "v")]
    weight = torch.cat([torch.from_numpy(weights[f"{name}.weight"].astype(np.float32)) for name in names])
    x = inputs[names[0]]
    best = awq_search.search(weight, x.T @ x, x.abs().mean(0), 64).numpy()
    for name in names:
        np.testing.assert_allclose(found.vector(f"{name}.pre_quant_scale"), best, rtol=1e-4)


def test_finds_what_amax_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path / "hf", **WIDE)
    maxima = calibrate(amax, hf, tmp_path / "amax", monkeypatch)
    scales = calibrate(awq, hf, tmp_path / "awq", monkeypatch)
    for name in maxima.names():
        assert maxima.vector(name) == scales.vector(name), name
    assert len(scales.names()) == len(maxima.names()) + 3 * 7
    assert (scales.about["method"], scales.about["group_size"]) == ("awq", 64)
    assert scales.about["phases"]["search_seconds"] > 0


def test_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path / "hf", **WIDE)
    for out in ("one", "two"):
        calibrate(awq, hf, tmp_path / out, monkeypatch, [TEXT[:100], TEXT[:30], TEXT[40:]])
    one, two = (tmp_path / out / "statistics.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_running_out_of_memory_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    hf = source(tmp_path / "hf", **WIDE)
    plain = calibrate(awq, hf, tmp_path / "plain", monkeypatch)
    real, tokens = LlamaMLP.forward, []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = real(self, x)
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    search = awq.Awq._search

    def look(self: awq.Awq, index: int, layer: torch.nn.Module, sums: list[awq.InputSums]) -> Any:
        tokens.extend(total.tokens for total in sums)
        return search(self, index, layer, sums)

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(awq.Awq, "_search", look)
    same(plain, calibrate(awq, hf, tmp_path / "halved", monkeypatch), tolerance=1e-4)
    assert tokens == [96] * 4 * 3


def test_what_a_failed_attempt_noted_is_dropped_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, float32: None
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    held: list[int] = []
    sums: list[awq.InputSums] = []
    real, note = LlamaMLP.forward, awq.InputSums.__init__

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = real(self, x)
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    def remember(self: awq.InputSums) -> None:
        note(self)
        sums.append(self)

    def free() -> None:
        held.append(sum(total._noted is not None for total in sums))

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    monkeypatch.setattr(awq.InputSums, "__init__", remember)
    monkeypatch.setattr(device, "free_cached", free)
    calibrate(awq, source(tmp_path / "hf", **WIDE), tmp_path / "out", monkeypatch)
    assert held == [0, 0]


def test_an_error_of_the_product_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def mm(*args: Any, **options: Any) -> torch.Tensor:
        if "out_dtype" in options:
            raise TypeError("expected another dtype")
        return torch.zeros(0)

    class OnGpu:
        is_cuda, dtype, T = True, torch.bfloat16, None

    monkeypatch.setattr(torch, "mm", mm)
    with pytest.raises(TypeError, match="another dtype"):
        awq._product(OnGpu(), OnGpu())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "inner", "message"), [(128, 192, "group_size 128 does not divide"), (0, 176, "does not divide the 176")]
)
def test_groups_that_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, inner: int, message: str
) -> None:
    hf = source(tmp_path / "hf", intermediate_size=inner)
    with pytest.raises(RequestError, match=message):
        calibrate(awq, hf, tmp_path / "out", monkeypatch, group_size=size)
