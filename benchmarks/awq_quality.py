"""Are the scales of our closed-form AWQ search as good as those of ModelOpt's, which forwards the text eleven times?

    recipes build FOLDER:int4-awq --until stage1 --set calib.size=32 --set calib.seq_len=128
    python benchmarks/awq_quality.py FOLDER CHECKPOINT --rows 32 --seq-len 128 --tokens 8192

FOLDER is the Hugging Face folder, CHECKPOINT what the build left. Perplexities on held-out text, all in transformers
and bfloat16, with weights as they come back from 4 bits: ours; ModelOpt's model while q, k and v still have scales of
their own; and what ModelOpt's TensorRT-LLM export stores, where they share one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import quantize
import torch
import transformers

from engine_recipes import checkpoint
from engine_recipes.checkpoint.blocks import unpack_rows

ROLES = {"attention.qkv": "qkv", "attention.dense": ("dense",), "mlp.fc": ("gate",), "mlp.gate": ("up",)}
ROLES |= {"mlp.proj": ("down",)}


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    ids = quantize.held_out(arguments, arguments.folder)

    def perplexity(model: Any) -> float:
        with torch.no_grad():
            return quantize.perplexity(ids, lambda part: model(torch.tensor([part])).logits[0])

    print(f"source                       {perplexity(load(arguments.folder)):.4f}")
    print(
        f"ours                         {perplexity(restored(arguments.folder, arguments.checkpoint)):.4f}", flush=True
    )
    model = load(arguments.folder)
    rows = torch.tensor(quantize.read(arguments.folder, arguments.rows, arguments.seq_len))
    start = time.perf_counter()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        quantize.quantize(model, "int4-awq", lambda module: module.base_model(input_ids=rows, use_cache=False))
    print(f"ModelOpt, in transformers    {perplexity(model):.4f} ({time.perf_counter() - start:.0f} s to quantise)")
    with tempfile.TemporaryDirectory() as work:
        exported = export(model, Path(work), arguments.checkpoint)
        print(f"ModelOpt, exported           {perplexity(restored(arguments.folder, exported)):.4f}")


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def export(model: Any, out: Path, ours: Path) -> Path:
    """ModelOpt's TensorRT-LLM checkpoint, with the rope settings that it leaves out taken from ours."""
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    decoder = {"llama": "llama", "qwen2": "qwen", "qwen3": "qwen"}[model.config.model_type]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        export_tensorrt_llm_checkpoint(model, decoder, torch.float16, out)
    theirs = json.loads((out / "config.json").read_text())["quantization"]
    config = json.loads((ours / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization": {**config["quantization"], **theirs}}))
    return out


def restored(folder: Path, quantised: Path) -> Any:
    """The model with the weights that a W4A16_AWQ checkpoint stands for: value × scale × pre-quant scale."""
    model = load(folder)
    parameters = dict(model.named_parameters())
    with checkpoint.open_checkpoint(quantised) as weights:
        d = weights.decoder
        rows = [d.heads * d.head_size, (d.heads + d.kv_heads) * d.head_size]
        for layer in range(d.layers):
            for name, roles in ROLES.items():
                at = f"transformer.layers.{layer}.{name}."
                values = unpack_rows(weights.array(at + "weight")).astype(np.float32)
                scales = weights.array(at + "weights_scaling_factor")
                values *= np.repeat(scales, values.shape[1] // scales.shape[1], axis=1)
                values *= weights.array(at + "prequant_scaling_factor").astype(np.float32)
                parts = np.split(values, rows) if len(roles) == 3 else [values]
                for role, part in zip(roles, parts, strict=True):
                    parameter = parameters[d.names[role].format(layer) + ".weight"]
                    parameter.data.copy_(torch.from_numpy(part))
    return model


if __name__ == "__main__":
    main()
