"""Tiny sources as the resolve stage leaves them, and tiny checkpoints converted from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import different
import tiny
from engine_recipes import Decoder
from engine_recipes.checkpoint import SourceCheckpoint, convert, open_source
from engine_recipes_models import llama, qwen

FAMILIES = {
    "LlamaForCausalLM": llama,
    "Qwen2ForCausalLM": qwen,
    "Qwen3ForCausalLM": qwen,
    "GemmaForCausalLM": different,
    "Phi3ForCausalLM": different,
}


def resolve(folder: Path) -> Path:
    """Leave beside the weights what the resolve stage leaves."""
    config = json.loads((folder / "config.json").read_text())
    decoder: Decoder = FAMILIES[config["architectures"][0]].resolve_checkpoint(config)
    decoder.write(folder / "decoder.json")
    (folder / "source.json").write_text(json.dumps({"folder": "."}))
    return folder


def source(folder: Path, arch: str = "llama", **changes: Any) -> SourceCheckpoint:
    """A tiny source, opened."""
    return open_source(resolve(tiny.write(folder, arch, **changes)))


def built(
    folder: Path, arch: str = "llama", to: str = "float16", tp_size: int = 1, pp_size: int = 1, **changes: Any
) -> Path:
    """A tiny checkpoint folder."""
    out = folder / "checkpoint"
    out.mkdir(parents=True)
    with source(folder / "source", arch, **changes) as opened:
        convert(opened, out, to, tp_size, pp_size)  # type: ignore[arg-type]
    return out
