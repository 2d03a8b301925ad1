"""The AWQ search on Gram matrices chooses what ModelOpt chooses by running all tokens through every candidate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

import modelopt_oracle
import smollm2
import tiny
from engine_recipes_precisions import awq_search

ZEN = (
    "Beautiful is better than ugly. Explicit is better than implicit. Simple is better than complex. Complex is "
    "better than complicated. Flat is better than nested. Sparse is better than dense. Readability counts. Special "
    "cases aren't special enough to break the rules. Although practicality beats purity. Errors should never pass "
    "silently. Unless explicitly silenced. In the face of ambiguity, refuse the temptation to guess."
)


def made(rows: int, width: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [rows, width] and inputs [tokens, width], float64, with channels of different size."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=random, dtype=torch.float64)
    channels = torch.rand(width, generator=random, dtype=torch.float64) * 4 + 0.1
    return weight, torch.randn(tokens, width, generator=random, dtype=torch.float64) * channels


def direct_loss(weight: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, group_size: int) -> torch.Tensor:
    """Squared error of the outputs, token by token, in the dtype given."""
    groups = (weight * scale).reshape(-1, group_size)
    step = groups.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
    rounded = ((groups / step).round().clamp(-8, 7) * step).reshape(weight.shape)
    return (x @ weight.T - (x / scale) @ rounded.T).square().sum()


def agree(hf: Path, tokens: torch.Tensor) -> int:
    """Compare every linear's search with ModelOpt's in float32; returns how many there were."""
    model = modelopt_oracle.calibrated(hf, "int4_awq", group_size=64, tokens=tokens)
    inputs, source = modelopt_oracle.inputs(hf, tokens), modelopt_oracle.load(hf)
    searches = {name: found for name, found in modelopt_oracle.searches(model).items() if name in inputs}
    chosen = []
    for name, theirs in searches.items():
        x, weight = inputs[name], source.get_parameter(f"{name}.weight")
        gram, mean = x.T @ x, x.abs().mean(0)
        scales = awq_search.candidates(mean, awq_search.weight_scale(weight, 64))
        ours = awq_search.losses(weight, gram, scales, 64) / (len(x) * len(weight))
        losses = torch.tensor(list(theirs.loss.values()))
        torch.testing.assert_close(ours, losses, rtol=1e-2, atol=0)
        assert losses[ours.argmin()] < losses.min() * 1.005, name
        chosen.append(bool(ours.argmin() == losses.argmin()))
        if chosen[-1]:
            found = awq_search.search(weight, gram, mean, 64)
            torch.testing.assert_close(found, 1 / theirs.best_scale, rtol=1e-3, atol=0)
    assert chosen.count(False) <= len(chosen) // 20
    return len(chosen)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_a_tiny_model_gets_the_scales_of_modelopt(tmp_path: Path, arch: str) -> None:
    hf = tiny.write(tmp_path, arch, hidden_size=128, intermediate_size=384, num_hidden_layers=2, vocab_size=256)
    assert agree(hf, modelopt_oracle.token_rows(256)) == 14


def test_smollm2_gets_the_scales_of_modelopt(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    hf = smollm2.folder()
    settings = json.loads((hf / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 3}))
    for file in hf.glob("*.safetensors*"):
        (tmp_path / file.name).symlink_to(file)
    tokens = AutoTokenizer.from_pretrained(hf)(ZEN, return_tensors="pt").input_ids
    assert agree(tmp_path, tokens) == 21


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 60),
    group_size=st.sampled_from([8, 16]),
    tokens=st.integers(1, 30),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_the_gram_matrix_gives_the_loss_over_tokens(
    rows: int, groups: int, group_size: int, tokens: int, seed: int
) -> None:
    """Also where G is taken in several pieces, and for rows that are judged by several threads."""
    weight, x = made(rows, groups * group_size, tokens, seed)
    scales = awq_search.candidates(x.abs().mean(0), weight.abs().mean(0), (0.0, 0.5, 1.0))
    ours = awq_search.losses(weight, x.T @ x, scales, group_size)
    expected = torch.stack([direct_loss(weight, x, scale, group_size) for scale in scales])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_products_in_bfloat16_are_close_enough() -> None:
    weight, x = made(96, 1024, 300)
    scales = awq_search.candidates(x.abs().mean(0), awq_search.weight_scale(weight, 128).double())
    exact = awq_search.losses(weight, x.T @ x, scales, 128)
    fast = awq_search.losses(weight.bfloat16(), (x.T @ x).float(), scales.float(), 128)
    rounded = awq_search.losses(weight.bfloat16().double(), x.T @ x, scales, 128)
    torch.testing.assert_close(fast.double(), rounded, rtol=1e-2, atol=0)
    torch.testing.assert_close(rounded, exact, rtol=5e-2, atol=0)


def test_weights_and_channels_of_zero_get_a_finite_scale() -> None:
    weight, x = made(32, 128, 50)
    weight[:, :64], weight[3], x[:, 100] = 0, 0, 0
    found = awq_search.search(weight.float(), (x.T @ x).float(), x.abs().mean(0).float(), 64)
    assert found.dtype == torch.float32
    assert found.shape == (128,)
    assert found.isfinite().all()
    assert (found > 0).all()


def test_a_parameter_is_searched_and_the_threads_are_left_as_they_were() -> None:
    weight, x = made(64, 64, 50)
    before = torch.get_num_threads()
    parameter = torch.nn.Parameter(weight.float())
    found = awq_search.search(parameter, (x.T @ x).float(), x.abs().mean(0).float(), 32)
    assert not found.requires_grad
    assert torch.get_num_threads() == before
