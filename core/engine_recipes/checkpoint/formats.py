"""What a quantised checkpoint stores for each linear layer: names, dtypes and shapes, as data.

Format: what TensorRT-LLM's loaders want for `quant_algo` FP8, W4A16_AWQ, W8A8_SQ_PER_CHANNEL, W8A16 and W4A16, and for
an 8-bit KV cache. Other algorithms say in `config.json` what they store. Everything is derived from the unquantised
layout (`layout.py`), so that splits and joins follow the same rules.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ..decoder import Decoder
from ..errors import RequestError
from .layout import Piece, TensorSpec
from .safetensors import DTYPES_BY_NAME

#: TensorRT-LLM's linear layers that are quantised; the head and the embedding are not.
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
#: Weights of these algorithms stay as they are in the checkpoint: the engine's builder quantises them as it loads.
WEIGHT_ONLY = ("W8A16", "W4A16")
#: `quant_algo` values whose tensors are known here.
ALGORITHMS = ("FP8", "W4A16_AWQ", "W8A8_SQ_PER_CHANNEL", *WEIGHT_ONLY)
CACHE_ALGORITHMS = ("FP8", "INT8")
#: Group sizes that the int4 kernels of TensorRT-LLM have, best compression first.
GROUP_SIZES = (128, 64)
_WILD = frozenset("*?[")
#: The key of `quantization` under which an algorithm that is not known here says what it stores.
_PARTS = "linear_parts"
_MOST_PARTS = 16
#: What else a tensor beside a linear layer's weight is, or what `Stored.part` says of one that is no part.
_RESERVED = ("plain", "cache_scale", "bias")


@dataclass(frozen=True)
class LinearPart:
    """One tensor that an algorithm stores for each linear layer, in place of its weight [out, in] or beside it.

    Attributes:
        name: after the layer's: `weight`, `weights_scaling_factor` …
        dtype: numpy's name of it; empty for that of what is not quantised.
        rows, columns: how many rows (outputs) and columns (inputs) of the weight share an element. 0: all of them, and
            the tensor lacks that side; with both 0 it is one number, [1].
    """

    name: str
    dtype: str
    rows: int = 1
    columns: int = 1


_INPUT_SCALE = LinearPart("activation_scaling_factor", "float32", 0, 0)
_PREQUANT = LinearPart("prequant_scaling_factor", "", 0, 1)


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised.

    Attributes:
        algorithm, cache: `quant_algo` and `kv_cache_quant_algo`.
        group_size: where the algorithm has one.
        excluded: linear layers that are not quantised, names or fnmatch patterns; layers count from 0 on each
            pipeline rank, as in `exclude_modules`.
        parts: what an algorithm that is not known here stores for each linear layer; none if it does not say so.
    """

    algorithm: str | None = None
    cache: str | None = None
    group_size: int = 128
    excluded: tuple[str, ...] = ()
    parts: tuple[LinearPart, ...] = ()

    @classmethod
    def from_config(cls, quantization: Mapping[str, Any]) -> Scheme:
        """From the `quantization` object of a checkpoint's config.json."""
        group = quantization.get("group_size")
        excluded = quantization.get("exclude_modules") or []
        if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
            raise RequestError(
                f"config.json gives exclude_modules as {short(excluded)}", "it is a list of names, or null"
            )
        algorithm, cache = (quantization.get(key) for key in ("quant_algo", "kv_cache_quant_algo"))
        for name in (algorithm, cache):
            if name is not None and not isinstance(name, str):
                raise RequestError(f"config.json names {short(name)} as a quantization", "it is a name, or null")
        return cls(
            algorithm,
            cache,
            group if type(group) is int and group > 0 else 128,
            tuple(name for name in excluded if _is_linear(name)),
            _read_parts(quantization.get(_PARTS)) if algorithm and algorithm not in ALGORITHMS else (),
        )

    def quantises(self, module: str) -> bool:
        """Whether the algorithm is about this module of a rank, `transformer.layers.0.mlp.proj`."""
        if self.algorithm is None or not module.endswith(LINEARS):
            return False
        return not any(fnmatchcase(module, name) if _WILD & set(name) else module == name for name in self.excluded)

    @property
    def is_known(self) -> bool:
        """Whether it is known here what every tensor of it means."""
        return self.algorithm in (None, *ALGORITHMS) and self.cache in (None, *CACHE_ALGORITHMS)

    @property
    def is_described(self) -> bool:
        """Whether at least every tensor's name, shape and dtype follow from it."""
        return self.is_known or (bool(self.parts) and self.cache in (None, *CACHE_ALGORITHMS))

    @property
    def linear_parts(self) -> tuple[LinearPart, ...]:
        """What is stored for each quantised layer, in file order; nothing if its weight stays as it is."""
        if self.algorithm == "FP8":
            scale = LinearPart("weights_scaling_factor", "float32", 0, 0)
            return (LinearPart("weight", "float8_e4m3fn"), scale, _INPUT_SCALE)
        if self.algorithm == "W4A16_AWQ":  # rows 2i and 2i + 1 share a byte
            scale = LinearPart("weights_scaling_factor", "float32", 1, self.group_size)
            return (LinearPart("weight", "int8", rows=2), scale, _PREQUANT)
        if self.algorithm == "W8A8_SQ_PER_CHANNEL":
            scale = LinearPart("weights_scaling_factor", "float32", 1, 0)
            return (LinearPart("weight", "int8"), scale, _INPUT_SCALE, _PREQUANT)
        return self.parts

    def config(self) -> dict[str, Any]:
        """The keys of `quantization` that differ from an unquantised checkpoint's."""
        changes: dict[str, Any] = {"quant_algo": self.algorithm, "kv_cache_quant_algo": self.cache}
        if self.linear_parts:
            changes["exclude_modules"] = ["lm_head", *self.excluded]
        if self.algorithm == "W4A16_AWQ":
            changes |= {"group_size": self.group_size, "has_zero_point": False, "pre_quant_scale": True}
        if self.parts:
            changes[_PARTS] = [vars(part) for part in self.parts]
        return changes


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantised rank file.

    Attributes:
        spec: its name and geometry in its own elements.
        dtype: numpy's name.
        part: what it is: the name of a LinearPart; `plain` if it is stored as it is, `cache_scale` for the KV cache's.
        base: the unquantised tensor it stands for or belongs to.
    """

    spec: TensorSpec
    dtype: str
    part: str
    base: TensorSpec

    @property
    def name(self) -> str:
        """As in the rank file."""
        return self.spec.name


def stored(specs: Iterable[TensorSpec], scheme: Scheme, dtype: str) -> Iterator[Stored]:
    """The tensors of a rank in file order.

    Args:
        specs: the rank's unquantised tensors.
        dtype: of what is not quantised.
    """
    parts = scheme.linear_parts
    for spec in specs:
        module, _, kind = spec.name.rpartition(".")
        linear = kind == "weight" and module.endswith(LINEARS)
        if linear and parts and scheme.quantises(module):
            for part in parts:
                yield Stored(divided(spec, f"{module}.{part.name}", part), part.dtype or dtype, part.name, spec)
        else:
            yield Stored(spec, dtype, "plain", spec)
        if linear and scheme.cache and module.endswith("attention.qkv"):
            attention = module.removesuffix(".qkv")
            for name in ("kv_cache", "k_cache", "v_cache"):
                scale = LinearPart(f"{name}_scaling_factor", "float32", 0, 0)
                yield Stored(divided(spec, f"{attention}.{scale.name}", scale), "float32", "cache_scale", spec)


def _is_linear(name: str) -> bool:
    """Whether an entry of `exclude_modules` may be about a linear layer that would be quantised."""
    return name.endswith(LINEARS) or bool(_WILD & set(name))


def divided(spec: TensorSpec, name: str, part: LinearPart) -> TensorSpec:
    """The geometry of what is stored for a weight, called `name`.

    Raises:
        RequestError: rows or columns that share an element lie on different ranks.
    """
    first = spec.pieces[0]
    assert first.columns is not None
    columns = _shared(f"columns of {first.name}", first.columns, part.columns) if part.columns else None
    if not part.rows:  # the same for all pieces: they have the same columns
        return TensorSpec(name, (Piece(first.name, columns or (0, 1)),))
    pieces = (
        replace(piece, rows=_shared(f"rows of {piece.name}", piece.rows, part.rows), columns=columns)
        for piece in spec.pieces
    )
    return TensorSpec(name, tuple(pieces))


def _shared(what: str, places: tuple[int, int], step: int) -> tuple[int, int]:
    if any(place % step for place in places):
        raise RequestError(
            f"{what} {places[0]} to {places[1]} are no whole groups of {step}, which are stored together",
            "choose another tp_size",
        )
    return places[0] // step, places[1] // step


def check_parts(parts: Sequence[Any]) -> None:
    """That these parts can be stored for each linear layer, told apart, and read again.

    Raises:
        ValueError: they cannot; says which is the first that is wrong, and what of it, in one short line.
    """
    if len(parts) > _MOST_PARTS:
        raise ValueError(f"{len(parts)} parts, and {_MOST_PARTS} are the most")
    for index, part in enumerate(parts):
        wrong = _wrong(part)
        if wrong:
            raise ValueError(f"{short(part)}: {wrong}")
        if part.name in [before.name for before in parts[:index]]:
            raise ValueError(f"{short(part.name)} twice")


def _wrong(part: Any) -> str:
    if not isinstance(part, LinearPart):
        return "that is no part"
    if not isinstance(part.name, str) or not part.name.isidentifier():
        return "its name is no identifier"
    if part.name in _RESERVED:
        return "its name means something else in a checkpoint"
    if not isinstance(part.dtype, str) or part.dtype not in ("", *DTYPES_BY_NAME):
        return "no such dtype can be stored"
    if not all(type(step) is int and step >= 0 for step in (part.rows, part.columns)):
        return "rows and columns are whole numbers, 0 or more"
    return ""


def short(value: object) -> str:
    """How a value is written, however long, in at most 80 characters."""
    text = reprlib.repr(vars(value) if isinstance(value, LinearPart) else value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read_parts(given: Any) -> tuple[LinearPart, ...]:
    """From `config.json`. Raises RequestError for what `Scheme.config` would not write."""
    if given is None:
        return ()
    try:
        if not isinstance(given, list):
            raise ValueError(f"{short(given)}: that is no list")
        parts = [_read_part(part) for part in given[: _MOST_PARTS + 1]]
        check_parts(parts if len(given) == len(parts) else given)
    except ValueError as error:
        raise RequestError(f"config.json gives {_PARTS} with {error}", "build the checkpoint again") from None
    return tuple(parts)


def _read_part(given: Any) -> Any:
    try:
        return LinearPart(**given)
    except TypeError:
        return given


def choose_group_size(decoder: Decoder, wanted: int = 0, tp_size: int = 1, most: int = 128) -> int:
    """How many weights of a row share a scale.

    Args:
        wanted: 0 takes the largest that fits.
        tp_size: dense and proj are split along their inputs, and no group may be cut.
        most: none larger than this, unless wanted.

    Raises:
        RequestError: none fits, or the wanted one does not; the layer and its numbers are named.
    """
    inputs = {
        f"attention.qkv, mlp.fc and mlp.gate (hidden_size {decoder.hidden_size})": decoder.hidden_size,
        f"attention.dense ({decoder.heads} heads of {decoder.head_size} over tp_size {tp_size})": (
            decoder.heads * decoder.head_size // tp_size
        ),
        f"mlp.proj (intermediate_size {decoder.intermediate_size} over tp_size {tp_size})": (
            decoder.intermediate_size // tp_size
        ),
    }
    fits = [size for size in GROUP_SIZES if not any(count % size for count in inputs.values())]
    if (wanted in fits) if wanted else any(size <= most for size in fits):
        return wanted or next(size for size in fits if size <= most)
    size = wanted or min(GROUP_SIZES)
    layer, count = next((layer, count) for layer, count in inputs.items() if count % size)
    hint = f"group_size {fits[0]} would work" if fits else "int4-awq cannot hold this model so: choose fp8 or fp16"
    if not fits and tp_size > 1:
        hint = "try another tp_size, or another precision"
    raise RequestError(f"group_size {size} does not divide the {count:,} inputs of {layer}", hint)
