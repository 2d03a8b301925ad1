"""Writes `genai_config.json`, with which onnxruntime-genai loads the engine's folder as it is.

Format: https://onnxruntime.ai/docs/genai/reference/config.html. Our own runtime reads it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine_recipes import Decoder, StageContext, Tokenizer, checkpoint

from ..lowering.graph import MODEL


def write_config(folder: Path, decoder: Decoder, target: str, max_seq_len: int, source: Mapping[str, Any]) -> None:
    """Write the file.

    Args:
        folder: the engine's.
        decoder: what was lowered.
        target: `cpu`, or a GPU's, for which onnxruntime-genai is told to use CUDA.
        max_seq_len: longest sequence, in tokens.
        source: what `source_settings` found.
    """
    end = source.get("eos_token_id")
    first_end = end[0] if isinstance(end, list) and end else end
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    model = {
        "type": "decoder",
        "vocab_size": decoder.vocab_size,
        "context_length": max_seq_len,
        "bos_token_id": _first(source.get("bos_token_id"), first_end, 0),
        "eos_token_id": _first(end, 0),
        "pad_token_id": _first(source.get("pad_token_id"), first_end, 0),
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": _providers(target)},
            "filename": MODEL,
            "head_size": decoder.head_size,
            "hidden_size": decoder.hidden_size,
            "num_attention_heads": decoder.heads,
            "num_hidden_layers": decoder.layers,
            "num_key_value_heads": decoder.kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": names["key"],
                "past_value_names": names["value"],
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": bool(source.get("do_sample", False)),
        "max_length": max_seq_len,
        "min_length": 0,
        "num_beams": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": _first(source.get("repetition_penalty"), 1.0),
        "temperature": _first(source.get("temperature"), 1.0),
        "top_k": _first(source.get("top_k"), 50),
        "top_p": _first(source.get("top_p"), 1.0),
    }
    text = json.dumps({"model": model, "search": search}, indent=2)
    (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def source_settings(context: StageContext) -> dict[str, Any]:
    """Special ids and sampling defaults of the Hugging Face model, if it is among the stage's inputs.

    Its `config.json`, with `generation_config.json` laid over it, and its tokenizer's end tokens added: a chat model
    often ends a turn with a token that config.json does not name.
    """
    if not any(artifact.kind == "hf-checkpoint" for artifact in context.inputs):
        return {}
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        found = dict(source.config)
        path = source.folder / "generation_config.json"
        if path.is_file():
            generation = json.loads(path.read_text(encoding="utf-8"))
            found |= {key: value for key, value in generation.items() if value is not None}
        if (source.folder / "tokenizer.json").is_file():
            given = found.get("eos_token_id")
            ends = given if isinstance(given, list) else [] if given is None else [given]
            extra = Tokenizer.load(source.folder).stop_ids
            ends = [*ends, *sorted(extra - set(ends))]
            found["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
        return found


def _providers(target: str) -> list[Any]:
    return [] if target == "cpu" else [{"cuda": {"enable_cuda_graph": "0"}}]


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
