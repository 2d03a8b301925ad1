"""What a quantised checkpoint stores for each linear layer: names, dtypes and shapes, as data.

Format: what TensorRT-LLM's loaders want for `quant_algo` FP8, W4A16_AWQ, W8A16 and W4A16, and for an 8-bit KV cache.
Everything is derived from the unquantised layout (`layout.py`), so that splits and joins follow the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from ..decoder import Decoder
from ..errors import RequestError
from .layout import Piece, TensorSpec

Part = Literal["plain", "weight", "weight_scale", "input_scale", "prequant_scale", "cache_scale"]

#: TensorRT-LLM's linear layers that are quantised; the head and the embedding are not.
LINEARS = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
#: Weights of these algorithms stay as they are in the checkpoint: the engine's builder quantises them as it loads.
WEIGHT_ONLY = ("W8A16", "W4A16")
#: `quant_algo` values whose tensors are known here.
ALGORITHMS = ("FP8", "W4A16_AWQ", *WEIGHT_ONLY)
CACHE_ALGORITHMS = ("FP8", "INT8")
#: Group sizes that the int4 kernels of TensorRT-LLM have, best compression first.
GROUP_SIZES = (128, 64)
_WILD = frozenset("*?[")


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised.

    Attributes:
        algorithm, cache: `quant_algo` and `kv_cache_quant_algo`.
        group_size: where the algorithm has one.
        excluded: linear layers that are not quantised, names or fnmatch patterns; layers count from 0 on each
            pipeline rank, as in `exclude_modules`.
    """

    algorithm: str | None = None
    cache: str | None = None
    group_size: int = 128
    excluded: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, quantization: Mapping[str, Any]) -> Scheme:
        """From the `quantization` object of a checkpoint's config.json."""
        group = quantization.get("group_size")
        excluded = quantization.get("exclude_modules") or []
        if not isinstance(excluded, list) or not all(isinstance(name, str) for name in excluded):
            raise RequestError(f"config.json gives exclude_modules as {excluded!r}", "it is a list of names, or null")
        algorithm, cache = (quantization.get(key) for key in ("quant_algo", "kv_cache_quant_algo"))
        for name in (algorithm, cache):
            if name is not None and not isinstance(name, str):
                raise RequestError(f"config.json names {name!r} as a quantization", "it is a name, or null")
        return cls(
            algorithm,
            cache,
            group if type(group) is int and group > 0 else 128,
            tuple(name for name in excluded if _is_linear(name)),
        )

    def quantises(self, module: str) -> bool:
        """Whether the algorithm is about this module of a rank, `transformer.layers.0.mlp.proj`."""
        if self.algorithm is None or not module.endswith(LINEARS):
            return False
        return not any(fnmatchcase(module, name) if _WILD & set(name) else module == name for name in self.excluded)

    @property
    def is_known(self) -> bool:
        """Whether every tensor of it is known here."""
        return self.algorithm in (None, *ALGORITHMS) and self.cache in (None, *CACHE_ALGORITHMS)

    def config(self) -> dict[str, Any]:
        """The keys of `quantization` that differ from an unquantised checkpoint's."""
        changes: dict[str, Any] = {"quant_algo": self.algorithm, "kv_cache_quant_algo": self.cache}
        if self.algorithm in ("FP8", "W4A16_AWQ"):
            changes["exclude_modules"] = ["lm_head", *self.excluded]
        if self.algorithm == "W4A16_AWQ":
            changes |= {"group_size": self.group_size, "has_zero_point": False, "pre_quant_scale": True}
        return changes


@dataclass(frozen=True)
class Stored:
    """One tensor of a quantised rank file.

    Attributes:
        spec: its name and geometry in its own elements.
        dtype: numpy's name.
        part: what it is.
        base: the unquantised tensor it stands for or belongs to.
    """

    spec: TensorSpec
    dtype: str
    part: Part
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
    for spec in specs:
        module, _, kind = spec.name.rpartition(".")
        linear = kind == "weight" and module.endswith(LINEARS)
        if not linear or scheme.algorithm not in ("FP8", "W4A16_AWQ") or not scheme.quantises(module):
            yield Stored(spec, dtype, "plain", spec)
        elif scheme.algorithm == "FP8":
            yield Stored(spec, "float8_e4m3fn", "weight", spec)
            yield Stored(_scalar(spec, f"{module}.weights_scaling_factor"), "float32", "weight_scale", spec)
            yield Stored(_scalar(spec, f"{module}.activation_scaling_factor"), "float32", "input_scale", spec)
        else:
            group = scheme.group_size
            packed = divided(spec, spec.name, row_step=2)  # rows 2i and 2i + 1 share a byte
            scales = divided(spec, f"{module}.weights_scaling_factor", column_step=group)
            yield Stored(packed, "int8", "weight", spec)
            yield Stored(scales, "float32", "weight_scale", spec)
            yield Stored(_inputs(spec, f"{module}.prequant_scaling_factor"), dtype, "prequant_scale", spec)
        if linear and scheme.cache and module.endswith("attention.qkv"):
            attention = module.removesuffix(".qkv")
            for name in ("kv_cache", "k_cache", "v_cache"):
                yield Stored(_scalar(spec, f"{attention}.{name}_scaling_factor"), "float32", "cache_scale", spec)


def _is_linear(name: str) -> bool:
    """Whether an entry of `exclude_modules` may be about a linear layer that would be quantised."""
    return name.endswith(LINEARS) or bool(_WILD & set(name))


def divided(spec: TensorSpec, name: str, row_step: int = 1, column_step: int = 1) -> TensorSpec:
    """The geometry of a tensor with one element for `row_step` rows and `column_step` columns of another."""

    def part(piece: Piece) -> Piece:
        assert piece.columns is not None
        rows = (piece.rows[0] // row_step, piece.rows[1] // row_step)
        return replace(piece, rows=rows, columns=(piece.columns[0] // column_step, piece.columns[1] // column_step))

    return TensorSpec(name, tuple(part(piece) for piece in spec.pieces))


def _inputs(spec: TensorSpec, name: str) -> TensorSpec:
    """One element for each input of a linear layer, [in]."""
    columns = spec.pieces[0].columns
    assert columns is not None
    return TensorSpec(name, (Piece(spec.pieces[0].name, columns),))


def _scalar(spec: TensorSpec, name: str) -> TensorSpec:
    return TensorSpec(name, (Piece(spec.pieces[0].name, (0, 1)),))


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
