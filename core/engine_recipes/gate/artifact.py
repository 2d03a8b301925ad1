"""Static checks of a TensorRT-LLM checkpoint: what can be said of it without running it, against its source."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.cast import FLOATS
from ..checkpoint.config import decoder_from_config
from ..checkpoint.formats import LINEARS
from ..checkpoint.reader import ROPE_TABLES, open_checkpoint
from ..checkpoint.source import SourceCheckpoint, read_json
from ..checkpoint.statistics import Statistics
from ..decoder import Decoder
from ..errors import MachineError, RequestError
from ..tokenizer import Tokenizer
from ..types import Check, Findings
from . import scales, weights
from .parts import SCALES, Part, Parts, check, is_linear

#: Fields of the decoder that do not depend on how a checkpoint names or splits things.
_SETTINGS = (
    *("layers", "heads", "kv_heads", "head_size", "hidden_size", "intermediate_size", "vocab_size"),
    *("activation", "norm_epsilon", "rope_theta", "rope_scaling", "rotated", "embedding_scale"),
    *("qkv_bias", "dense_bias", "mlp_bias", "qk_norm"),
)
_READABLE = "checkpoint can be read"
#: How the linear layers of an algorithm are stored; those of the rest are stored plain.
_KINDS = {"FP8": "fp8", "W4A16_AWQ": "int4", "W8A8_SQ_PER_CHANNEL": "int8"}
_MOST_EXCLUDED = 0.5  # beyond it the name would say more of what is not there than of what is
_BITS_TOLERANCE = 0.25  # of small matrices the scales weigh a few tenths of a bit; the next precision is at 1.9 times


def examine(
    folder: Path, source: SourceCheckpoint, *, algorithm: str, bits: float, statistics: Statistics | None = None
) -> Findings:
    """Everything that can be said of a checkpoint without running it. Reads all of it and the source once.

    Args:
        folder: with `config.json` and the rank files; may be wrong in any way.
        source: what it was made from.
        algorithm: the `quant_algo` that its name promises; empty if unquantised.
        bits: per weight of the linear layers as stored, scales included, that its name promises.
        statistics: what it was calibrated with.

    Returns:
        Measures `weight_error plain_error weight_cosine weight_rounding fp8_saturation scale_drift`, as far as there
        is something to measure; checks with their verdicts; relative error of each linear layer.
    """
    checks = _settings(folder, source.decoder)
    try:
        with Parts(folder, source) as parts:
            found = _weights(parts, source)
            checks += [_quantised_as_named(parts, algorithm, bits), scales.sane(parts)]
            checks += scales.cache_risk(parts, source.decoder, statistics)
            return Findings(checks=tuple(checks)) + found + Findings(scales.drift(parts, source.decoder, statistics))
    except RequestError as error:
        unread = [] if any(c.name == _READABLE for c in checks) else [Check(_READABLE, "fail", note=error.message)]
        return Findings(checks=(*unread, *checks))


# --- settings -----------------------------------------------------------------------------------------------------


def _settings(folder: Path, source: Decoder) -> list[Check]:
    """What the checkpoint says the model is."""
    checks = []
    try:
        config = read_json(folder / "config.json")
        try:
            with open_checkpoint(folder) as opened:
                decoder = opened.decoder
        except (RequestError, TypeError, AttributeError) as error:  # a config.json of the wrong types
            checks.append(Check(_READABLE, "fail", note=getattr(error, "message", f"config.json: {error}")))
            decoder = decoder_from_config(config)
    except RequestError as error:
        return checks or [Check(_READABLE, "fail", note=error.message)]
    names = [*_SETTINGS, *(["tied"] if "tie_word_embeddings" in config else [])]
    pairs = [(name, getattr(decoder, name), getattr(source, name)) for name in names]
    wrong = [f"{name} is {mine}, the source's {theirs}" for name, mine, theirs in pairs if not _same(mine, theirs)]
    shorter = decoder.max_positions < source.max_positions
    positions = f"max_position_embeddings is {decoder.max_positions}, the source's {source.max_positions}"
    name = "settings equal the source's"
    checks.append(check(name, [positions] if shorter else [], "warn") if not wrong else check(name, wrong))
    return checks


def _same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(_same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, float) and isinstance(theirs, (int, float)):
        return math.isclose(mine, theirs, rel_tol=1e-12)
    return bool(mine == theirs)


# --- weights ------------------------------------------------------------------------------------------------------


def _weights(parts: Parts, source: SourceCheckpoint) -> Findings:
    """Fidelity, finiteness, and whether all tensors are there."""
    known = parts.scheme.is_known
    compared = weights.compare(parts.parts, source) if known else []
    bad = [f"{tensor.name} holds NaN or inf" for tensor in compared if not tensor.finite]
    done = {(id(part.file), part.spec.name) for part in parts.parts} if known else set()
    for number, file in enumerate(parts.ranks):
        for name, info in file.tensors.items():
            if info.dtype in FLOATS and (id(file), name) not in done and not _is_small(name):
                problem = weights.unfinite(file, name)
                bad += [f"{name} of rank {number} holds {problem}"] if problem else []
    checks = [check("weights are finite", bad)]
    if known:
        checks.append(check("tensors are the source's", parts.problems))
    else:
        quantised = f"{parts.scheme.algorithm}, cache {parts.scheme.cache}"
        checks.append(Check("weights compared", "warn", note=f"how {quantised} stores weights is not known here"))
    layers = {tensor.name.removesuffix(".weight"): tensor.error for tensor in compared if tensor.linear}
    return Findings(weights.measures(compared), tuple(checks), layers=layers)


def _is_small(name: str) -> bool:
    return name.endswith("_scaling_factor") or name.split(".")[-1] in ROPE_TABLES


def _quantised_as_named(parts: Parts, algorithm: str, bits: float) -> Check:
    """The algorithm, its layers and no others, and the bits they take."""
    wrong = []
    found = parts.scheme.algorithm or ""
    if found != algorithm:
        wrong.append(f"config.json says quant_algo {found or 'null'}, the name {algorithm or 'none'}")
    wrong += _not_asked_for(parts)
    linears = [part for part in parts.parts if part.is_linear] if parts.scheme.is_known else []
    excluded = {part.module for part in linears if found and not parts.scheme.quantises(part.module)}
    for part in linears:
        if part.kind != ("plain" if part.module in excluded else _KINDS.get(found, "plain")):
            why = " though exclude_modules names it" if part.module in excluded else ""
            wrong.append(f"{part.name} is stored as {_spoken(part)}{why}")
    wrong += [
        f"{part.name} is {part.info.dtype}, config.json says {parts.config.get('dtype')}"
        for part in parts.parts
        if part.kind == "plain" and part.info.dtype != parts.config.get("dtype")
    ]
    counted = [part for part in linears if part.module not in excluded]
    kept = 1 - _weights_of(counted) / max(_weights_of(linears), 1)
    if kept > _MOST_EXCLUDED:
        wrong.append(f"exclude_modules leaves {kept:.0%} of the linear layers' weights at 16 bits")
    stored = sum(_stored_bits(part) for part in counted) / max(_weights_of(counted), 1)
    if counted and abs(stored / bits - 1) > _BITS_TOLERANCE:
        wrong.append(f"linear layers take {stored:.2f} bits a weight, the name says {bits:g}")
    return check("quantised as named", wrong, value=stored if counted else None, limit=bits)


def _not_asked_for(parts: Parts) -> Iterator[str]:
    for file in parts.ranks:
        for name, info in file.tensors.items():
            module, _, kind = name.rpartition(".")
            if kind in SCALES and not module.endswith(LINEARS):
                yield f"{module} is quantised: it has {kind}"
            elif kind == "weight" and not is_linear(name) and info.dtype not in FLOATS:
                yield f"{name} is {info.dtype}: only linear layers of the decoder's layers are quantised"


def _weights_of(parts: list[Part]) -> int:
    return sum(math.prod(part.spec.shape) for part in parts)


def _spoken(part: Part) -> str:
    return part.info.dtype if part.kind == "plain" else {"fp8": "FP8"}.get(part.kind, part.kind)


def _stored_bits(part: Part) -> int:
    scales = (part.file.tensors.get(f"{part.module}.{what}") for what in SCALES)
    return 8 * (part.info.nbytes + sum(scale.nbytes for scale in scales if scale))


# --- tokenizer ----------------------------------------------------------------------------------------------------

_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, twice.",
    "1234567890 3.14159 1,000,000 -42 2026-07-01",
    "def f(x):\n    return {'a': [x ** 2, x // 3]}  # done\n\n\treturn;",
    "Grüße aus Köln, ça va? Привет, मित्र! مرحبا",
    "你好,世界。こんにちは 안녕하세요",
    "🙂👩‍👩‍👧 ½ € ™ \u200b  two  spaces ",
)
_CHAT = (
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "?"},
)
_TOKENIZER = "tokenizer equals the source's"


def tokenizer_check(source_folder: Path, engine_folder: Path) -> Check:
    """Whether the tokenizer beside an engine gives the source's ids, stops and conversations."""
    if not (source_folder / "tokenizer.json").is_file():
        return check(_TOKENIZER, ["the source has no tokenizer.json"], "warn")
    try:
        theirs = Tokenizer.load(source_folder)
        mine = Tokenizer.load(engine_folder)
    except MachineError as error:
        return Check(_TOKENIZER, "not run", note=error.message)
    except RequestError as error:
        return check(_TOKENIZER, [error.message])
    files = [(folder / "tokenizer.json").read_bytes() for folder in (source_folder, engine_folder)]
    return check(_TOKENIZER, list(_tokenizer_differences(mine, theirs, each_id=files[0] != files[1])))


def _tokenizer_differences(mine: Tokenizer, theirs: Tokenizer, each_id: bool) -> Iterator[str]:
    if mine.size != theirs.size:
        yield f"it has {mine.size:,} ids, the source's {theirs.size:,}"
    for text in _TEXTS:
        if mine.encode(text) != theirs.encode(text):
            yield f"it splits {text[:24]!r} otherwise"
    ids = range(min(mine.size, theirs.size) if each_id else 0)
    other = [i for i in ids if mine.decode([i]) != theirs.decode([i])]
    if other:
        yield f"{len(other):,} ids mean another text, first {other[0]}"
    if mine.stop_ids != theirs.stop_ids:
        yield f"it stops at {sorted(mine.stop_ids)}, the source at {sorted(theirs.stop_ids)}"
    if _rendered(mine) != _rendered(theirs):
        yield "its chat template renders otherwise"


def _rendered(tokenizer: Tokenizer) -> str:
    try:
        return tokenizer.chat(_CHAT)
    except RequestError as error:
        return error.message
