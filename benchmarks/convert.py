"""How fast is stage 1, and how much memory does it take, against `cp` of the same bytes?

    python benchmarks/convert.py --parameters 1.1e9 --rounds 5

Makes a random Llama-shaped bfloat16 checkpoint of that size, then times in turn, several rounds in one run: `cp` of
its weights to a fresh folder, and our conversion to each dtype in a child process. Memory is the child's peak
resident set (VmHWM) minus that of a child that only imports. CPU seconds are of all threads, and tell what a busy
machine hides. Needs twice the checkpoint's size of free disk and Linux. Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from engine_recipes import Decoder, checkpoint
from engine_recipes.checkpoint import safetensors
from engine_recipes_models import llama

SHARD_BYTES = 1 << 30
POOL_BYTES = 64 << 20


def main() -> None:
    """Parse arguments, make the checkpoint, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1.1e9, help="size of the model (default 1.1e9)")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"), help="repeatable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--child", nargs=3, metavar=("SOURCE", "OUT", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        source, out, dtype = arguments.child
        convert_once(source, out, dtype, arguments.tp_size)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        folder = Path(work) / "source"
        size = make_source(folder, int(arguments.parameters))
        dtypes = arguments.dtype or ["bfloat16", "float16"]
        report(size, measure(folder, Path(work) / "out", dtypes, arguments.rounds, arguments.tp_size))


def config_of(parameters: int) -> dict[str, Any]:
    """A Llama config with about that many parameters: TinyLlama's widths below 2e9, wider above."""
    hidden, inner, heads, kv_heads = (2048, 5632, 32, 4) if parameters < 2e9 else (3072, 8192, 24, 8)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    }
    one = llama.resolve_checkpoint(config).parameters
    layer = llama.resolve_checkpoint({**config, "num_hidden_layers": 2}).parameters - one
    return {**config, "num_hidden_layers": max(round((parameters - one) / layer) + 1, 1)}


def make_source(folder: Path, parameters: int) -> int:
    """Write the checkpoint in shards of about 1 GiB, as the resolve stage leaves it. Returns its bytes."""
    import ml_dtypes

    folder.mkdir()
    config = config_of(parameters)
    decoder: Decoder = llama.resolve_checkpoint(config)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "source.json").write_text(json.dumps({"folder": "."}))
    decoder.write(folder / "decoder.json")
    random = np.random.default_rng(0).standard_normal(POOL_BYTES // 2, dtype=np.float32) * np.float32(0.02)
    pool = random.astype(ml_dtypes.bfloat16).view(np.uint8)

    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, shape in checkpoint.source_shapes(decoder).items():
        nbytes = int(np.prod(shape)) * 2
        if filled and filled + nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = ("bfloat16", shape)
        filled += nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        data = (pieces(pool, int(np.prod(shape)) * 2) for _, shape in tensors.values())
        for _ in safetensors.write(folder / file, tensors, data):
            pass
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    print(f"{decoder.parameters / 1e9:.2f}e9 parameters, {decoder.layers} layers, {len(shards)} shards")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def pieces(pool: np.ndarray[Any, np.dtype[np.uint8]], nbytes: int) -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    """`nbytes` from the pool, over and over."""
    while nbytes > 0:
        yield pool[: min(nbytes, pool.size)]
        nbytes -= pool.size


def convert_once(source: str, out: str, dtype: str, tp_size: int) -> None:
    """In the child: convert (or only import, if OUT is `-`) and print seconds and peak resident bytes as JSON."""
    import ml_dtypes  # noqa: F401

    seconds = cpu = 0.0
    if out != "-":
        start, cpu_start = time.perf_counter(), time.process_time()
        with checkpoint.open_source(Path(source)) as opened:
            checkpoint.convert(opened, Path(out), dtype, tp_size=tp_size)  # type: ignore[arg-type]
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak}))


def child(source: Path, out: str, dtype: str, tp_size: int) -> dict[str, float]:
    """Run `convert_once` in a new interpreter; adds the seconds of the whole process."""
    command = [sys.executable, __file__, "--child", str(source), out, dtype, "--tp-size", str(tp_size)]
    start = time.perf_counter()
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {**result, "process": time.perf_counter() - start}


def measure(source: Path, out: Path, dtypes: list[str], rounds: int, tp_size: int) -> dict[str, list[dict[str, float]]]:
    """Label -> one measurement a round. The first round only warms the page cache and is dropped."""
    bare = child(source, "-", dtypes[0], tp_size)["peak"]
    results: dict[str, list[dict[str, float]]] = {"cp": [], **{dtype: [] for dtype in dtypes}}
    for number in range(rounds + 1):
        for label, kept in results.items():
            out.mkdir()
            os.sync()  # nobody pays for writing back what another wrote
            if label == "cp":
                start, cpu_start = time.perf_counter(), children_cpu()
                subprocess.run(["cp", *map(str, source.glob("*.safetensors")), str(out)], check=True)
                seconds = time.perf_counter() - start
                result = {"seconds": seconds, "process": seconds, "cpu": children_cpu() - cpu_start, "peak": bare}
            else:
                result = child(source, str(out), label, tp_size)
            if number:
                kept.append({**result, "peak": result["peak"] - bare})
            shutil.rmtree(out)
    return results


def children_cpu() -> float:
    """User and system seconds of all children so far."""
    times = os.times()
    return times.children_user + times.children_system


def report(size: int, results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians, and the median over rounds of each conversion's time divided by cp's of the same round."""
    print(f"{size / 1e9:.2f} GB bfloat16, {len(results['cp'])} rounds, medians")
    print(f"{'':10} {'seconds':>8} {'best':>8} {'CPU':>6} {'x cp':>6} {'x cp with start':>16} {'peak MB':>8}")
    for label, rows in results.items():
        pairs = list(zip(rows, results["cp"], strict=True))
        seconds = [row["seconds"] for row in rows]
        ratio = statistics.median(row["seconds"] / cp["seconds"] for row, cp in pairs)
        whole = statistics.median(row["process"] / cp["seconds"] for row, cp in pairs)
        cpu = statistics.median(row["cpu"] for row in rows)
        peak = max(row["peak"] for row in rows) / 1e6
        median, best = statistics.median(seconds), min(seconds)
        print(f"{label:10} {median:8.2f} {best:8.2f} {cpu:6.2f} {ratio:6.2f} {whole:16.2f} {peak:8.0f}")


if __name__ == "__main__":
    main()
