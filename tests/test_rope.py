from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tiny
from engine_recipes import from_hf, rope
from engine_recipes_models import llama

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, LLAMA3, YARN, {"rope_type": "linear", "factor": 3.0}])
@pytest.mark.parametrize("size", [32, 128])
def test_rope_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None, size: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_theta": 500000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(head_dim=size, max_position_embeddings=256, rope_parameters=parameters)
    expected = LlamaRotaryEmbedding(config)
    decoder = llama.resolve_checkpoint(tiny.config(head_dim=size, rope_theta=500000.0, rope_scaling=scaling))
    frequencies, amplitude = rope.inverse_frequencies(decoder)
    np.testing.assert_allclose(frequencies, expected.inv_freq.numpy(), rtol=1e-5)
    assert amplitude == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"rope_type": "linear", "factor": 3.0}])
def test_a_part_of_each_head_has_the_frequencies_of_transformers(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 500000.0, "partial_rotary_factor": 0.25, **scaling}
    config = LlamaConfig(head_dim=128, max_position_embeddings=256, rope_parameters=parameters)
    expected, scale = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None)
    decoder = from_hf(tiny.config(head_dim=128, rope_parameters=parameters))
    assert decoder.rotated == 32
    assert decoder.rope_scaling == scaling
    frequencies, amplitude = rope.inverse_frequencies(decoder)
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=1e-5)
    assert amplitude == pytest.approx(scale)
    assert [table.shape for table in rope.tables(decoder, 7)] == [(7, 16), (7, 16)]
