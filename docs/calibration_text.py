"""Make plugins/engine_recipes_precisions/calibration.txt.xz: the text that precisions calibrate on by default.

    apt-get download jargon-text=4.4.7-4.1 && dpkg-deb -x jargon-text_4.4.7-4.1_all.deb jargon
    python3.13 docs/calibration_text.py jargon/usr/share/doc/jargon-text/jargon.txt.gz

Takes the Python documentation and code from the CPython that runs it, which must be 3.13.0. Prints the sha256 of the
text, which calibration.md beside it names; the same inputs give the same text.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import platform
import pydoc_data.topics
import re
import sys
from itertools import pairwise
from pathlib import Path

OUT = Path(__file__).parents[1] / "plugins" / "engine_recipes_precisions" / "calibration.txt.xz"
PYTHON = "3.13.0"
#: Modules of the standard library under CPython's own licence, without notices of others.
MODULES = (
    *("graphlib", "queue", "bisect", "contextlib", "asyncio/locks", "asyncio/queues", "cmd", "calendar", "string"),
    *("sched", "weakref", "fileinput", "csv", "collections/__init__", "glob"),
)
#: Characters of a document: a few thousand tokens, so that windows cut from it waste little.
LONG = 12_000

#: Lexicon entries that are not for everybody, by words in them, and those that are no prose.
UNCLEAN = re.compile(
    r"abus|alcohol|\banal\b|\barse|\bass(es)?\b|asshole|\bballs\b|barf|barney|bastard|\bbeer|bigot|bitch|"
    r"\bblow|bondage|boob|brain-?damage|brain-?dead|bugger|chinese|christian|cocaine|\bcock|condom|\bcrap|"
    r"cretin|crippl|damn|\bdick|droid|drug|drunk|erot|ethnic|excre|\bfag|\bfart|female|feminis|fuck|\bgay|"
    r"genital|\bgirl|goat|\bgod(s|dess)?\b|\bguns?\b|\bhell\b|heroin|hitler|homo|hooker|idiot|islam|japan|"
    r"\bjew(s|ish)?\b|\bkill|lamer|lesbian|lobotom|loser|losing|\blsd\b|\blusers?\b|\blust|\bmales?\b|"
    r"marijuana|masturb|mongol|moron|naked|nazi|nipple|nude|\bnuk|oriental|penis|piss|porn|puke|"
    r"\brac(e|es|ist|ism)\b|\brap(e|ed|ing)\b|religio|retard|satan|screw|sex|shit|snot|stupid|\bsuck|suicid|"
    r"terroris|testicl|\btits?\b|toilet|torture|turd|twink|\burin|viagra|violen|virgin\b|vomit|wank|weapon|"
    r"weenie|\bwom[ae]n",
    re.I,
)
NO_PROSE = re.compile(r"[─│├═\xa0©™®〈∼⊕⊗∅⇔•→←−]|[\w.-]+@[\w.-]+\w|https?://|ftp://")
WIDTH = 76


def main(jargon: Path) -> None:
    if platform.python_version() != PYTHON:
        sys.exit(f"run this with CPython {PYTHON}, not {platform.python_version()}")
    lines = gzip.decompress(jargon.read_bytes()).decode("utf-8").replace("\r", "").split("\n")
    library = Path(os.__file__).parent
    code = [block for name in MODULES for block in blocks((library / f"{name}.py").read_text(encoding="utf-8"), 3)]
    kinds = [documents(topics()), documents(code), documents(entries(lines))]
    # Interleaved in proportion, so that whoever reads only the beginning has something of each.
    places = [((i + 0.5) / len(kind), n, text) for n, kind in enumerate(kinds) for i, text in enumerate(kind)]
    text = "\f".join(text for _, _, text in sorted(places))
    content = text.encode("utf-8")
    OUT.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    shares = [sum(map(len, kind)) for kind in kinds]
    print(f"{len(content)} bytes, {len(places)} documents; topics, modules, entries: {shares} characters")
    print(f"sha256 {hashlib.sha256(content).hexdigest()}; packed to {OUT.stat().st_size} bytes")


def documents(parts: list[str]) -> list[str]:
    """Parts put together to documents of at least LONG characters; what is left at the end joins the last."""
    found: list[list[str]] = [[]]
    for part in parts:
        if sum(map(len, found[-1])) >= LONG:
            found.append([])
        found[-1].append(part)
    if len(found) > 1 and sum(map(len, found[-1])) < LONG:
        found[-2] += found.pop()
    return ["\n\n".join(parts) + "\n" for parts in found]


def blocks(text: str, newlines: int) -> list[str]:
    """A text cut before lines that begin at the margin after so many newlines: paragraphs, or classes of a module."""
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return [block.strip("\n") for block in re.split(rf"\n{{{newlines},}}(?=\S)", text) if block.strip()]


def topics() -> list[str]:
    """The topics of `help()`, without those that are a section of another one."""
    seen: set[str] = set()
    chosen: dict[str, list[str]] = {}
    by_size = sorted(pydoc_data.topics.topics.items(), key=lambda item: (-len(item[1]), item[0]))
    for name, text in by_size:
        parts = blocks(text, 2)
        new = sum(len(part) for part in parts if part not in seen)
        if new > len(text) // 2:
            chosen[name] = parts
            seen.update(parts)
    return [part for name in sorted(chosen) for part in chosen[name]]


def entries(lines: list[str]) -> list[str]:
    """Entries of the Jargon File's lexicon that are clean prose of some length."""
    lexicon = "\n".join(lines[lines.index("Glossary") : lines.index("Appendix\xa0A.\xa0Hacker Folklore")])
    found = []
    for entry in re.split(r"\n\n(?=   :\S)", lexicon)[1:]:
        # The list of entries under the next letter follows the last one of a letter: short lines.
        head, *paragraphs = entry.split("\n\n")
        parts = [unwrapped(paragraph) for paragraph in paragraphs]
        name = re.fullmatch(r" {3}:(.+?):.*", head)
        if name and None not in parts and len(entry) >= 400 and not (NO_PROSE.search(entry) or UNCLEAN.search(entry)):
            found.append("\n\n".join([name[1], *(part for part in parts if part)]))
    return found


def unwrapped(paragraph: str) -> str | None:
    """A paragraph on one line, without the marks of cross references; None if its line breaks mean something.

    A break is the formatter's if the next word had no room on the line.
    """
    lines = paragraph.split("\n")
    if any(not re.match(r" {3}\S", line) for line in lines):
        return None
    for line, following in pairwise(lines):
        if len(line) + 1 + len(following.split()[0]) <= WIDTH:
            return None
    text = re.sub(r"\{([^{}]+)\}", r"\1", " ".join(line.strip() for line in lines))
    if re.search(r"[{}\\]|  |-$|\w- \w", text):
        return None
    headline = len(lines) == 1 and not text.endswith((".", ")", "]", ":", "”"))
    return None if headline else text


if __name__ == "__main__":
    main(Path(sys.argv[1]))
