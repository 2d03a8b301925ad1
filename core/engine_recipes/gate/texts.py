"""What an engine is measured on: texts to read, and prompts to answer. Importing this loads no numpy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from ..errors import RequestError
from ..sources.texts import read_prompts_and_texts

#: How many texts, and how many prompts, are taken of a file, and how many of its documents are looked at for them.
MOST = 64
_LOOKED_AT = 4096
_LINE = 'write {"prompt": "…", "answers": ["…"]}, or {"prompt": "…"} if no answer can be checked'


@dataclass(frozen=True)
class Prompt:
    """Something to answer. `answers` are the right ones, if it can be told what is right."""

    text: str
    answers: tuple[str, ...] = ()

    def is_answered_by(self, text: str) -> bool:
        """Whether one of the answers occurs as a whole word, in whatever case; False if there are none."""
        # ASCII alone has word boundaries here: Chinese and Japanese have no space on either side of a word.
        found = (rf"(?<!\w){re.escape(answer.casefold())}(?!\w)" for answer in self.answers)
        return any(re.search(pattern, text.casefold(), re.ASCII) for pattern in found)


@dataclass(frozen=True)
class Material:
    """Texts to read and prompts to answer."""

    texts: tuple[str, ...]
    prompts: tuple[Prompt, ...]

    @cached_property
    def digest(self) -> str:
        """sha256 over all of it, in order: 64 hex digits."""
        content = [self.texts, [(prompt.text, prompt.answers) for prompt in self.prompts]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load(spec: str, builtin: str) -> Material:
    """Read a text set: the first 64 texts and the first 64 prompts among the first 4,096 documents.

    Args:
        spec: as `sources.texts.locate` takes it. In a .jsonl file, a line with a `prompt`, perhaps `answers`, and
            nothing else is a prompt; every other is a text, as `sources.texts.read_texts` reads it.
        builtin: where prompts come from if `spec` has none.

    Raises:
        RequestError: as `read_texts`; a malformed prompt; no text at all.
        MachineError: as `read_texts`.
    """
    texts: list[str] = []
    prompts: list[Prompt] = []
    for document in islice(read_prompts_and_texts(spec), _LOOKED_AT):
        if isinstance(document, str):
            texts.append(document)
        else:
            prompts.append(_prompt(document, spec))
        if min(len(texts), len(prompts)) >= MOST:
            break
    if not texts:
        raise RequestError(f"{spec} holds no text to measure on", 'write lines such as {"text": "…"}')
    found = prompts or (list(load(builtin, builtin).prompts) if spec != builtin else [])
    return Material(tuple(texts[:MOST]), tuple(found[:MOST]))


def _prompt(line: Mapping[str, Any], spec: str) -> Prompt:
    text, answers = line["prompt"], line.get("answers", [])
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{spec}: the prompt {json.dumps(text)[:60]} is no text", _LINE)
    if not isinstance(answers, list) or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise RequestError(f"{spec}: answers of {text[:40]!r} are no list of texts", _LINE)
    return Prompt(text.encode("utf-8", "replace").decode(), tuple(answers))  # JSON can hold half a character
