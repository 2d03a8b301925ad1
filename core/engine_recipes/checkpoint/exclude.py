"""Linear layers that stay unquantised among quantised ones: what users write, and what `exclude_modules` lists.

What TensorRT-LLM does with that list, in `quantization/quantize.py` and `models/modeling_utils.py`:

- `quantize_layers` leaves a module alone if its name `fnmatchcase`s an entry. Names are those of the rank's own
  modules, and `DecoderLayerList` counts layers from 0 on each pipeline rank, while all ranks read one `config.json`.
- `fuse_gate_mlp` makes one matrix of fc and gate, as `trtllm-build` does unless told otherwise. It asks whether fc's
  name is in the list, letter by letter, and takes gate to be as fc is: with one of the two excluded it stops at an
  assertion (FP8), or joins 16-bit weights with packed ones.
- `QuantConfig._get_quant_cfg` matches by `fnmatchcase`, or in some releases by equality and trailing stars alone.

So full names are written, which all of them understand, and fc and gate go together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from ..decoder import Decoder
from ..errors import RequestError, did_you_mean
from .formats import LINEARS
from .layout import layout, stage_layers

_PAIRS = {"mlp.fc": "mlp.gate", "mlp.gate": "mlp.fc"}
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.*)")


def linear_sizes(decoder: Decoder) -> dict[str, int]:
    """Linear layer as TensorRT-LLM names it, `transformer.layers.0.mlp.proj` -> number of its weights, in order."""
    (specs,) = layout(decoder)
    modules = {spec.name.removesuffix(".weight"): spec for spec in specs if spec.name.endswith(".weight")}
    return {name: math.prod(spec.shape) for name, spec in modules.items() if name.endswith(LINEARS)}


def excluded_linears(decoder: Decoder, patterns: Sequence[str], pp_size: int = 1) -> tuple[str, ...]:
    """The linear layers that patterns stand for, as `exclude_modules` is to list them.

    Args:
        patterns: as in fnmatch, `transformer.layers.*.mlp.proj`; layers count through the whole model.
        pp_size: pipeline ranks. The names that are returned count from 0 on each.

    Raises:
        RequestError: a pattern that matches nothing, nothing left to quantise, or a choice that ranks cannot share.
    """
    known = list(linear_sizes(decoder))
    found: set[str] = set()
    for pattern in patterns:
        matches = {name for name in known if fnmatchcase(name, pattern)}
        if not matches:
            raise RequestError(f"exclude: {pattern} is no linear layer of this model", did_you_mean(pattern, known))
        found |= matches
    found |= {partner for name in found if (partner := _partner(name))}
    if len(found) == len(known):
        raise RequestError(
            "exclude: every linear layer is excluded, and none is left to quantize",
            "exclude fewer, or choose an unquantised precision: fp16 or bf16",
        )
    chosen = [name for name in known if name in found]
    return tuple(chosen if pp_size == 1 else _shared(chosen, decoder.layers, pp_size))


def _partner(name: str) -> str:
    """fc's gate, gate's fc; else nothing."""
    for linear, partner in _PAIRS.items():
        if name.endswith(f".{linear}"):
            return name.removesuffix(linear) + partner
    return ""


def _shared(names: Collection[str], layers: int, pp_size: int) -> list[str]:
    """The same as names that mean the same on every pipeline rank."""
    stages = stage_layers(layers, pp_size)
    parts = [(int(match[1]), match[2]) for name in names if (match := _LAYER.fullmatch(name))]
    local = {(layer - stage.start, linear) for stage in stages for layer, linear in parts if layer in stage}
    for layer, linear in sorted(local):
        for stage in stages:
            missing = stage.start + layer
            if missing in stage and (missing, linear) not in parts:
                raise RequestError(
                    f"exclude: with pp_size {pp_size} transformer.layers.{missing}.{linear} would be excluded as well: "
                    "ranks count their layers from 0 and share one list",
                    f"exclude it in all layers, transformer.layers.*.{linear}, or choose pp_size 1",
                )
    return [f"transformer.layers.{layer}.{linear}" for layer, linear in sorted(local, key=_order)]


def _order(part: tuple[int, str]) -> tuple[int, int]:
    return part[0], LINEARS.index(part[1])
