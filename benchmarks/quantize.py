"""What does quantizing cost? The product's calibration and stage 1 against ModelOpt's own ways and physical limits.

    python benchmarks/quantize.py --shape qwen2.5-7b --rows 1024           # random weights, on a GPU
    python benchmarks/quantize.py --folder CHECKPOINT --rows 32 --seq-len 128 --perplexity

Each contender has a process of its own, on the same rows of text:

    ours       `recipes build FOLDER:PRECISION --until stage1`, by phase
    plain      transformers' forward passes over the same rows, without the head, weights already loaded
    modelopt   `mtq.quantize` with ModelOpt's preset, in batches (--batch) and one row at a time, as TensorRT-LLM's
               quantize.py ran it (on --rows-one rows, because it takes so long; compared by row)
    dd         writing as many bytes as the checkpoint has, to the same disk, synced

With --perplexity the engine (onnxruntime) and ModelOpt's fake-quantised model read the same held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the product's workers do, for everybody

_QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6}
_QWEN |= {"rope_theta": 1e6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16", "use_sliding_window": False}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": _QWEN
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "qwen2.5-0.5b": _QWEN
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}
PRESETS = {"fp8": "FP8_DEFAULT_CFG", "int4-awq": "INT4_AWQ_CFG"}


def main() -> None:
    """Parse arguments, run the contenders in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="make a checkpoint of this shape with random weights")
    parser.add_argument("--folder", type=Path, help="or use this Hugging Face folder")
    parser.add_argument("--precision", action="append", choices=PRESETS, help="repeatable (default: both)")
    parser.add_argument("--rows", type=int, default=128, help="of fp8")
    parser.add_argument("--rows-awq", type=int, default=32, help="of int4-awq, as TensorRT-LLM takes")
    parser.add_argument("--rows-one", type=int, default=64, help="of ModelOpt one row at a time; 0: leave it out")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32, help="of transformers and ModelOpt")
    parser.add_argument("--work", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--tokens", type=int, default=2048, help="of the perplexity")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer(arguments, json.loads(arguments.peer))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        figures = compare(arguments, Path(work))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def compare(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    folder = arguments.folder or work / "source"
    if arguments.shape:
        say("random weights", run(arguments, {"do": "make", "shape": arguments.shape, "folder": str(folder)}))
    figures: dict[str, Any] = {}
    for precision in arguments.precision or PRESETS:
        rows = arguments.rows if precision == "fp8" else arguments.rows_awq
        task = {"folder": str(folder), "precision": precision, "rows": rows, "batch": arguments.batch}
        mine = ours(arguments, work, folder, precision, rows)
        found = {"ours": say(f"{precision}: ours", mine)}
        found["dd"] = say(f"{precision}: dd", dd(work, mine["checkpoint_bytes"]))
        found["plain"] = say(f"{precision}: plain forward", run(arguments, {**task, "do": "plain"}))
        found["modelopt"] = say(f"{precision}: ModelOpt, batches", run(arguments, {**task, "do": "modelopt"}))
        if arguments.rows_one:
            one = {**task, "do": "modelopt", "batch": 1, "rows": min(rows, arguments.rows_one), "whole": True}
            found["one"] = say(f"{precision}: ModelOpt, one row at a time", run(arguments, one))
        figures[precision] = {**found, "ratios": say(f"{precision}: ratios", ratios(found, rows))}
    return figures


def say(what: str, figures: dict[str, Any]) -> dict[str, Any]:
    """Print one line a contender."""
    words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items())
    print(f"{what:<36} {', '.join(words)}")
    sys.stdout.flush()
    return figures


def ratios(found: dict[str, dict[str, Any]], rows: int) -> dict[str, float]:
    """What the goals are about."""
    mine, plain = found["ours"], found["plain"]
    result = {
        "calibrate / plain forward": mine["calibrate_pass"] / plain["seconds"],
        "ModelOpt in batches / ours": found["modelopt"]["seconds"] / mine["calibrate_pass"],
        "stage 1 / dd": mine["stage1"] / found["dd"]["seconds"],
    }
    if "one" in found:
        by_row = found["one"]["seconds"] / found["one"]["rows"] * rows
        result["ModelOpt one row at a time / ours"] = by_row / mine["calibrate_pass"]
    if "perplexity" in mine and "perplexity" in found["modelopt"]:
        result["perplexity, ours / ModelOpt"] = mine["perplexity"] / found["modelopt"]["perplexity"]
    return result


def ours(arguments: argparse.Namespace, work: Path, folder: Path, precision: str, rows: int) -> dict[str, Any]:
    """The product itself, by its own API."""
    from engine_recipes import api
    from engine_recipes.runner import How
    from engine_recipes.store import read_manifest

    settings = {"calib.size": str(rows), "calib.seq_len": str(arguments.seq_len)}
    workspace = work / "workspace"
    start = time.perf_counter()
    how = How(until="stage2" if arguments.perplexity else "stage1", validate=False)
    build = api.build(f"{folder}:{precision}", workspace=workspace, how=how, settings=settings)
    total = time.perf_counter() - start
    stages = {stage.name: stage for stage in build.stages}
    assert stages["calibrate"].path
    about = (read_manifest(stages["calibrate"].path) or {})["result"]
    phases = {name.removesuffix("_seconds"): seconds for name, seconds in about["phases"].items()}
    figures: dict[str, Any] = {
        "total": total - (stages["stage2"].seconds if arguments.perplexity else 0),
        "resolve": stages["resolve"].seconds,
        "calibrate": stages["calibrate"].seconds,
        "calibrate_pass": phases["load"] + phases["forward"] + phases.get("search", 0),
        **{f"- {name}": seconds for name, seconds in phases.items()},
        "stage1": stages["stage1"].seconds,
        "checkpoint_bytes": stages["stage1"].bytes,
        "peak_gpu_bytes": about["peak_gpu_bytes"],
        "peak_rss_bytes": max(stages[name].peak_rss_bytes for name in ("calibrate", "stage1")),
        "batch_size": about["batch_size"],
    }
    if arguments.perplexity:
        loaded = api.load(f"{folder}:{precision}", workspace=workspace, settings=settings)
        figures["perplexity"] = perplexity(held_out(arguments, folder), lambda ids: loaded.runtime.logits(ids))
    shutil.rmtree(workspace / "checkpoints")
    return figures


def dd(work: Path, size: int) -> dict[str, Any]:
    """Write that many bytes of zeros and wait until they are on the disk."""
    path = work / "dd"
    start = time.perf_counter()
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=16M", f"count={max(size >> 24, 1)}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    path.unlink()
    return {"seconds": seconds, "bytes": size}


def run(arguments: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """A peer in a process of its own."""
    task = {**task, "seq_len": arguments.seq_len, "perplexity": arguments.perplexity, "tokens": arguments.tokens}
    command = [sys.executable, __file__, "--peer", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peer(arguments: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """In the child."""
    if task["do"] == "make":
        return make(Path(task["folder"]), SHAPES[task["shape"]])
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(task["folder"])
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map=device).eval()
    load = time.perf_counter() - start
    rows = torch.tensor(read(folder, task["rows"], task["seq_len"])).to(device)

    def forward(module: Any) -> None:
        with torch.no_grad():
            for part in rows.split(task["batch"]):
                (module if task.get("whole") else module.base_model)(input_ids=part, use_cache=False)

    if task["do"] == "modelopt":
        import modelopt.torch.quantization  # not timed  # noqa: F401
    with torch.no_grad():  # nor what happens once in a process
        model.base_model(input_ids=rows[: task["batch"]], use_cache=False)
    wait(device)
    start = time.perf_counter()
    if task["do"] == "plain":
        forward(model)
    else:
        quantize(model, task["precision"], forward)
    wait(device)
    found = {"seconds": time.perf_counter() - start, "load": load, "rows": len(rows)}
    if device == "cuda":
        found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    if task["perplexity"] and not task.get("whole"):
        ids = held_out(argparse.Namespace(**task), folder)
        found["perplexity"] = perplexity(ids, lambda part: model(torch.tensor([part]).to(device)).logits[0])
    return found


def wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def quantize(model: Any, precision: str, forward: Any) -> None:
    """ModelOpt with its preset; its group size is lowered where 128 does not divide, or the export would fail."""
    import copy

    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, PRESETS[precision]))
    sizes = [model.config.hidden_size, model.config.intermediate_size]
    for entry in config["quant_cfg"]:
        blocks = (entry.get("cfg") or {}).get("block_sizes") if isinstance(entry.get("cfg"), dict) else None
        if blocks and any(size % 128 for size in sizes):
            blocks[-1] = 64
    mtq.quantize(model, config, forward)


def read(folder: Path, rows: int, seq_len: int) -> list[list[int]]:
    """The rows the product would take."""
    from engine_recipes import read_texts
    from engine_recipes.calibration import read_rows

    text = read_texts("package:engine_recipes_precisions/calibration.txt.xz")
    return [list(map(int, row)) for row in read_rows(text, folder, rows, seq_len, 1234).ids]


def held_out(arguments: argparse.Namespace, folder: Path) -> list[int]:
    """Tokens of a text that nobody calibrated with: two modules of Python."""
    import pydoc_data

    from engine_recipes import Tokenizer

    here = Path(pydoc_data.__file__).parents[1]
    text = "\n".join((here / name).read_text() for name in ("argparse.py", "typing.py"))
    return Tokenizer.load(folder).encode(text)[: arguments.tokens]


def perplexity(ids: list[int], logits: Any, window: int = 512) -> float:
    """exp of the mean negative log-likelihood of each token but the first of a window."""
    import numpy as np

    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        scores = logits(part)
        scores = np.asarray(scores.detach().float().cpu() if hasattr(scores, "detach") else scores, np.float64)[:-1]
        scores -= scores.max(axis=1, keepdims=True)
        total -= (scores[np.arange(len(part) - 1), part[1:]] - np.log(np.exp(scores).sum(axis=1))).sum()
        count += len(part) - 1
    return math.exp(total / count)


def make(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with random weights in shards of a layer each, made on the GPU if there is one."""
    import torch
    from safetensors.torch import save_file

    from engine_recipes import checkpoint, testing
    from engine_recipes_models import qwen

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    testing.write_tokenizer(folder)
    shapes = checkpoint.source_shapes(qwen.resolve_checkpoint(config))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(name.split(".")[2] if ".layers." in name else "rest", []).append(name)
    weight_map = {}
    for number, names in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        tensors = {}
        for name in names:
            random = torch.randn(shapes[name], dtype=torch.bfloat16, device=device)
            tensors[name] = (1 + 0.1 * random if "norm" in name else 0.02 * random).cpu()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {"parameters": sum(math.prod(shape) for shape in shapes.values())}


if __name__ == "__main__":
    main()
