"""What the unquantised source says, kept so that every engine of it can be compared without running it again.

`baseline.safetensors` has a summary of its logits over each text, some 4 kB a token whatever the vocabulary;
`baseline.json` the texts' and prompts' token ids and its greedy answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import events
from ..checkpoint import safetensors
from ..errors import RequestError
from ..store import write_json
from ..types import Runtime, Sampling
from .metrics import Summary, summarise
from .texts import Material

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

SCHEMA = 1
TENSORS, FACTS = "baseline.safetensors", "baseline.json"
_DTYPES = {"ids": "int32", "log_probs": "float32", "rest": "float32", "scored": "float32"}
_AGAIN = "remove that folder, and the baseline is made again"


@dataclass(frozen=True)
class Answer:
    """A prompt as the model gets it, and what it said greedily, without what ended it."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Baseline:
    """A source's side of every comparison.

    Attributes:
        about: what whoever recorded it wanted kept.
        digest: of the material.
        window: most tokens of a text.
        max_tokens: most tokens of an answer.
        vocabulary: how wide the source's logits are.
        texts: token ids of each text that has two or more.
        summaries: of the logits over each of them.
        answers: one a prompt; None where the prompt did not fit.
    """

    about: Mapping[str, Any]
    digest: str
    window: int
    max_tokens: int
    vocabulary: int
    texts: tuple[tuple[int, ...], ...]
    summaries: tuple[Summary, ...]
    answers: tuple[Answer | None, ...]


def record(
    out: Path,
    runtime: Runtime,
    tokenizer: Tokenizer,
    material: Material,
    *,
    window: int,
    max_tokens: int,
    about: Mapping[str, Any],
) -> None:
    """Run a source over the material; write `baseline.safetensors` and `baseline.json` into `out`.

    Args:
        out: an existing folder without them.
        runtime: the source, giving logits.
        window: each text is cut to this many tokens, and to what the runtime takes.
        max_tokens: of each answer.
        about: kept as it is, with what the runtime tells of itself (attribute `about`, if it has one). JSON.

    Raises:
        RequestError: the runtime gives no logits, no text has two tokens, or no prompt fits.
    """
    prompts = encoded(tokenizer, material)
    if prompts and not any(fits(prompt, runtime, max_tokens) for prompt in prompts):
        raise _too_long(prompts, runtime, max_tokens)
    cuts = (fitted(tokenizer.encode(text), runtime)[:window] for text in material.texts)
    texts = [ids for ids in cuts if len(ids) > 1]
    if not texts:
        raise RequestError("no text has two tokens for this model's tokenizer", "give longer texts")
    summaries, vocabulary = [], 0
    for number, ids in enumerate(texts):
        events.progress("reading texts with the source", number, len(texts), "texts")
        logits = runtime.logits(ids)
        if logits is None:
            raise RequestError("the reference gives no logits", "choose another reference")
        summaries.append(summarise(logits, ids))
        vocabulary = logits.shape[1]
        del logits  # before the next ones: they are as large as the texts are long
    answers = answer(runtime, tokenizer, prompts, max_tokens)
    _write_tensors(out / TENSORS, summaries)
    facts = {
        "schema": SCHEMA,
        "about": {**about, **getattr(runtime, "about", {})},
        "digest": material.digest,
        "window": window,
        "max_tokens": max_tokens,
        "vocabulary": vocabulary,
        "texts": [
            {"ids": ids, "log_likelihood": float(summary.scored.sum(dtype="float64"))}
            for ids, summary in zip(texts, summaries, strict=True)
        ],
        "answers": [said and vars(said) for said in answers],
    }
    write_json(out / FACTS, facts)


def read(folder: Path) -> Baseline:
    """Read what `record` wrote, into memory.

    Raises:
        RequestError: it is not there, damaged, or of another version.
    """
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if facts["schema"] != SCHEMA:
            raise ValueError(f"schema {facts['schema']}, this version reads {SCHEMA}")
        texts = tuple(tuple(map(int, text["ids"])) for text in facts["texts"])
        answers = tuple(
            None
            if said is None
            else Answer(tuple(map(int, said["prompt_ids"])), tuple(map(int, said["ids"])), str(said["text"]))
            for said in facts["answers"]
        )
        summaries = _read_tensors(folder / TENSORS, [len(ids) - 1 for ids in texts])
        kept = {name: facts[name] for name in ("about", "digest", "window", "max_tokens", "vocabulary")}
        return Baseline(**kept, texts=texts, summaries=summaries, answers=answers)
    except (RequestError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"the baseline in {folder} cannot be used ({_line(error)})", _AGAIN) from None


def encoded(tokenizer: Tokenizer, material: Material) -> list[list[int]]:
    """Token ids of each prompt: as a user's message in the chat template if there is one, else as plain text."""
    try:
        return [
            tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt.text}]), special=False)
            for prompt in material.prompts
        ]
    except RequestError:  # no template, or one that takes no such conversation
        return [tokenizer.encode(prompt.text) for prompt in material.prompts]


def answer(
    runtime: Runtime, tokenizer: Tokenizer, prompts: Sequence[Sequence[int] | None], max_tokens: int
) -> list[Answer | None]:
    """Greedy answers, each ended by one of the tokenizer's `stop_ids` or after `max_tokens`.

    None for a prompt that is None or does not fit: one that is cut would be another prompt.
    """
    said: list[Answer | None] = []
    for number, prompt in enumerate(prompts):
        events.progress("answering prompts", number, len(prompts), "prompts")
        if prompt is None or not fits(prompt, runtime, max_tokens):
            said.append(None)
            continue
        ids = tuple(runtime.generate(list(prompt), Sampling(max_tokens), tokenizer.stop_ids)) if prompt else ()
        said.append(Answer(tuple(prompt), ids, tokenizer.decode(ids)))
    return said


def fits(prompt: Sequence[int], runtime: Runtime, max_tokens: int) -> bool:
    """Whether a runtime takes a prompt and `max_tokens` of an answer; one without `max_seq_len` takes any."""
    most = getattr(runtime, "max_seq_len", None)
    return most is None or len(prompt) + max_tokens <= most


def fitted(text: Sequence[int], runtime: Runtime) -> list[int]:
    """The start of a text, as much as a runtime takes: `max_seq_len` tokens, all if it has no such attribute."""
    return list(text[: getattr(runtime, "max_seq_len", None)])


def _too_long(prompts: Sequence[Sequence[int]], runtime: Runtime, max_tokens: int) -> RequestError:
    most, shortest = getattr(runtime, "max_seq_len", 0), min(map(len, prompts))
    return RequestError(
        f"no prompt fits the model's {most:,} tokens with gate.max_tokens {max_tokens:,}",
        f"the shortest has {shortest:,}: make --set gate.max_tokens=… smaller, or give shorter ones with gate.texts",
    )


def _write_tensors(path: Path, summaries: Sequence[Summary]) -> None:
    import numpy as np

    arrays = {
        name: np.ascontiguousarray(np.concatenate([getattr(summary, name) for summary in summaries]), dtype)
        for name, dtype in _DTYPES.items()
    }
    header = {name: (_DTYPES[name], array.shape) for name, array in arrays.items()}
    for _ in safetensors.write(path, header, ([array] for array in arrays.values())):
        pass


def _read_tensors(path: Path, lengths: Sequence[int]) -> tuple[Summary, ...]:
    with safetensors.SafeFile(path) as file:
        found = {name: (file.tensors[name].dtype, file.tensors[name].shape) for name in _DTYPES}
        rows = {shape[0] for _, shape in found.values()}
        if {name: dtype for name, (dtype, _) in found.items()} != _DTYPES or rows != {sum(lengths)} or min(lengths) < 1:
            raise ValueError(f"{path.name} does not belong to {FACTS}")
        whole = Summary(**{name: file.array(name).copy() for name in _DTYPES})
    if whole.log_probs.shape != whole.ids.shape:
        raise ValueError(f"{path.name} does not belong to {FACTS}")
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return tuple(whole[end - length : end] for end, length in zip(ends, lengths, strict=True))


def _line(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
