from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import modelopt_oracle
from engine_recipes import MachineError, RequestError, StageFailed, checkpoint
from engine_recipes_precisions.layers import Calibration, LayeredModel
from engine_recipes_precisions.rows import Rows, batches, read_rows

from .calibrating import TEXT, source

CPU = torch.device("cpu")


def calibration(opened: checkpoint.SourceCheckpoint, rows: Rows, size: int = 4) -> tuple[LayeredModel, Calibration]:
    model = LayeredModel(opened, CPU, torch.float32)
    return model, Calibration(model, batches(rows, size), CPU)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_layer_by_layer_is_the_model_s_own_forward(tmp_path: Path, arch: str) -> None:
    hf = source(tmp_path, arch)
    rows = read_rows([TEXT], hf, 4, 24, 1)
    with checkpoint.open_source(hf) as opened, torch.no_grad():
        model, ours = calibration(opened, rows)
        for index, layer in model.loaded():
            ours.forward(index, layer)
        whole = modelopt_oracle.load(hf)
        last: list[torch.Tensor] = []
        whole.model.layers[-1].register_forward_hook(lambda module, args, out: last.append(out))  # type: ignore
        whole(input_ids=torch.from_numpy(rows.ids), use_cache=False)
    assert torch.equal(ours.hidden[0], last[0])


def test_a_class_with_other_parameters(tmp_path: Path) -> None:
    hf = source(tmp_path, "llama")
    with checkpoint.open_source(hf) as opened:
        opened.tensors = {name: where for name, where in opened.tensors.items() if "layers.2.mlp.up" not in name}
        with pytest.raises(StageFailed, match=r"LlamaForCausalLM .* disagree about model\.layers\.2\.mlp\.up_proj\.w"):
            LayeredModel(opened, CPU, torch.float32)


def test_a_rope_that_transformers_reads_otherwise(tmp_path: Path) -> None:
    with checkpoint.open_source(source(tmp_path, "llama")) as opened:
        opened.decoder = dataclasses.replace(opened.decoder, rope_theta=5e5)
        with pytest.raises(MachineError, match=r"as rope base 10000\.0, scaling default; it says 500000, default"):
            LayeredModel(opened, CPU, torch.float32)


def test_a_rope_scaling_is_accepted(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    with checkpoint.open_source(source(tmp_path, "llama", rope_scaling=scaling)) as opened:
        LayeredModel(opened, CPU, torch.float32)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    hf = source(tmp_path, "llama", vocab_size=103)
    rows = read_rows([TEXT], hf, 4, 24, 1)
    rows.ids[0, 0] = 103
    with checkpoint.open_source(hf) as opened, pytest.raises(RequestError, match="gives id 103 and the model has 103"):
        calibration(opened, rows)
