"""The Hugging Face checkpoint layout, as far as files go: which ones there are and which ones matter.

Layout: what `save_pretrained` writes, https://huggingface.co/docs/transformers/main_classes/model. Opens nothing but
the index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = "tokenizer.json"

#: Files beside the weights that change what is built or generated.
SIDE_FILES = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def shards(folder: Path) -> list[str]:
    """Names of the weight files: those the index names, else `model.safetensors`, present or not.

    Raises:
        ValueError: the index is no index, or names a file outside the folder.
        OSError: the index cannot be read.
    """
    try:
        text = (folder / INDEX).read_text(encoding="utf-8")
    except FileNotFoundError:
        return [SINGLE]
    index = json.loads(text)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map")
    names = set(weight_map.values())
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"it names {name!r}, which is no plain file name")
    return sorted(names)


def is_complete(folder: Path) -> bool:
    """True if configuration, tokenizer and every weight file are there. Sizes and contents are not looked at."""
    try:
        names = [CONFIG, TOKENIZER, *shards(folder)]
    except (OSError, ValueError):
        return False
    return all((folder / name).is_file() for name in names)


def wanted(names: Iterable[str]) -> list[str]:
    """Which files of a repository to download: weights, configuration, tokenizer, templates at its root.

    Pickles are never wanted. Of several sets of weights one is taken: `model-*-of-*` if there is an index, else
    `model*`. Others (`consolidated*`, adapters) are the same weights again, or no model.
    """
    root = sorted(name for name in names if "/" not in name)
    weights = [name for name in root if name.endswith(".safetensors")]
    sets = [r"model-\d+-of-\d+\.safetensors"] if INDEX in root else []
    for pattern in (*sets, r"model.*"):
        if chosen := [name for name in weights if re.fullmatch(pattern, name)]:
            weights = chosen
            break
    return weights + [name for name in root if name.endswith((".json", ".jinja")) or name == "merges.txt"]
