"""Quantised TensorRT-LLM checkpoints for tests, and what transformers computes with the same weights and rounding.

Written in torch from the format's description; nothing of the code under test is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: TensorRT-LLM's linear layers and, stacked along the rows, what they are in Hugging Face's names.
LINEARS = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
Ranges = dict[str, float]
SQ = "W8A8_SQ_PER_CHANNEL"


def load(hf: Path) -> Any:
    """The source model, float32."""
    return AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()


def logits(model: Any, ids: list[int]) -> Any:
    """numpy float32 [len(ids), vocabulary]"""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def calibrate(model: Any, ids: list[int]) -> Ranges:
    """Largest magnitude into each linear layer, and of its keys (after rope) and values: `transformer.layers.0.…`."""
    found: Ranges = {}

    def see(name: str, x: Tensor) -> Tensor:
        found[name] = max(found.get(name, 0.0), float(x.abs().max()))
        return x

    change(model, lambda name: partial(see, name))
    logits(model, ids)
    return found


def change(model: Any, of: Callable[[str], Callable[[Tensor], Tensor] | None]) -> None:
    """Let functions replace what goes into linear layers (`…attention.qkv`) and the cache (`…attention.k`, `.v`)."""
    for number, layer in enumerate(model.model.layers):
        for name, parts in LINEARS.items():
            function = of(f"transformer.layers.{number}.{name}")
            for part in parts if function else ():
                layer.get_submodule(part).register_forward_pre_hook(lambda _, inputs, f=function: (f(inputs[0]),))

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        at = f"transformer.layers.{module.layer_idx}.attention."
        key, value = (f(x) if f else x for f, x in ((of(at + "k"), key), (of(at + "v"), value)))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register("changed", attention)
    model.set_attn_implementation("changed")


def quantise(
    folder: Path,
    ranges: Ranges,
    algorithm: str | None = None,
    cache: str | None = None,
    group: int = 32,
    excluded: Collection[str] = (),
) -> None:
    """Rewrite an unsplit checkpoint in place.

    Args:
        folder: with config.json and rank0.safetensors.
        ranges: from `calibrate`.
        algorithm: FP8, W4A16_AWQ or W8A8_SQ_PER_CHANNEL; of another, only the name is written.
        cache: FP8 or INT8.
        group: of AWQ.
        excluded: linear layers that stay as they are, `transformer.layers.0.mlp.proj`.
    """
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] |= {"quant_algo": algorithm, "kv_cache_quant_algo": cache, "group_size": group}
    if excluded:
        config["quantization"]["exclude_modules"] = ["lm_head", *excluded]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "rank0.safetensors")
    for number in range(config["num_hidden_layers"]):
        at = f"transformer.layers.{number}."
        for name in LINEARS:
            make = {"FP8": _fp8, "W4A16_AWQ": partial(_awq, group=group), SQ: _smoothquant}.get(algorithm or "")
            if make and at + name not in excluded:
                tensors |= {
                    f"{at}{name}.{key}": t for key, t in make(tensors[f"{at}{name}.weight"], ranges[at + name]).items()
                }
        if cache:
            most = {"FP8": 448, "INT8": 127}[cache]
            scales = {which: torch.tensor([ranges[f"{at}attention.{which}"] / most]) for which in "kv"}
            for which, scale in {**scales, "kv": max(scales.values())}.items():
                tensors[f"{at}attention.{which}_cache_scaling_factor"] = scale.clone()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "rank0.safetensors")


def _fp8(weight: Tensor, range: float) -> dict[str, Tensor]:
    scale = weight.float().abs().max() / 448
    return {
        "weight": e4m3(weight.float() / scale).to(torch.float8_e4m3fn),
        "weights_scaling_factor": scale.reshape(1),
        "activation_scaling_factor": torch.tensor([range / 448]),
    }


def _awq(weight: Tensor, range: float, group: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(weight.shape[1])  # fc and gate get the same
    scaling = (torch.rand(weight.shape[1], generator=generator) + 0.5).to(weight.dtype)
    groups = (weight.float() / scaling.float()).unflatten(1, (-1, group))  # [out, in / group, group]
    scale = groups.abs().amax(2) / 7
    whole = (groups / scale[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)  # [out, in]
    return {
        "weight": (whole[0::2] & 15) | (whole[1::2] << 4),
        "weights_scaling_factor": scale,
        "prequant_scaling_factor": scaling,
    }


def _smoothquant(weight: Tensor, range: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(weight.shape[1])  # fc and gate get the same
    scaling = (torch.rand(weight.shape[1], generator=generator) + 0.5).to(weight.dtype)
    smoothed = weight.float() / scaling.float()
    scale = smoothed.abs().amax(1) / 127  # [out]
    return {
        "weight": (smoothed / scale[:, None]).round().to(torch.int8),
        "weights_scaling_factor": scale,
        "activation_scaling_factor": torch.tensor([range / 127]),
        "prequant_scaling_factor": scaling,
    }


def e4m3(x: Tensor) -> Tensor:
    """To the nearest E4M3 number; beyond 448 to 448."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def int8(x: Tensor) -> Tensor:
    """To the nearest integer an int8 holds."""
    return x.round().clamp(-128, 127)


def reference(hf: Path, folder: Path) -> Any:
    """The source model with the checkpoint's weights, and inputs and cache rounded as its scales say."""
    tensors, config = load_file(folder / "rank0.safetensors"), json.loads((folder / "config.json").read_text())
    algorithm, cache = (config["quantization"][key] for key in ("quant_algo", "kv_cache_quant_algo"))
    model = load(hf)
    for number, layer in enumerate(model.model.layers):
        for name, parts in LINEARS.items():
            weight = dequantised(tensors, f"transformer.layers.{number}.{name}", algorithm)
            modules = [layer.get_submodule(part) for part in parts]
            for module, rows in zip(modules, weight.split([m.out_features for m in modules]), strict=True):
                module.weight.data = rows

    def rounding(name: str) -> Callable[[Tensor], Tensor] | None:
        if name.endswith((".k", ".v")):
            scale = tensors.get(name[:-1] + "kv_cache_scaling_factor")
            grid = e4m3 if cache == "FP8" else int8
            return None if scale is None else lambda x: grid(x / scale) * scale
        scale, factor = (tensors.get(f"{name}.{what}_scaling_factor") for what in ("activation", "prequant"))
        if algorithm == SQ and scale is not None and factor is not None:
            return lambda x: int8(x * factor.float() / scale) * scale
        if factor is not None:
            return lambda x: x * factor.float()
        return None if scale is None else lambda x: e4m3(x / scale) * scale

    change(model, rounding)
    return model


def dequantised(tensors: dict[str, Tensor], name: str, algorithm: str | None) -> Tensor:
    """float32 [out, in]"""
    weight, scale = tensors[f"{name}.weight"], tensors.get(f"{name}.weights_scaling_factor")
    if scale is not None and algorithm == "FP8":
        return weight.float() * scale
    if scale is not None and algorithm == SQ:
        return weight.float() * scale[:, None]
    if scale is not None and algorithm == "W4A16_AWQ":
        low, high = (weight << 4) >> 4, weight >> 4  # arithmetic shifts of int8 keep the sign
        whole = torch.stack([low, high], 1).flatten(0, 1).float()  # [out, in]
        return whole * scale.repeat_interleave(whole.shape[1] // scale.shape[1], 1)
    if algorithm in ("W8A16", "W4A16"):
        half = 128 if algorithm == "W8A16" else 8
        step = weight.float().abs().amax(1, keepdim=True) / half
        away = weight.float() / step
        return (away.sign() * (away.abs() + 0.5).floor()).clamp(-half, half - 1) * step.to(weight.dtype).float()
    return weight.float()
