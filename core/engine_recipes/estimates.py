"""What a build will take, from the number of parameters: memory, disk, GPU memory. Pure arithmetic over `costs`.

A calibration's and a precision's costs are for each parameter of the model. An engine's are for each parameter of a
16-bit checkpoint: of one with smaller weights it reads less, and takes as much less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .decoder import Decoder
from .entries import Calibration, Costs, Engine, Precision
from .errors import MachineError, RequestError
from .facts import Facts
from .space import free_bytes, human_bytes
from .types import StageName

#: Below this many bytes of memory an estimate is mostly libraries, which is no ground to refuse a small model.
ROUGH = 4_000_000_000
#: How much of what is available one stage may take: the rest of the machine goes on meanwhile.
MARGIN = 0.95
_TABLE = 2.0  # bytes of a number in the tables, which stay at 16 bits


@dataclass(frozen=True)
class Needs:
    """Bytes that something takes at its peak: of RAM, of disk, and of one GPU's memory where it uses one."""

    memory: int = 0
    disk: int = 0
    gpu_memory: int = 0


def weight_bytes(
    parameters: int, precision: Precision, decoder: Decoder | None = None, excluded: Sequence[str] = ()
) -> float:
    """Bytes of the weights at a precision, a tied head counted once: tables and the linear layers that patterns exclude
    at 16 bits, the rest at `bits`.

    Without a decoder the tables are taken for those of 128,000 tokens, the head not tied, at a width that grows with
    the cube root of the parameters (4096 at 8 billion), and for a quarter of a small model.
    """
    if decoder:
        tables = float(_tables(decoder) * (1 if decoder.tied else 2)) + _kept(decoder, excluded)
        parameters = decoder.parameters
    else:
        tables = min(parameters / 4, 2 * 128e3 * 4096 * (parameters / 8e9) ** (1 / 3))
    return (parameters - tables) * precision.bits / 8 + tables * _TABLE


def estimate(
    parameters: int,
    precision: Precision,
    engine: Engine,
    calibration: Calibration | None = None,
    decoder: Decoder | None = None,
    ranks: int = 1,
    gpu: bool = False,
    excluded: Sequence[str] = (),
) -> dict[StageName, Needs]:
    """What each stage takes.

    Args:
        parameters: of the model, a tied head counted once; 0 if they are not known, then nothing is estimated.
        decoder: the model, if it has been resolved: its tables are counted then.
        ranks: `tp_size` times `pp_size`: so many GPUs share an engine. The host builds for all of them.
        gpu: the calibration runs on a GPU: what grows with the model is in its memory and not in RAM.
        excluded: patterns of linear layers that stay at 16 bits; they count if the decoder is known.
    """
    if not parameters:
        return {}
    weights = weight_bytes(parameters, precision, decoder, excluded)
    head = _tables(decoder) * _TABLE if decoder and decoder.tied else 0  # the checkpoint has a copy of its own
    of_engine = _needs(engine.costs, weights / 2)
    found: dict[StageName, Needs] = {}
    if calibration:
        cost = _needs(calibration.costs, parameters)
        found["calibrate"] = Needs(
            calibration.costs.memory_base if gpu else cost.memory, cost.disk, cost.gpu_memory if gpu else 0
        )
    found["stage1"] = Needs(_needs(precision.costs, parameters).memory, round(weights + head))
    found["stage2"] = Needs(of_engine.memory, of_engine.disk, of_engine.gpu_memory // ranks)
    return found


def runtime(
    parameters: int,
    precision: Precision,
    engine: Engine,
    *,
    tokens: int,
    decoder: Decoder | None = None,
    kv_bytes: int = 2,
    ranks: int = 1,
    excluded: Sequence[str] = (),
) -> Needs:
    """What a loaded engine takes: its weights, and the KV cache on the GPU if it has the weights there, else in RAM.

    Args:
        tokens: that the cache holds at once, of all sequences: `max_seq_len` times `max_batch_size`.
        kv_bytes: of one number in the cache: 2, or 1 if it has 8 bits.
        ranks: how many GPUs share weights and cache.
        excluded: as for `estimate`.
    """
    if not parameters:
        return Needs()
    cache = round(tokens * kv_token_bytes(parameters, decoder, kv_bytes))
    needs = _needs(engine.runtime, weight_bytes(parameters, precision, decoder, excluded) / 2)
    if engine.runtime.gpu_memory:
        return Needs(needs.memory, gpu_memory=(needs.gpu_memory + cache) // ranks)
    return Needs(needs.memory + cache)


def kv_token_bytes(parameters: int, decoder: Decoder | None = None, kv_bytes: int = 2) -> float:
    """Bytes of one token in the KV cache: a key and a value for each KV head of each layer.

    Without a decoder 34 kB × √(billions of parameters) at 16 bits: models with grouped queries from 0.1B (23 kB) over
    8B (131 kB) to 70B (328 kB) are within a factor of two of that; one without groups takes up to four times as much.
    """
    if decoder:
        return 2.0 * decoder.layers * decoder.kv_heads * decoder.head_size * kv_bytes
    return 34e3 * math.sqrt(parameters / 1e9) * kv_bytes / 2


def short(what: str, needs: Mapping[StageName, Needs], facts: Facts, workspace: Path) -> MachineError | None:
    """What does not fit on this machine; None if all does, or nothing is known.

    Args:
        what: begins the message: `qwen2.5-7b:fp16@onnxruntime`.
        needs: of the stages that have to run, and of no others.
        workspace: where they all leave what they make.
    """
    for stage, need in needs.items():
        have = facts.memory_available_bytes
        if have and need.memory > max(ROUGH, have * MARGIN):
            return MachineError(
                f"{stage} of {what} needs about {human_bytes(need.memory)} of memory, "
                f"{human_bytes(have)} are available",
                "end other programs, choose a smaller model or a machine with more memory, or --force",
            )
        largest = max((gpu.memory_bytes for gpu in facts.gpus), default=0)
        if largest and need.gpu_memory > largest:
            return MachineError(
                f"{stage} of {what} needs about {human_bytes(need.gpu_memory)} of GPU memory, "
                f"the GPU has {human_bytes(largest)}",
                "choose a smaller precision, share it with --set tp_size=2, or --force",
            )
    disk, free = sum(need.disk for need in needs.values()), free_bytes(workspace)
    if disk > free:
        return MachineError(
            f"{what} needs about {human_bytes(disk)} in {workspace}, {human_bytes(free)} are free",
            "free some disk space, choose another place with --workspace, or --force",
        )
    return None


def _needs(costs: Costs, parameters: float) -> Needs:
    return Needs(
        round(costs.memory_base + costs.memory * parameters),
        round(costs.disk * parameters),
        round(costs.gpu_memory * parameters),
    )


def _kept(decoder: Decoder, patterns: Sequence[str]) -> int:
    """Weights of the linear layers that patterns exclude. 0 for patterns that the precision is going to refuse."""
    if not patterns:
        return 0
    from .checkpoint import excluded_linears, linear_sizes

    try:
        names = excluded_linears(decoder, patterns)
    except RequestError:
        return 0
    sizes = linear_sizes(decoder)
    return sum(sizes[name] for name in names)


def _tables(decoder: Decoder) -> int:
    """Numbers in the embedding table, or in the output head."""
    return decoder.vocab_size * decoder.hidden_size
