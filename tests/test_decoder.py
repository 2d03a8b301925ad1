from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import different
import tiny
from engine_recipes import Decoder, RequestError, from_hf
from engine_recipes.checkpoint import source_shapes


@pytest.mark.parametrize("arch", [*tiny.CONFIGS, *tiny.DIFFERENT])
def test_it_is_read_back_from_its_file(tmp_path: Path, arch: str) -> None:
    family = different.resolve_checkpoint if arch in tiny.DIFFERENT else from_hf
    decoder = family(tiny.config(arch))
    decoder.write(tmp_path / "decoder.json")
    assert Decoder.read(tmp_path / "decoder.json") == decoder


def test_the_file_of_an_older_build_is_still_read(tmp_path: Path) -> None:
    decoder = from_hf(tiny.config())
    decoder.write(tmp_path / "decoder.json")
    fields = json.loads((tmp_path / "decoder.json").read_text())
    for new in ("embedding_scale", "norm_offset", "rotary_size"):
        del fields[new]
    (tmp_path / "decoder.json").write_text(json.dumps(fields))
    assert Decoder.read(tmp_path / "decoder.json") == decoder
    assert decoder.rotated == decoder.head_size == 16


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma", "partial"])
def test_its_parameters_are_the_elements_of_its_tensors(arch: str) -> None:
    settings = tiny.config(arch)
    decoder = from_hf(settings, qk_norm=arch == "qwen3")
    elements = 0
    for shape in source_shapes(decoder).values():
        elements += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert decoder.parameters == elements


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ({"partial_rotary_factor": 0.5}, 16),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, 8),
        ({"partial_rotary_factor": 1.0}, 0),
        ({"partial_rotary_factor": None}, 0),
        ({}, 0),
    ],
)
def test_the_part_of_a_head_that_is_rotated(said: dict[str, Any], size: int) -> None:
    decoder = from_hf(tiny.config(head_dim=32, **said))
    assert decoder.rotary_size == size
    assert decoder.rotated == (size or 32)
    assert decoder.rope_scaling is None


@pytest.mark.parametrize(
    ("said", "differences", "message"),
    [
        ({"partial_rotary_factor": 0.1}, {}, "3 of each head's 32 elements"),
        ({"partial_rotary_factor": 0.01}, {}, "0 of each head's 32 elements"),
        ({"partial_rotary_factor": 2}, {}, "partial_rotary_factor = 2"),
        ({"partial_rotary_factor": "half"}, {}, "partial_rotary_factor = 'half'"),
        ({"partial_rotary_factor": float("nan")}, {}, "partial_rotary_factor = nan"),
        ({}, {"rotary_size": 34}, "34 of each head's 32 elements"),
        ({}, {"embedding_scale": 0.0}, "embedding_scale is 0.0"),
        ({}, {"norm_offset": float("nan")}, "norm_offset nan"),
    ],
)
def test_numbers_that_cannot_be_are_refused(said: dict[str, Any], differences: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        from_hf(tiny.config(head_dim=32, **said), **differences)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("embedding_scale", "2"),
        ("embedding_scale", True),
        ("embedding_scale", 10**400),
        ("norm_offset", None),
        ("rotary_size", "16"),
        ("rotary_size", 16.0),
        ("activation", None),
        ("activation", []),
        ("activation", ""),
        ("heads", "4"),
        ("tied", None),
    ],
)
def test_what_a_family_passes_has_the_type_of_its_field(field: str, value: object) -> None:
    with pytest.raises(RequestError, match=field) as caught:
        from_hf(tiny.config(head_dim=32), **{field: value})
    assert caught.value.hint
    assert len(caught.value.message) < 120


def test_numpys_numbers_are_numbers() -> None:
    assert from_hf(tiny.config(), embedding_scale=np.sqrt(64)).embedding_scale == 8
