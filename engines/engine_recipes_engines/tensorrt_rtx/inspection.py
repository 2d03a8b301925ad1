"""What a serialised engine shows of itself without a GPU.

The library reads an engine only on the GPU it was built for. But a plan of version 1.7 lists its constants in words,
`tensor={ … const_payload_size=8192 … type=fp8_e4m3 }`: which weights it really holds in 8 or 4 bits. That is no
documented format; where it is not found, nothing is claimed.
"""

from __future__ import annotations

import hashlib
import mmap
import re
from pathlib import Path

from engine_recipes import Check, StageFailed, Verdict

from .compiling import ENGINE
from .settings import Settings, read_settings

_MARK = b"const_payload_size="
_ENTRY = re.compile(rb"const_payload_size=(\d+) [^\n]*? (offset=\d+ [^\n]*?region=\S+) [^\n]*?type=(\w+) \}")
#: What plans call dtypes.
_TYPES = {"half": "float16", "bf16": "bfloat16", "float": "float32", "fp8_e4m3": "float8_e4m3fn"}
#: Kernels, and the program that calls them: measured 0.4 MB a layer in 16 bits, 0.9 MB in FP8, for all targets.
_PROGRAM, _PROGRAM_LAYER = 4e6, 1.2e6
_MOST_GROWTH = 1.05
#: The engine holds each quantised weight once, give or take this share.
_SHARE = 0.01
_PIECE = 8 << 20  # bytes of an engine read at a time
_NARROW = ("float8_e4m3fn", "int4")


def constants(engine: Path) -> dict[str, int]:
    """Bytes of the constants in a serialised engine, by dtype; empty if it does not say."""
    places: dict[tuple[bytes, bytes], int] = {}  # a head that is the embedding is listed twice, at one place
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(_MARK)
        while at >= 0:
            entry = _ENTRY.match(data, at)
            if entry:
                places[entry[2], entry[3]] = int(entry[1])
            at = data.find(_MARK, at + 1)
    found: dict[str, int] = {}
    for (_, word), size in places.items():
        name = _TYPES.get(word.decode(), word.decode())
        found[name] = found.get(name, 0) + size
    return found


def inspect(folder: Path) -> list[Check]:
    """All that can be said about an engine folder without running it."""
    settings, engine = read_settings(folder), folder / ENGINE
    if not engine.is_file() or not engine.stat().st_size:
        raise StageFailed(f"{folder} holds no {ENGINE}, or an empty one", "build the engine again")
    return [
        _identity(engine, settings),
        _precisions(engine, settings),
        _inputs_and_outputs(settings),
        _size(engine, settings),
    ]


def _identity(engine: Path, settings: Settings) -> Check:
    name, size = "engine is the one that was compiled", engine.stat().st_size
    if size != settings.bytes:
        return Check(name, "fail", value=size, limit=settings.bytes, note="bytes")
    digest = hashlib.sha256()
    with engine.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    same = digest.hexdigest() == settings.sha256
    return Check(name, "pass" if same else "fail", value=size, limit=settings.bytes, note="bytes, and their sha256")


def _precisions(engine: Path, settings: Settings) -> Check:
    name, expected, found = "layer precisions", settings.weights, constants(engine)
    said = ", ".join(f"{dtype} {size:,} B" for dtype, size in sorted(found.items()))
    if settings.constants and found != settings.constants:
        return Check(name, "fail", note=f"not what was noted when it was compiled: {said or 'nothing'}")
    if not found:
        return Check(name, "not run", note="this version of the library does not tell")
    narrow = sum(expected.get(dtype, 0) for dtype in _NARROW)
    if not narrow:
        verdict: Verdict = "fail" if any(dtype in found for dtype in _NARROW) else "pass"
        return Check(name, verdict, note=f"weights in the engine: {said}")
    value = sum(found.get(dtype, 0) for dtype in _NARROW) / narrow
    note = f"share of the quantised weights that the engine holds so; {said}"
    return Check(name, "pass" if abs(value - 1) <= _SHARE else "fail", value=value, limit=1, note=note)


def _inputs_and_outputs(settings: Settings) -> Check:
    """Shapes and dtypes of what the runtime will feed, as the library's network had them."""
    s, dtype = settings, {"float16": "HALF", "bfloat16": "BF16"}[settings.compute]
    pair = [-1, s.kv_heads, s.max_seq_len, s.head_size]
    names = [f"{layer}.{what}" for layer in range(s.layers) for what in ("key", "value")]
    expected = {f"{side}.{name}": (dtype, pair) for name in names for side in ("past_key_values", "present")}
    expected |= {name: ("INT64", [-1, -1]) for name in ("input_ids", "position_ids")}
    expected |= {name: ("INT64", [-1]) for name in ("write_indices", "kv_lengths", "logit_indices")}
    expected["logits"] = ("FLOAT", [-1, -1, s.vocab_size])
    seen = {one.name: (one.dtype, one.shape) for one in (*s.inputs, *s.outputs)}
    wrong = sorted(name for name in expected.keys() | seen.keys() if expected.get(name) != seen.get(name))
    note = f"{wrong[0]} is {seen.get(wrong[0])}, not {expected.get(wrong[0])}" if wrong else "names, dtypes and shapes"
    note += ", as noted when it was compiled"
    return Check("inputs and outputs", "fail" if wrong else "pass", value=len(wrong), limit=0, note=note)


def _size(engine: Path, settings: Settings) -> Check:
    size, weights = engine.stat().st_size, sum(settings.weights.values())
    limit = _MOST_GROWTH * weights + _PROGRAM + _PROGRAM_LAYER * settings.layers
    note = f"bytes; the weights are {weights:,}"
    return Check("engine size", "pass" if size <= limit else "warn", value=size, limit=limit, note=note)
