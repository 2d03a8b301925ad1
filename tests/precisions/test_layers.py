from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelopt_oracle
from engine_recipes import MachineError, RequestError, StageFailed, checkpoint
from engine_recipes.calibration import Rows, read_rows
from engine_recipes_precisions import arguments, layers
from engine_recipes_precisions.layers import Calibration, LayeredModel

from .calibrating import TEXT, source

CPU = torch.device("cpu")


def calibration(opened: checkpoint.SourceCheckpoint, rows: Rows, size: int = 4) -> tuple[LayeredModel, Calibration]:
    model = LayeredModel(opened, CPU, torch.float32)
    return model, Calibration(model, rows.batches(size), CPU)


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


def rewrite(hf: Path, **changes: Any) -> None:
    """Change config.json after the source was resolved; None removes a key."""
    config = {**json.loads((hf / "config.json").read_text()), **changes}
    (hf / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("arch", "changes", "says"),
    [
        ("llama", {"model_type": "gemma", "head_dim": 16}, "gemma, which is GemmaForCausalLM, .* LlamaForCausalLM"),
        ("llama", {"model_type": "gemma"}, "gemma, which is GemmaForCausalLM, .* LlamaForCausalLM"),
        ("llama", {"model_type": "mistral", "sliding_window": 8}, "MistralForCausalLM, .* LlamaForCausalLM"),
        ("qwen2", {"model_type": "qwen3"}, "qwen3, which is Qwen3ForCausalLM, .* Qwen2ForCausalLM"),
        ("llama", {"model_type": None}, "config.json has no model_type"),
        ("llama", {"model_type": 7}, "config.json has no model_type"),
        ("llama", {"model_type": "lama"}, "makes no model of this config.json, model_type lama: ValueError"),
        ("llama", {"model_type": "bart"}, "makes no model of|BartForCausalLM"),
        ("llama", {"hidden_act": "sigh"}, "model_type llama: KeyError"),
        ("llama", {"num_attention_heads": "four"}, "makes no model of this config.json, model_type llama"),
    ],
)
def test_a_model_type_of_another_class(tmp_path: Path, arch: str, changes: dict[str, Any], says: str) -> None:
    hf = source(tmp_path, arch)
    rewrite(hf, **changes)
    with checkpoint.open_source(hf) as opened, pytest.raises(RequestError, match=says) as caught:
        LayeredModel(opened, CPU, torch.float32)
    assert len(str(caught.value).splitlines()) == 2


def test_a_class_with_other_shapes(tmp_path: Path) -> None:
    hf = source(tmp_path, "llama")
    rewrite(hf, head_dim=32)
    name = r"model\.layers\.0\.self_attn\.k_proj\.weight"
    with (
        checkpoint.open_source(hf) as opened,
        pytest.raises(StageFailed, match=rf"LlamaForCausalLM .* disagree about {name}: \[64, 64\] and \[32, 64\]"),
    ):
        LayeredModel(opened, CPU, torch.float32)


def test_a_class_whose_layers_are_elsewhere(tmp_path: Path) -> None:
    with checkpoint.open_source(source(tmp_path, "llama")) as opened:
        names = {role: name.replace("model.", "gpt.", 1) for role, name in opened.decoder.names.items()}
        opened.decoder = dataclasses.replace(opened.decoder, names=names)
        with pytest.raises(StageFailed, match=r"LlamaForCausalLM .* has no layers named gpt\.layers"):
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


def shared_rows(hf: Path) -> Rows:
    """Four rows of 24 tokens, all of several texts."""
    return read_rows([TEXT[place : place + 9] for place in range(0, 400, 20)], hf, 4, 24, 1)


def hidden_after(hf: Path, rows: Rows, size: int) -> tuple[torch.Tensor, Calibration]:
    with checkpoint.open_source(hf) as opened, torch.no_grad():
        model, ours = calibration(opened, rows, size)
        for index, layer in model.loaded():
            ours.forward(index, layer)
    return torch.cat(ours.hidden), ours


def test_masks_of_many_rows_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = source(tmp_path, "llama")
    rows = shared_rows(hf)
    expected, ours = hidden_after(hf, rows, 1)
    assert len(ours._kept._found) == 4
    of_one = arguments.nbytes(next(iter(ours._kept._found.values())))
    assert of_one >= 24 * 24
    monkeypatch.setattr(arguments, "KEPT_BYTES", 2 * of_one + 1)
    recomputed, ours = hidden_after(hf, rows, 1)
    assert len(ours._kept._found) == 2
    assert torch.equal(recomputed, expected)


def test_texts_stay_apart_even_if_transformers_does_not_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    hf = source(tmp_path, "qwen3")
    rows = shared_rows(hf)
    expected, _ = hidden_after(hf, rows, 2)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda _: None)
    found, _ = hidden_after(hf, rows, 2)
    torch.testing.assert_close(found, expected)


def test_masks_keep_what_transformers_forbids() -> None:
    positions = torch.tensor([[0, 1, 2, 0]])
    allowed = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    window = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]).bool()[None, None]
    scores = torch.zeros(1, 1, 4, 4)
    calls: list[Any] = [((), {"attention_mask": mask}) for mask in (None, window, scores, None)]
    none, narrow, added, again = (kwargs["attention_mask"] for _, kwargs in arguments.keep_apart(calls, positions))
    assert none[0, 0].int().tolist() == allowed
    assert again is none
    assert narrow[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert (added[0, 0] == 0).int().tolist() == allowed
    with pytest.raises(StageFailed, match="no attention_mask"):
        arguments.keep_apart([((), {})], positions)


@pytest.mark.parametrize("packed", [False, True])
def test_out_of_memory_while_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    hf = source(tmp_path, "llama")
    rows = shared_rows(hf) if packed else read_rows([TEXT], hf, 4, 24, 1)
    expected, _ = hidden_after(hf, rows, 4)
    real, asked = torch.nn.Embedding.forward, []

    def forward(self: torch.nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has less.")
        return real(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    most = 1
    found, ours = hidden_after(hf, rows, 4)
    assert (asked, ours.parts.rows) == ([4, 2, 1, 1, 1, 1], 1)
    torch.testing.assert_close(found, expected)
    most = 0
    with pytest.raises(MachineError, match="a row of 24 tokens does not fit"):
        hidden_after(hf, rows, 4)


def test_weights_that_had_no_room_beside_the_activations_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = source(tmp_path, "llama")
    rows = read_rows([TEXT], hf, 4, 24, 1)
    expected, _ = hidden_after(hf, rows, 4)
    real, asked = layers.LayeredModel._weights, []

    def weights(self: LayeredModel, index: int) -> dict[str, torch.Tensor]:
        asked.append(index)
        if asked == [0, 1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, index)

    monkeypatch.setattr(layers.LayeredModel, "_weights", weights)
    found, _ = hidden_after(hf, rows, 4)
    assert asked == [0, 1, 1, 2]
    assert torch.equal(found, expected)
