"""Whether what an engine says looks like language at all: no reference is needed. Standard library only."""

from __future__ import annotations

import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence

#: Tokens under which an answer is too short to repeat itself.
_SHORT = 8
_NOT_TEXT = "not text"
#: Japanese writes all three at once.
_ALIKE = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "KATAKANA-HIRAGANA": "CJK", "IDEOGRAPHIC": "CJK"}


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams of tokens that were there before: 1 - distinct / all, 0 to 1.

    seq-rep-n of Welleck et al., Neural Text Generation with Unlikelihood Training, 2019. 0 under 8 tokens.
    """
    if len(ids) < max(_SHORT, n):
        return 0.0
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def compressibility(texts: Iterable[str]) -> float:
    """Bytes of all texts together over their bytes after zlib, level 9; 1 if there is nothing.

    As the compression ratio of OpenAI's Whisper (`utils.py`), which takes one segment and zlib's default level.
    """
    data = "\n".join(texts).encode("utf-8", "replace")
    return len(data) / len(zlib.compress(data, 9)) if data.strip() else 1.0


def entropy(answers: Iterable[Sequence[int]]) -> float:
    """Entropy of how often each token occurs in all answers together, in bits a token; 0 if there is none.

    The plug-in estimate (Shannon 1948). At most log2 of the number of tokens, so compare like with like.
    """
    counts = Counter(token for ids in answers for token in ids)
    total = sum(counts.values())
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def scripts(text: str) -> Counter[str]:
    """How many letters of each script a text has, and under "not text" its control and replacement characters.

    A script is the first word of a letter's Unicode name (`LATIN`, `CYRILLIC`, `CJK`), for the standard library knows
    no other. A replacement character at the very end is none: the last token may have been half a character.
    """
    found: Counter[str] = Counter()
    for character in text.rstrip("\ufffd"):
        if character.isalpha():
            word = unicodedata.name(character, "").split(" ")[0]
            found[_ALIKE.get(word, word) or _NOT_TEXT] += 1
        elif character == "\ufffd" or (unicodedata.category(character) == "Cc" and not character.isspace()):
            found[_NOT_TEXT] += 1
    return found


def foreign_script(text: str, expected: Iterable[str]) -> float:
    """Share of a text's letters, and of what is not text, whose script is in none of the `expected` texts: 0 to 1."""
    known = {script for other in expected for script in scripts(other)} - {_NOT_TEXT}
    found = scripts(text)
    return sum(count for script, count in found.items() if script not in known) / max(found.total(), 1)


def is_empty(text: str) -> bool:
    """Whether nothing of an answer can be seen."""
    return not text.replace("\ufffd", "").strip()
