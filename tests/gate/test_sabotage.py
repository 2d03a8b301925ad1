"""What the gate lets through and what it does not: engines that work in every way but one, on three seeds."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import sabotage
from engine_recipes import RequestError
from judged import Made, judge, make, said

Make = Callable[[str, str, str, int], Made]
SEEDS = range(3)

#: What is spoilt: architecture, precision, KV cache, and the checks of which one must fail (`warn:` must warn).
CASES: dict[str, list[tuple[str, str, str, str]]] = {
    "rope_base": [("llama", "fp16", "none", "settings equal the source's"), ("llama", "fp8", "none", "settings")],
    "norm_epsilon": [("llama", "bf16", "none", "settings")],
    "activation": [("llama", "fp16", "none", "refused")],
    "swap_qk": [("llama", "fp16", "none", "weight_rounding"), ("llama", "int4-awq", "none", "weight_rounding")],
    "permute_layer": [("llama", "fp16", "none", "weight_rounding"), ("llama", "fp8", "none", "weight_rounding")],
    "scale_times_8": [("llama", "fp8", "none", "weight_error"), ("llama", "int4-awq", "none", "weight_error")],
    "one_group_times_8": [("llama", "int4-awq", "none", "weight_rounding")],
    "activation_scale_quarter": [("llama", "fp8", "none", "scale_drift")],
    "kv_scale_times_8": [("llama", "fp8", "fp8", "scale_drift"), ("llama", "int4-awq", "int8", "scale_drift")],
    "kv_scale_one": [("llama", "fp8", "int8", "scale_drift"), ("qwen2", "fp8", "fp8", "warn:KV cache risk")],
    "swap_fc_gate": [("llama", "bf16", "none", "weight_rounding"), ("llama", "fp8", "none", "weight_rounding")],
    "drop_last_layer": [("llama", "fp16", "none", "settings"), ("llama", "fp8", "none", "settings")],
    "zero_biases": [("qwen2", "fp16", "none", "plain_error"), ("qwen2", "fp8", "none", "plain_error")],
    "norms_one": [("llama", "fp16", "none", "weight_rounding"), ("qwen3", "int4-awq", "none", "weight_rounding")],
    "swap_nibbles": [("llama", "int4-awq", "none", "weight_error")],
    "head_4_bits": [("llama", "fp16", "none", "plain_error"), ("llama", "int4-awq", "none", "plain_error")],
    "head_int8": [("llama", "fp8", "none", "refused")],
    "nan_in_one": [("llama", "fp16", "none", "weights are finite"), ("llama", "fp8", "none", "weights are finite")],
    "layer_left_plain": [("llama", "fp8", "none", "refused")],
}
GOOD = [
    ("llama", "fp16", "none"),
    ("qwen2", "bf16", "none"),
    ("llama", "fp8", "none"),
    ("qwen3", "fp8", "fp8"),
    ("llama", "int4-awq", "none"),
    ("qwen3", "int4-awq", "int8"),
]


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Good checkpoints with their baselines, each made once."""
    with pytest.MonkeyPatch.context() as patch:
        yield cache(lambda *what: make(tmp_path_factory.mktemp("good") / "made", patch, *what))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("arch", "precision", "kv"), GOOD)
def test_a_good_engine_is_let_through(
    goods: Make, tmp_path: Path, arch: str, precision: str, kv: str, seed: int
) -> None:
    report = judge(goods(arch, precision, kv, seed), tmp_path / "good")
    assert not report.failed, said(report)
    assert report.metrics["mean_kl"] < 0.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "arch", "precision", "kv", "found"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_a_spoilt_engine_is_not(
    goods: Make, tmp_path: Path, name: str, arch: str, precision: str, kv: str, found: str, seed: int
) -> None:
    spoil = getattr(sabotage, name)
    try:
        report = judge(goods(arch, precision, kv, seed), tmp_path / "bad", spoil)
    except RequestError as error:
        assert found == "refused", error
        return
    verdict, _, check = found.rpartition(":")
    named = {c.name: c.verdict for c in report.checks}
    assert any(n.startswith(check) and v == (verdict or "fail") for n, v in named.items()), said(report)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_engine_with_another_tokenizer_is_rejected(goods: Make, tmp_path: Path, seed: int) -> None:
    report = judge(goods("llama", "fp16", "none", seed), tmp_path / "bad", spoil_engine=sabotage.wrong_tokenizer)
    assert "tokenizer equals the source's" in report.failed, said(report)
