from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modelopt_oracle
from engine_recipes import Decoder, MachineError, RequestError, StageContext, StageFailed, checkpoint, events
from engine_recipes.calibration import read_rows
from engine_recipes_precisions import amax, device, layers

from .calibrating import TEXT, calibrate, change, same, source

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_same_numbers_as_modelopt_on_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    hf = source(tmp_path / "hf", arch)
    found = calibrate(amax, hf, tmp_path / "out", monkeypatch)
    tokens = torch.from_numpy(read_rows([TEXT], hf, 4, 24, 1).ids)
    dtype = str(device.compute_dtype(CPU)).removeprefix("torch.")
    expected = modelopt_oracle.statistics(modelopt_oracle.calibrated(hf, "fp8", "fp8", dtype=dtype, tokens=tokens))
    assert sorted(found.names()) == sorted(name for name in expected if "lm_head" not in name)
    for name in found.names():
        assert found.vector(name) == expected[name], name
    assert len(found.names()) == 3 * (7 + 2)


def test_what_it_says_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[events.Event] = []
    with events.sink(said.append):
        about = calibrate(amax, source(tmp_path / "hf"), tmp_path / "out", monkeypatch).about
    assert [(event["done"], event["total"], event["unit"]) for event in said if event["event"] == "progress"] == [
        (done, 3, "layers") for done in range(4)
    ]
    assert (about["method"], about["rows"], about["tokens"], about["seq_len"]) == ("amax", 4, 96, 24)
    assert (about["batch_size"], about["peak_gpu_bytes"]) == (4, 0)
    assert set(about["phases"]) == {f"{name}_seconds" for name in ("tokenise", "start", "load", "forward")}
    assert set(about["versions"]) == {"nvidia-modelopt", "torch", "transformers"}


def test_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path / "hf", "qwen3")
    texts = [TEXT[:100], TEXT[:30], TEXT[40:]]
    for out in ("one", "two"):
        calibrate(amax, hf, tmp_path / out, monkeypatch, texts)
    one, two = (tmp_path / out / "statistics.safetensors" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    abouts = [json.loads((tmp_path / out / "calibration.json").read_text()) for out in ("one", "two")]
    for about in abouts:
        del about["phases"]
    assert abouts[0] == abouts[1]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_texts_in_one_row_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str) -> None:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    hf = source(tmp_path / "hf", arch, dtype="float32")
    texts = [TEXT[:10], TEXT[100:114], TEXT[300:302], TEXT[500:520], TEXT[700:702]]  # rows of 24: 10 + 14, 2 + 20 + 2
    packed = calibrate(amax, hf, tmp_path / "packed", monkeypatch, texts, size=2)
    assert (packed.about["rows"], packed.about["tokens"]) == (2, 48)
    alone = [calibrate(amax, hf, tmp_path / f"{i}", monkeypatch, [text], size=1) for i, text in enumerate(texts)]
    for name in packed.names():
        largest = np.max([one.vector(name) for one in alone], axis=0)
        np.testing.assert_allclose(packed.vector(name), largest, rtol=2e-5, err_msg=name)


def test_the_batch_size_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    hf = source(tmp_path / "hf", dtype="float32")
    one, two = (calibrate(amax, hf, tmp_path / f"{n}", monkeypatch, batch_size=n) for n in (1, 4))
    same(one, two, tolerance=1e-5)


@pytest.mark.parametrize("option", [0, 4])
def test_out_of_memory_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: int) -> None:
    monkeypatch.setattr(device, "compute_dtype", lambda _: torch.float32)
    hf = source(tmp_path / "hf", dtype="float32")
    plain = calibrate(amax, hf, tmp_path / "plain", monkeypatch)
    calls = fail_on_large_batches(monkeypatch, 1)
    halved = calibrate(amax, hf, tmp_path / "halved", monkeypatch, batch_size=option)
    assert calls[:3] == [4, 2, 1]
    assert halved.about["batch_size"] == 1
    same(plain, halved, tolerance=1e-5)


def fail_on_large_batches(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """The last linear of a layer runs out of memory above so many rows. Returns the rows of each try."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls: list[int] = []
    real = LlamaMLP.forward

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        out: torch.Tensor = real(self, x)
        if len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
        return out

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    return calls


def test_out_of_memory_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path / "hf")
    fail_on_large_batches(monkeypatch, 0)
    with pytest.raises(MachineError, match="a row of 24 tokens does not fit"):
        calibrate(amax, hf, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonsense_among_the_weights_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: float
) -> None:
    hf = source(tmp_path / "hf")
    change(hf, name, value)
    with pytest.raises(RequestError, match=f"{name} holds NaN or inf"):
        calibrate(amax, hf, tmp_path / "out", monkeypatch)


def test_activations_that_overflow_name_their_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path / "hf")
    change(hf, "model.layers.1.input_layernorm.weight", 3e38)
    with pytest.raises(StageFailed, match=r"activations of model\.layers\.1 are NaN or inf") as caught:
        calibrate(amax, hf, tmp_path / "out", monkeypatch)
    assert caught.value.hint


def test_rows_longer_than_the_model_s_positions(tmp_path: Path) -> None:
    decoder = Decoder.read(source(tmp_path / "hf") / "decoder.json")
    context = StageContext("tiny:fp8@onnxruntime", "calibrate", {"seq_len": 256}, (), tmp_path)
    amax.check_decoder(context, decoder)
    with pytest.raises(RequestError, match=r"calib\.seq_len = 257 and the model has 256 positions"):
        amax.check_decoder(replace(context, options={"seq_len": 257}), decoder)


def test_an_attention_that_modelopt_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = amax.Maxima.read

    def read(self: amax.Maxima, index: int, layer: torch.nn.Module) -> Any:
        del layer.self_attn.k_bmm_quantizer  # type: ignore[union-attr]
        return real(self, index, layer)

    monkeypatch.setattr(amax.Maxima, "read", read)
    with pytest.raises(StageFailed, match=r"measured no model\.layers\.0\.self_attn\.k_proj\.cache_amax"):
        calibrate(amax, source(tmp_path / "hf"), tmp_path / "out", monkeypatch)


def test_nothing_stays_loaded(tmp_path: Path) -> None:
    hf = source(tmp_path / "hf")
    with checkpoint.open_source(hf) as opened, torch.no_grad():
        model = layers.LayeredModel(opened, CPU, torch.bfloat16)
        found = read_rows([TEXT], hf, 4, 24, 1).batches(4)
        calibration = layers.Calibration(model, found, CPU)
        for index, layer in model.loaded():
            assert not any(p.is_meta for p in layer.parameters())
            assert all(p.is_meta for other in model.layers if other is not layer for p in other.parameters())
            calibration.forward(index, layer)
        assert all(p.is_meta for p in model.model.parameters())
