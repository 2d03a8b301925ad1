"""The tokenizer in a GGUF file as tokenizer.json and its side files. Byte-level BPE only.

Pre-tokenizers are named in GGUF, not described: `tokenizer.ggml.pre`. What a name means is in llama.cpp's
llama-vocab.cpp and in the tokenizer.json of the models it was made for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RequestError

Metadata = Mapping[str, Any]

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: tokenizer.ggml.pre -> how text is split before the merges. A regular expression, or None for GPT-2's own.
_SPLITS = {
    "gpt-2": None,
    "smollm": None,  # after single digits
    "qwen2": _WORDS % r"\p{N}",
    "llama-bpe": _WORDS % r"\p{N}{1,3}",
}
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def write(metadata: Metadata, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja, if there is one.

    Raises:
        RequestError: no byte-level BPE, a pre-tokenizer we do not know, or damaged lists.
    """
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    special = _special_tokens(metadata, tokens)
    tokenizer = _build(metadata, tokens, special.get("bos_token"))
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "add_bos_token": _adds_bos(metadata),
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
        # The class that takes tokenizer.json as it is: named ones rebuild parts of it from their own defaults.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    _write_json(out / "tokenizer_config.json", config)
    _write_json(out / "special_tokens_map.json", special)


def _special_tokens(metadata: Metadata, tokens: list[str]) -> dict[str, str]:
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in _SPECIAL.items()}
    known = {role: index for role, index in ids.items() if index is not None}
    for role, index in known.items():
        if not 0 <= index < len(tokens):
            raise RequestError(f"{role} of the GGUF file is {index}, of {len(tokens)} tokens", "get the file again")
    return {role: tokens[index] for role, index in known.items()}


def _adds_bos(metadata: Metadata) -> bool:
    """As llama.cpp: what the file says; Llama 3's own tokenizer does if it says nothing."""
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.pre") == "llama-bpe"))


def _build(metadata: Metadata, tokens: list[str], bos: str | None) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise RequestError(f"GGUF tokenizer {kind!r} is no byte-level BPE", "use the original files of this model")
    if pre not in _SPLITS:
        raise RequestError(f"GGUF pre-tokenizer {pre!r} is not known", f"known: {', '.join(_SPLITS)}")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = metadata.get("tokenizer.ggml.merges") or []
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens) or not merges or any(" " not in m for m in merges):
        raise RequestError("tokens, token types or merges of the GGUF file are damaged", "get the file again")
    vocabulary = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != _UNUSED}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        # Llama 3 takes a word that is a token as it is, whether merges lead to it or not.
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # the library's only class
        raise RequestError(f"the GGUF file's merges do not fit its tokens ({error})", "get the file again") from None
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(pre, bool(metadata.get("tokenizer.ggml.add_space_prefix", False)))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(tokenizer, bos if _adds_bos(metadata) else None)
    for special in (True, False):
        wanted = _CONTROL if special else _USER_DEFINED
        chosen = [token for token, t in zip(tokens, types, strict=True) if t == wanted]
        added = [AddedToken(token, normalized=False, special=special) for token in chosen]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def _pre_tokenizer(pre: str, prefix_space: bool) -> Any:
    from tokenizers import Regex, pre_tokenizers

    split = _SPLITS[pre]
    if split is not None:
        words = pre_tokenizers.Split(Regex(split), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(prefix_space, use_regex=False)])
    gpt2 = pre_tokenizers.ByteLevel(prefix_space, use_regex=True)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def _post_processor(tokenizer: Any, bos: str | None) -> Any:
    from tokenizers import processors

    spans = processors.ByteLevel(trim_offsets=False)
    if bos is None:
        return spans
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return processors.Sequence([spans, template])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
