"""Where every weight goes: from a decoder and a mapping to the tensors of each rank, as data.

Converting, joining and verifying all follow this one description. Knows names, shapes and splits; reads no bytes.
Format: TensorRT-LLM checkpoints as `convert_checkpoint.py` writes them, unquantised.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..decoder import Decoder
from ..errors import RequestError

#: Rows or columns, from the first up to before the last.
Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """A rectangle of one Hugging Face tensor: rows [start, stop), and columns if the tensor has two dimensions."""

    name: str
    rows: Range
    columns: Range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows, and columns if there are any."""
        rows = self.rows[1] - self.rows[0]
        return (rows,) if self.columns is None else (rows, self.columns[1] - self.columns[0])


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a rank file: its pieces stacked along the rows, then `pad_rows` rows of zeros.

    `offset` is added to each value of the pieces, see `Decoder.norm_offset`.
    """

    name: str
    pieces: tuple[Piece, ...]
    pad_rows: int = 0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the rank file."""
        rows = sum(piece.shape[0] for piece in self.pieces) + self.pad_rows
        return (rows, *self.pieces[0].shape[1:])

    @property
    def starts(self) -> dict[str, int]:
        """Source tensor -> the row where its first row lies, or would lie if a piece left out what is before it."""
        found, position = {}, 0
        for piece in self.pieces:
            found[piece.name] = position - piece.rows[0]
            position += piece.shape[0]
        return found


@dataclass(frozen=True)
class _Source:
    """A Hugging Face tensor that a rank takes a part of, or what lies in it from row `first` on."""

    name: str
    shape: tuple[int, ...]
    first: int = 0

    def rows(self, start: int, stop: int) -> Piece:
        columns = (0, self.shape[1]) if len(self.shape) == 2 else None
        return Piece(self.name, (self.first + start, self.first + stop), columns)

    def columns(self, start: int, stop: int) -> Piece:
        return Piece(self.name, (0, self.shape[0]), (start, stop))

    def whole(self) -> Piece:
        return self.rows(0, self.shape[0])


def layout(
    decoder: Decoder, tp_size: int = 1, pp_size: int = 1, parallel_embedding: bool | None = None
) -> list[list[TensorSpec]]:
    """The tensors of every rank, in file order. Rank = pp_rank * tp_size + tp_rank.

    Args:
        decoder: what the model is.
        tp_size: number of tensor-parallel ranks: heads, MLP rows and vocabulary rows are split over them.
        pp_size: number of pipeline stages: layers are split over them.
        parallel_embedding: the embedding table is split like the output head (ModelOpt's exports are made so). None:
            if the family's `config` says `use_parallel_embedding`.

    Raises:
        RequestError: the model cannot be split so; the message names the numbers, the hint what would work.
    """
    check_split(decoder, tp_size, pp_size)
    stages = stage_layers(decoder.layers, pp_size)
    if parallel_embedding is None:
        parallel_embedding = bool(decoder.config.get("use_parallel_embedding", False))
    return [
        _rank(decoder, stages, stage, tp_size, rank, parallel_embedding)
        for stage in range(pp_size)
        for rank in range(tp_size)
    ]


def source_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every Hugging Face tensor that the decoder needs (a tied head needs none of its own)."""
    (rank,) = layout(decoder)
    found: dict[str, tuple[int, ...]] = {}
    for piece in (piece for spec in rank for piece in spec.pieces):
        rows = max(piece.rows[1], *found.get(piece.name, (0,))[:1])  # of several layers in one tensor: the last ends it
        found[piece.name] = (rows, *piece.shape[1:])
    return found


def stage_layers(layers: int, pp_size: int) -> list[range]:
    """The layers of each pipeline stage. The first (layers mod pp_size) stages get one more."""
    each, more = divmod(layers, pp_size)
    starts = [stage * each + min(stage, more) for stage in range(pp_size + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def check_split(decoder: Decoder, tp_size: int, pp_size: int) -> None:
    """Raise RequestError unless the model can be split over these ranks. Costs nothing."""
    for name, size in (("tp_size", tp_size), ("pp_size", pp_size)):
        if size < 1:
            raise RequestError(f"{name} is {size}", "1 means not split")
    problem = _tp_problem(decoder, tp_size)
    if problem:
        works = [size for size in range(1, min(decoder.heads, 1024) + 1) if not _tp_problem(decoder, size)]
        raise RequestError(f"{problem} cannot be split over tp_size {tp_size}", f"tp_size {_either(works)} would work")
    if pp_size > decoder.layers:
        raise RequestError(
            f"{decoder.layers} layers cannot be split over pp_size {pp_size}",
            f"every stage needs a layer: pp_size up to {decoder.layers} would work",
        )


def _tp_problem(d: Decoder, tp_size: int) -> str:
    if d.heads % tp_size:
        return f"num_attention_heads {d.heads}"
    if d.kv_heads % tp_size and tp_size % d.kv_heads:
        return f"num_key_value_heads {d.kv_heads}"
    if d.intermediate_size % tp_size:
        return f"intermediate_size {d.intermediate_size}"
    return ""


def _either(sizes: Sequence[int]) -> str:
    words = [str(size) for size in sizes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _rank(
    d: Decoder, stages: Sequence[range], stage: int, tp_size: int, rank: int, parallel_embedding: bool
) -> list[TensorSpec]:
    embedding = _Source(d.names["embedding"], (d.vocab_size, d.hidden_size))
    head = embedding if d.tied else _Source(d.names["lm_head"], embedding.shape)
    specs: list[TensorSpec] = []
    if stage == 0:
        name = "transformer.vocab_embedding.weight"
        split = parallel_embedding and tp_size > 1
        specs.append(_vocabulary(name, embedding, tp_size, rank) if split else TensorSpec(name, (embedding.whole(),)))
    for index, layer in enumerate(stages[stage]):
        specs += _layer(d, f"transformer.layers.{index}.", layer, tp_size, rank)
    if stage == len(stages) - 1:
        norm = _Source(d.names["final_norm"], (d.hidden_size,))
        specs.append(TensorSpec("transformer.ln_f.weight", (norm.whole(),), offset=d.norm_offset))
        specs.append(_vocabulary("lm_head.weight", head, tp_size, rank))
    return specs


def _vocabulary(name: str, source: _Source, tp_size: int, rank: int) -> TensorSpec:
    """Rows of a vocabulary table. Each rank holds ceil(vocab / tp) of them; what is beyond the end is zeros."""
    vocab = source.shape[0]
    each = math.ceil(vocab / tp_size)
    start, stop = min(rank * each, vocab), min((rank + 1) * each, vocab)
    return TensorSpec(name, (source.rows(start, stop),), each - (stop - start))


def _layer(d: Decoder, prefix: str, layer: int, tp_size: int, rank: int) -> list[TensorSpec]:
    def source(role: str, *shape: int, suffix: str = "") -> _Source:
        return _Source(d.names[role].format(layer) + suffix, shape)

    def spec(name: str, *pieces: Piece) -> TensorSpec:
        return TensorSpec(prefix + name, pieces)

    def norm(name: str, role: str, size: int) -> TensorSpec:
        return TensorSpec(prefix + name, (source(role, size).whole(),), offset=d.norm_offset)

    hidden, inner, query = d.hidden_size, d.intermediate_size, d.heads * d.head_size
    rows = (rank * inner // tp_size, (rank + 1) * inner // tp_size)
    heads = (rank * query // tp_size, (rank + 1) * query // tp_size)

    specs = [norm("input_layernorm.weight", "input_norm", hidden)]
    specs += _qkv(d, prefix, layer, tp_size, rank)
    specs.append(spec("attention.dense.weight", source("dense", hidden, query, suffix=".weight").columns(*heads)))
    if d.dense_bias:  # added once, after the sum over ranks: every rank holds all of it
        specs.append(spec("attention.dense.bias", source("dense", hidden, suffix=".bias").whole()))
    if d.qk_norm:
        for role in ("q", "k"):
            specs.append(norm(f"attention.{role}_layernorm.weight", f"{role}_norm", d.head_size))
    specs.append(norm("post_layernorm.weight", "post_norm", hidden))
    sizes = {"gate": inner, "up": inner}
    for name, role in (("fc", "gate"), ("gate", "up")):  # their names: fc is what the activation is applied to
        specs.append(spec(f"mlp.{name}.weight", _stacked(d, layer, sizes, ".weight", hidden)[role].rows(*rows)))
        if d.mlp_bias:
            specs.append(spec(f"mlp.{name}.bias", _stacked(d, layer, sizes, ".bias")[role].rows(*rows)))
    specs.append(spec("mlp.proj.weight", source("down", hidden, inner, suffix=".weight").columns(*rows)))
    if d.mlp_bias:
        specs.append(spec("mlp.proj.bias", source("down", hidden, suffix=".bias").whole()))
    return specs


def _qkv(d: Decoder, prefix: str, layer: int, tp_size: int, rank: int) -> list[TensorSpec]:
    """This rank's q, k and v heads in one tensor. With fewer k/v heads than ranks, neighbours hold the same head."""
    kv_each = max(d.kv_heads // tp_size, 1)
    kv_start = rank * d.kv_heads // tp_size
    heads = {
        "q": (rank * d.heads // tp_size, (rank + 1) * d.heads // tp_size, d.heads),
        "k": (kv_start, kv_start + kv_each, d.kv_heads),
        "v": (kv_start, kv_start + kv_each, d.kv_heads),
    }
    sizes = {role: count * d.head_size for role, (_, _, count) in heads.items()}
    specs = []
    for kind in ("weight", "bias") if d.qkv_bias else ("weight",):
        sources = _stacked(d, layer, sizes, f".{kind}", *((d.hidden_size,) if kind == "weight" else ()))
        pieces = (
            sources[role].rows(start * d.head_size, stop * d.head_size) for role, (start, stop, _) in heads.items()
        )
        specs.append(TensorSpec(f"{prefix}attention.qkv.{kind}", tuple(pieces)))
    return specs


def _stacked(d: Decoder, layer: int, sizes: Mapping[str, int], suffix: str, *columns: int) -> dict[str, _Source]:
    """Layers that read the same input, by role: those of one name lie in one tensor, one after another."""
    found: dict[str, _Source] = {}
    ends: dict[str, int] = {}
    for role, rows in sizes.items():
        name = d.names[role].format(layer) + suffix
        found[role] = _Source(name, (rows, *columns), ends.get(name, 0))
        ends[name] = ends.get(name, 0) + rows
    return found
