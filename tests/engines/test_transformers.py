from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import converted
import lowered
import tiny
from engine_recipes import Artifact, MachineError, RequestError, Sampling, StageContext
from engine_recipes_engines import onnxruntime as embedded, transformers as reference

IDS = [3, 14, 15, 92, 65, 35, 8, 97]


def context(source: Path, out: Path) -> StageContext:
    out.mkdir()
    return StageContext("m:p@e", "baseline", {}, (Artifact("hf-checkpoint", source, "0" * 64),), out)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_both_references_say_what_the_source_says(arch: str, tmp_path: Path) -> None:
    source = converted.resolve(lowered.write_lively(tmp_path / "source", arch))
    expected = lowered.reference(source, IDS)
    for number, module in enumerate((reference, embedded)):
        runtime = module.load_source(context(source, tmp_path / str(number)))
        assert np.abs(runtime.logits(IDS) - expected).max() < 1e-4
        greedy = list(runtime.generate(IDS, Sampling(max_tokens=4)))
        chain = list(IDS)
        for token in greedy:
            assert token == int(lowered.reference(source, chain)[-1].argmax())
            chain.append(token)
        assert list(runtime.generate(IDS, Sampling(max_tokens=4), frozenset({greedy[1]}))) == greedy[:1]
        runtime.close()
        runtime.close()


def test_a_model_that_transformers_does_not_know_is_refused_with_a_way_out(tmp_path: Path) -> None:
    source = converted.resolve(tiny.write(tmp_path / "source", "llama"))
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "novel"'))
    with pytest.raises(RequestError, match="transformers cannot load") as caught:
        reference.load_source(context(source, tmp_path / "out"))
    assert "gate.reference" in caught.value.hint


def test_the_most_exact_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(reference, "_free_memory", lambda: 10 << 30)
    assert reference.place(1_000_000_000, "bfloat16") == ("cpu", "float32")
    assert reference.place(3_000_000_000, "bfloat16") == ("cpu", "bfloat16")
    assert reference.place(3_000_000_000, "float16") == ("cpu", "float16")
    assert reference.place(3_000_000_000, "float32") == ("cpu", "bfloat16"), "it does not fit in float32"
    with pytest.raises(MachineError, match=r"7\.0 billion parameters"):
        reference.place(7_000_000_000, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
    assert reference.place(7_000_000_000, "bfloat16") == ("cuda", "float32")


def test_it_tells_how_the_source_is_run_and_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "place", lambda parameters, dtype: ("cpu", "bfloat16"))
    runtime = reference.load_source(context(converted.resolve(tiny.write(tmp_path / "hf", "llama")), tmp_path / "out"))
    assert runtime.about == {"dtype": "bfloat16", "device": "cpu"}
    assert runtime.logits(IDS).dtype == np.float32
    runtime.close()
    assert "Loading weights" not in capfd.readouterr().err
