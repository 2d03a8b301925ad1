"""The arithmetic: rounding as it should be, and the same numbers as ModelOpt's own smoothed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_recipes_w8a8_int8.precision import rounded, smoother
from engine_recipes_w8a8_int8.smoothquant import load, smooth, statistics

from engine_recipes import Decoder, calibration, checkpoint, from_hf, testing


def test_weights_are_off_by_half_a_step_at_most_and_use_all_of_them() -> None:
    random = np.random.default_rng(0)
    weight = random.normal(0, random.uniform(0.01, 3, (40, 1)), (40, 96)).astype(np.float16)
    weight[7] = 0
    scale = random.uniform(0.2, 4, 96).astype(np.float32)
    values, steps = rounded(weight, scale)
    assert values.dtype == np.int8 and steps.shape == (40,)
    assert (np.abs(values).max(axis=1) == np.where(np.arange(40) == 7, 0, 127)).all()
    size = steps[:, None] * scale
    assert (np.abs(values * size - weight) <= size * 0.501).all()


@pytest.fixture
def tiny(tmp_path: Path) -> tuple[Path, Decoder]:
    config: dict[str, Any] = testing.tiny_config()
    decoder = from_hf(config)
    return testing.write_checkpoint(tmp_path / "tiny", config, decoder), decoder


def test_it_stores_what_modelopt_smooths_and_measures(tiny: tuple[Path, Decoder]) -> None:
    pytest.importorskip("modelopt")
    folder, decoder = tiny
    texts = ["The quick brown fox jumps over the lazy dog. " * 40, "Two short texts", "share a row."]
    rows = calibration.read_rows(texts, folder, 40, 64, 0)
    assert any(batch.positions is not None for batch in rows.batches(4))
    before = load(folder, "cpu").state_dict()
    model = load(folder, "cpu")
    smooth(model, rows, 0.75)
    quantise = smoother(checkpoint.Statistics({"method": "smoothquant"}, statistics(model, decoder)))
    for role in ("dense", "down"):  # the others share their scales, which ModelOpt's do not
        name = decoder.names[role].format(1)
        module, weight = model.get_submodule(name), before[f"{name}.weight"].numpy()
        found = quantise(checkpoint.Linear("layer", (name,), weight, np.dtype("float32")))
        np.testing.assert_allclose(found["prequant_scaling_factor"], module.input_quantizer.pre_quant_scale, rtol=1e-6)
        np.testing.assert_allclose(found["activation_scaling_factor"], module.input_quantizer.amax / 127, rtol=1e-6)
        steps = module.weight_quantizer.amax.numpy() / 127  # [out, 1]
        np.testing.assert_allclose(found["weights_scaling_factor"], steps[:, 0], rtol=1e-6)
        different = found["weight"] != np.rint(module.weight.detach().numpy() / steps)
        assert different.mean() < 1e-3  # halves
