"""Good tiny checkpoints, and making one bad, in place: each function one thing that an engine might be built with.

The functions that take a folder change its `rank0.safetensors` or `config.json`, plain or quantised, and leave a
checkpoint that looks right: no shape and no name is wrong unless that is the point.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from converted import resolve
from engine_recipes import checkpoint

Tensors = dict[str, Tensor]


#: precision -> (`quant_algo`, bits a weight)
PRECISIONS = {
    "float16": ("", 16.0),
    "bfloat16": ("", 16.0),
    "W8A16": ("W8A16", 16.0),
    "fp8": ("FP8", 8.0),
    "int8": ("W8A8_SQ_PER_CHANNEL", 8.0),
    "int4": ("W4A16_AWQ", 4.25),
}
#: Large enough for groups of 64 over two ranks.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 250, "head_dim": 32}


@dataclass(frozen=True)
class Made:
    """Folders of a tiny source, a good checkpoint of it, and what that was calibrated with.

    Attributes:
        algorithm, bits: what its name promises.
    """

    source: Path
    checkpoint: Path
    calibration: Path
    algorithm: str
    bits: float


def good(
    folder: Path,
    arch: str = "llama",
    precision: str = "fp8",
    kv: Any = "none",
    tp_size: int = 1,
    source_dtype: str = "bfloat16",
    seed: int = 0,
    pp_size: int = 1,
    **changes: Any,
) -> Made:
    """A tiny model with outliers and a few zeros, and stage 1 of it.

    Args:
        folder: a new one.
        precision: a key of PRECISIONS.
        kv: `none`, `fp8` or `int8`; the last two with quantised weights only.
        seed: of weights and statistics.
        changes: keys of the model's config.json.
    """
    settings = tiny.config(arch, **{**SHAPE, "torch_dtype": source_dtype, **changes})
    arrays = tiny.tensors(settings, seed)
    random = np.random.default_rng(seed)
    for name, array in arrays.items():
        if array.ndim == 2:  # tensors of different sizes, so that a scale taken from another one shows
            spread = np.exp(random.normal(0, 0.4, array.shape)) * random.uniform(0.5, 2)
            arrays[name] = (array.astype(np.float32) * spread * (random.random(array.shape) > 0.01)).astype(array.dtype)
    made = Made(folder / "source", folder / "checkpoint", folder / "calibration", *PRECISIONS[precision])
    resolve(tiny.write_tensors(made.source, settings, arrays))
    made.checkpoint.mkdir()
    made.calibration.mkdir()
    with checkpoint.open_source(made.source) as source:
        checkpoint.write_statistics(made.calibration, _statistics(source, random), {"method": "made up"})
        if precision in ("fp8", "int4"):
            kept = checkpoint.read_statistics(made.calibration)
            choices: dict[str, Any] = {"group_size": 64, "tp_size": tp_size, "pp_size": pp_size, "kv_cache": kv}
            checkpoint.quantize(source, made.checkpoint, kept, made.algorithm, **choices)  # type: ignore[arg-type]
        elif precision == "int8":
            quantise = smoothed(checkpoint.read_statistics(made.calibration))
            checkpoint.quantize_linears(
                source, made.checkpoint, made.algorithm, quantise, tp_size=tp_size, pp_size=pp_size
            )
        else:
            dtype: Any = "float16" if precision == "W8A16" else precision
            weight_only: Any = made.algorithm or None
            checkpoint.convert(source, made.checkpoint, dtype, tp_size, pp_size, weight_only)
    return made


def smoothed(statistics: checkpoint.Statistics) -> Callable[[checkpoint.Linear], dict[str, Any]]:
    """SmoothQuant of one linear layer, by `pre_quant_scale` and `channel_amax`."""

    def quantise(linear: checkpoint.Linear) -> dict[str, Any]:
        vectors = [statistics.vector(f"{name}.pre_quant_scale") for name in linear.sources]
        scale = np.mean(vectors, axis=0).astype(linear.dtype)
        inputs = [statistics.vector(f"{name}.channel_amax") * scale.astype(np.float32) for name in linear.sources]
        weight = linear.weight.astype(np.float32) / scale.astype(np.float32)
        steps = np.abs(weight).max(axis=1) / np.float32(127)
        steps[steps == 0] = 1
        return {
            "weight": np.rint(weight / steps[:, None]).astype(np.int8),
            "weights_scaling_factor": steps,
            "activation_scaling_factor": np.array([np.max(inputs) / 127], np.float32),
            "prequant_scaling_factor": scale,
        }

    return quantise


def _statistics(source: checkpoint.SourceCheckpoint, random: np.random.Generator) -> dict[str, Any]:
    found = {}
    for name, (_, info) in source.tensors.items():
        linear = name.removesuffix(".weight")
        if "_proj.weight" in name:
            found[f"{linear}.input_amax"] = random.uniform(1, 20, 1)
            found[f"{linear}.pre_quant_scale"] = random.uniform(0.7, 1.4, info.shape[1])
            found[f"{linear}.channel_amax"] = np.random.default_rng(info.nbytes).uniform(1, 20, info.shape[1])
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            found[f"{linear}.cache_amax"] = random.uniform(2, 30, 1)
    return found


@contextmanager
def config(folder: Path) -> Iterator[dict[str, Any]]:
    """The folder's config.json, written back."""
    path = folder / "config.json"
    found = json.loads(path.read_text())
    yield found
    path.write_text(json.dumps(found))


@contextmanager
def tensors(folder: Path) -> Iterator[Tensors]:
    """The tensors of rank 0, written back."""
    path = folder / "rank0.safetensors"
    found = load_file(path)
    yield found
    save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, path)


# --- settings -----------------------------------------------------------------------------------------------------


def rope_base(folder: Path) -> None:
    """Another rotary base: TensorRT-LLM's default, or five times that if it is the right one."""
    with config(folder) as found:
        found["rotary_base"] = 50000.0 if found["rotary_base"] == 10000 else 10000.0


def norm_epsilon(folder: Path) -> None:
    """Norms with an epsilon a hundred times as large."""
    with config(folder) as found:
        found["norm_epsilon"] *= 100


def activation(folder: Path) -> None:
    """TensorRT-LLM's default activation."""
    with config(folder) as found:
        found["hidden_act"] = "gelu"


def fewer_positions(folder: Path) -> None:
    """Half as many positions."""
    with config(folder) as found:
        found["max_position_embeddings"] //= 2


def wrong_dtype_claim(folder: Path) -> None:
    """config.json says the other 16-bit dtype."""
    with config(folder) as found:
        found["dtype"] = "bfloat16" if found["dtype"] == "float16" else "float16"


def wrong_algorithm_claim(folder: Path) -> None:
    """A plain checkpoint that calls itself FP8, or a quantised one that does not say so."""
    with config(folder) as found:
        found["quantization"]["quant_algo"] = None if found["quantization"]["quant_algo"] else "FP8"


# --- weights ------------------------------------------------------------------------------------------------------


def swap_qk(folder: Path, layer: int = 1) -> None:
    """The first rows of one layer's q exchanged with k."""
    with config(folder) as found, tensors(folder) as held:
        tp_size = found["mapping"]["tp_size"]
        k = found["num_key_value_heads"] * found["head_size"] // tp_size
        q = found["num_attention_heads"] * found["head_size"] // tp_size
        order = torch.arange(q + 2 * k)
        order[:k], order[q : q + k] = torch.arange(q, q + k), torch.arange(k)
        _order_rows(held, f"transformer.layers.{layer}.attention.qkv", order)


def permute_layer(folder: Path, layer: int = 1) -> None:
    """One layer's mlp.fc with its rows in another order, two by two."""
    with tensors(folder) as held:
        module = f"transformer.layers.{layer}.mlp.fc"
        rows = len(held[f"{module}.weight"]) * (2 if _is_packed(held, module) else 1)
        _order_rows(held, module, torch.arange(rows).reshape(-1, 2).roll(1, 0).reshape(-1))


def swap_fc_gate(folder: Path, layer: int = 1) -> None:
    """One layer's mlp.fc and mlp.gate exchanged, with their scales."""
    with tensors(folder) as held:
        at = f"transformer.layers.{layer}.mlp."
        for name in [name for name in held if name.startswith(f"{at}fc.")]:
            other = name.replace(f"{at}fc.", f"{at}gate.")
            held[name], held[other] = held[other], held[name]


def drop_last_layer(folder: Path) -> None:
    """One layer less, in config.json too."""
    with config(folder) as found, tensors(folder) as held:
        found["num_hidden_layers"] -= 1
        for name in [n for n in held if n.startswith(f"transformer.layers.{found['num_hidden_layers']}.")]:
            del held[name]


def zero_biases(folder: Path) -> None:
    """All biases of q, k and v zero."""
    with tensors(folder) as held:
        for name in [name for name in held if name.endswith("qkv.bias")]:
            held[name] = torch.zeros_like(held[name])


def norms_one(folder: Path) -> None:
    """All norms as they are before a model is loaded."""
    with tensors(folder) as held:
        for name in [name for name in held if name.endswith(("norm.weight", "ln_f.weight"))]:
            held[name] = torch.ones_like(held[name])


def nan_in_one(folder: Path, layer: int = 1) -> None:
    """One NaN in one layer's mlp.fc: in a weight, or in a scale of whole numbers."""
    with tensors(folder) as held:
        name = f"transformer.layers.{layer}.mlp.fc.weight"
        if held[name].dtype == torch.int8:
            name = name.replace(".weight", ".weights_scaling_factor")
        changed = held[name].float()
        changed[(3, 1)[: changed.dim()]] = torch.nan
        held[name] = changed.to(held[name].dtype)


def head_4_bits(folder: Path) -> None:
    """The output head rounded to 4 bits, with a scale for each row, and stored as it was."""
    with tensors(folder) as held:
        head = held["lm_head.weight"]
        step = head.float().abs().amax(1, keepdim=True) / 7
        held["lm_head.weight"] = ((head.float() / step).round() * step).to(head.dtype)


def head_int8(folder: Path) -> None:
    """The output head stored as int8 with a scale."""
    with tensors(folder) as held:
        head = held["lm_head.weight"].float()
        step = head.abs().amax() / 127
        held["lm_head.weight"] = (head / step).round().to(torch.int8)
        held["lm_head.weights_scaling_factor"] = step.reshape(1)


def layer_left_plain(folder: Path, layer: int = 1) -> None:
    """One layer's mlp.proj, FP8 or int8, stored in 16 bits; no exclude_modules says so."""
    with config(folder) as found, tensors(folder) as held:
        module = f"transformer.layers.{layer}.mlp.proj"
        scale = held.pop(f"{module}.weights_scaling_factor").reshape(-1, 1)
        weight = held[f"{module}.weight"].float() * scale * held.pop(f"{module}.prequant_scaling_factor", 1)
        held[f"{module}.weight"] = weight.to(getattr(torch, found["dtype"]))
        del held[f"{module}.activation_scaling_factor"]


# --- scales -------------------------------------------------------------------------------------------------------


def scale_times_8(folder: Path, layer: int = 1) -> None:
    """The weight scales of one layer's mlp.proj eight times too large."""
    with tensors(folder) as held:
        held[f"transformer.layers.{layer}.mlp.proj.weights_scaling_factor"] *= 8


def one_group_times_8(folder: Path, layer: int = 1) -> None:
    """A single int4 group with a scale eight times too large."""
    with tensors(folder) as held:
        held[f"transformer.layers.{layer}.mlp.proj.weights_scaling_factor"][5, 0] *= 8


def swap_nibbles(folder: Path, layer: int = 1) -> None:
    """One layer's int4 mlp.proj with the two rows of each byte exchanged."""
    with tensors(folder) as held:
        name = f"transformer.layers.{layer}.mlp.proj.weight"
        held[name] = (held[name] << 4) | ((held[name] >> 4) & 15)


def activation_scale_quarter(folder: Path) -> None:
    """All activation scales a quarter of what was calibrated."""
    _change(folder, "activation_scaling_factor", lambda scale: scale / 4)


def activation_scales_one(folder: Path) -> None:
    """All activation scales 1, as if nobody had calibrated."""
    _change(folder, "activation_scaling_factor", torch.ones_like)


def kv_scale_times_8(folder: Path, layer: int = 1) -> None:
    """The cache scales of one layer eight times too large."""
    with tensors(folder) as held:
        for which in ("kv", "k", "v"):
            held[f"transformer.layers.{layer}.attention.{which}_cache_scaling_factor"] *= 8


def kv_scale_one(folder: Path) -> None:
    """All cache scales 1."""
    _change(folder, "cache_scaling_factor", torch.ones_like)


def negative_scale(folder: Path, layer: int = 1) -> None:
    """One activation scale below zero."""
    with tensors(folder) as held:
        held[f"transformer.layers.{layer}.mlp.proj.activation_scaling_factor"] *= -1


def no_activation_scale(folder: Path, layer: int = 1) -> None:
    """One layer without the scale of its inputs."""
    with tensors(folder) as held:
        del held[f"transformer.layers.{layer}.mlp.proj.activation_scaling_factor"]


# --- beside an engine ---------------------------------------------------------------------------------------------


def wrong_tokenizer(engine_folder: Path) -> None:
    """A tokenizer.json of the same size whose letters e and t have changed places."""
    path = engine_folder / "tokenizer.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = found["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(found), encoding="utf-8")


def _change(folder: Path, ending: str, how: Callable[[Tensor], Tensor]) -> None:
    with tensors(folder) as held:
        held |= {name: how(tensor) for name, tensor in held.items() if name.endswith(ending)}


def _is_packed(held: Tensors, module: str) -> bool:
    """Whether it is int4: two rows to a byte, and a scale for each group."""
    scale = held.get(f"{module}.weights_scaling_factor")
    return scale is not None and scale.dim() == 2


def _order_rows(held: Tensors, module: str, order: Tensor) -> None:
    """Rows of a linear layer in another order, their scales with them. Int4 moves two rows at a time."""
    packed = _is_packed(held, module)
    for name in (f"{module}.weight", f"{module}.weights_scaling_factor"):
        tensor = held.get(name)
        if tensor is None or tensor.numel() == 1:
            continue
        rows = order[::2] // 2 if packed and tensor.dtype == torch.int8 else order
        held[name] = tensor.view(torch.uint8).view(len(tensor), -1)[rows].view(tensor.dtype).view(tensor.shape)
