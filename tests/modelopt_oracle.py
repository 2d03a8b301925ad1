"""NVIDIA ModelOpt's own quantization and TensorRT-LLM export of a Hugging Face folder: what ours must agree with.

model = calibrated(hf, "int4_awq", group_size=64)
checkpoint.write_statistics(folder, statistics(model), {"method": "awq", ...})
legacy_export(model, out, tp=2)  # rank0.safetensors, rank1.safetensors, config.json
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Model = torch.nn.Module

#: What `export_tensorrt_llm_checkpoint` calls the decoder, by `model_type`.
DECODERS = {"llama": "llama", "qwen2": "qwen", "qwen3": "qwen", "gemma": "gemma"}
_ROWS, _LENGTH, _SEED = 4, 24, 7


def token_rows(vocab_size: int, rows: int = _ROWS, length: int = _LENGTH) -> torch.Tensor:
    """The seeded tokens to calibrate with, int64 [rows, length]."""
    return torch.from_numpy(np.random.RandomState(_SEED).randint(0, vocab_size, (rows, length), np.int64))


def load(hf: Path, dtype: str = "float32") -> Model:
    """The Hugging Face folder as transformers loads it, weights cast to `dtype`."""
    from transformers import AutoModelForCausalLM

    model: Model = AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, dtype))
    return model.eval()


def calibrated(
    hf: Path,
    method: Literal["fp8", "int4_awq"],
    kv: Literal["fp8", "int8"] | None = None,
    group_size: int = 64,
    dtype: str = "float32",
    tokens: torch.Tensor | None = None,
) -> Model:
    """Quantize a Hugging Face folder with ModelOpt's preset.

    Args:
        hf: config.json and safetensors.
        method: FP8 per tensor, or 4-bit weights in groups with the AWQ search.
        kv: what the KV cache holds.
        group_size: of int4_awq; divides every linear's inputs.
        dtype: that the model computes in, `float32` or `bfloat16`.
        tokens: int64 [rows, length] to calibrate with; seeded random ones unless given.

    Returns:
        the model with its quantizers. The search's record stays on each linear as `awq_lite`. int4_awq has multiplied
        the weights by 1/pre_quant_scale: take those of the folder.
    """
    model = load(hf, dtype)
    config: Any = model.config
    rows = token_rows(config.vocab_size) if tokens is None else tokens

    def forward(module: Model) -> None:
        with torch.no_grad():
            module(input_ids=rows, use_cache=False)

    with _quiet():
        import modelopt.torch.quantization as mtq

        quantized: Model = mtq.quantize(model, _config(method, kv, group_size), forward)
    return quantized


def _config(method: str, kv: str | None, group_size: int) -> dict[str, Any]:
    """ModelOpt's preset, with this group size and KV cache."""
    import modelopt.torch.quantization as mtq

    config: dict[str, Any] = copy.deepcopy(mtq.FP8_DEFAULT_CFG if method == "fp8" else mtq.INT4_AWQ_CFG)
    if method == "int4_awq":
        config["algorithm"] = {"method": "awq_lite", "alpha_step": 0.1, "debug": True}
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"] == "*weight_quantizer" and entry.get("cfg"):
                entry["cfg"]["block_sizes"][-1] = group_size
    if kv is not None:
        entries = copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
        for entry in entries:
            if kv == "int8" and entry.get("cfg"):
                entry["cfg"]["num_bits"] = 8
        config = mtq.update_quant_cfg_with_kv_cache_quant(config, entries)
    return config


def statistics(model: Model) -> dict[str, Array]:
    """What calibration found, by the names of `checkpoint.write_statistics`, float32.

    A linear's `pre_quant_scale` is the searched one, before it is rounded to the model's dtype and before the export
    merges q, k and v.
    """
    found: dict[str, Array] = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if quantizer is not None and quantizer.is_enabled and quantizer.amax is not None:
            found[f"{name}.input_amax"] = _vector(quantizer.amax)
        search = getattr(module, "awq_lite", None)
        if search is not None:
            found[f"{name}.pre_quant_scale"] = _vector(1.0 / search.best_scale)
        for letter in "kv":
            cache = getattr(module, f"{letter}_bmm_quantizer", None)
            if cache is not None and cache.is_enabled:
                found[f"{name}.{letter}_proj.cache_amax"] = _vector(cache.amax)
    return found


def _vector(tensor: torch.Tensor) -> Array:
    return tensor.detach().float().reshape(-1).numpy()


def searches(model: Model) -> dict[str, Any]:
    """Linear -> ModelOpt's record of its AWQ search: `best_alpha`, `loss` by alpha, `act_scale`, `weight_scale`."""
    return {name: module.awq_lite for name, module in model.named_modules() if hasattr(module, "awq_lite")}


def inputs(hf: Path, tokens: torch.Tensor, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Linear of the decoder's layers -> what goes into it, float32 [tokens, in]."""
    model = load(hf, dtype)
    seen: dict[str, torch.Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(module: Model, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = arguments[0].detach().float().reshape(-1, arguments[0].shape[-1])

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(remember(name))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


def legacy_export(model: Model, folder: Path, tp: int = 1, pp: int = 1, dtype: str = "bfloat16") -> Path:
    """ModelOpt's TensorRT-LLM checkpoint of a calibrated model: `config.json` and `rank*.safetensors` in `folder`.

    Args:
        model: from `calibrated`; left as it is.
        folder: made if needed.
        tp: tensor parallel size.
        pp: pipeline parallel size.
        dtype: of what is not quantized, `float16` or `bfloat16`.
    """
    model = copy.deepcopy(model)  # the export merges scales inside the model
    config: Any = model.config
    with _quiet():
        from modelopt.torch.export import export_tensorrt_llm_checkpoint

        export_tensorrt_llm_checkpoint(model, DECODERS[config.model_type], getattr(torch, dtype), folder, tp, pp)
    return folder


def read_export(folder: Path) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """config.json, and each rank's tensors."""
    from safetensors.torch import load_file

    count = len(list(folder.glob("rank*.safetensors")))
    ranks = [load_file(folder / f"rank{rank}.safetensors") for rank in range(count)]
    return json.loads((folder / "config.json").read_text()), ranks


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints, and warns: when it is imported, of transformers it was not tested with."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
