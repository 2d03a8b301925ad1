"""Models that TensorRT-LLM cannot run are refused before they are calibrated and converted."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny
from engine_recipes import Decoder, RequestError, StageContext
from engine_recipes_engines import tensorrt_llm
from engine_recipes_models import llama


def decoder(**changes: Any) -> Decoder:
    return llama.resolve_checkpoint(tiny.config("llama", **changes))


def check(of: Decoder, **options: Any) -> None:
    tensorrt_llm.check_decoder(StageContext("m:p@e", "stage2", options, (), Path("out"), "sm89"), of)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_head_sizes_with_a_kernel_pass(size: int) -> None:
    check(decoder(head_dim=size))


@pytest.mark.parametrize("size", [16, 100, 288])
def test_a_head_size_without_a_kernel_is_refused(size: int) -> None:
    with pytest.raises(RequestError, match=f"no attention kernel for heads of {size}"):
        check(decoder(head_dim=size))


def test_sequences_longer_than_the_model_are_refused() -> None:
    check(decoder(head_dim=64), max_seq_len=256)
    check(decoder(head_dim=64), max_seq_len=0)
    with pytest.raises(RequestError, match="this model is made for 256") as caught:
        check(decoder(head_dim=64), max_seq_len=257)
    assert "max_seq_len=256" in caught.value.hint


@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "AcmeForCausalLM"])
def test_heads_that_are_rotated_in_part_are_refused(arch: str) -> None:
    with pytest.raises(RequestError, match=f"TensorRT-LLM's {arch} rotates whole heads, this model 32 of 64") as caught:
        check(replace(decoder(head_dim=64), architecture=arch, rotary_size=32))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("arch", "right", "wrong"),
    [
        ("LlamaForCausalLM", 12.0, None),
        ("MistralForCausalLM", 12.0, None),
        ("GemmaForCausalLM", 8.0, 12.0),  # √64
        ("GemmaForCausalLM", math.sqrt(64), 1.0),
        ("Qwen3ForCausalLM", 1.0, 12.0),
        ("AcmeForCausalLM", 1.0, 8.0),
    ],
)
def test_only_what_the_model_class_multiplies_by_is_accepted(arch: str, right: float, wrong: float | None) -> None:
    of = replace(decoder(head_dim=64), architecture=arch, activation="gelu_pytorch_tanh")
    check(replace(of, embedding_scale=right))
    if wrong:
        with pytest.raises(RequestError, match=f"TensorRT-LLM's {arch} multiplies .*, this model by {wrong:g}"):
            check(replace(of, embedding_scale=wrong))
