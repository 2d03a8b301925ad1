"""What does compiling for TensorRT-RTX cost, and how large is the engine? Needs no GPU.

    recipes build smollm2-135m:fp8 --until stage1            # and others; prints where the checkpoint lies
    python benchmarks/rtx.py CHECKPOINT … --random 1.1e9

Compiles each checkpoint, and a random float16 Llama of that many parameters, in a process of its own. Prints seconds;
bytes of the engine against those of the quantised weights (a tied head counted once) and against the checkpoint's
files; and the process's peak resident set (VmHWM, so with Python and the library's 230 MB) against the weights.
Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse arguments, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT", help="a TensorRT-LLM checkpoint")
    parser.add_argument("--random", type=float, help="also a random Llama with that many parameters")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--max-seq-len", type=int, default=0, help="0: the engine's default")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--child", nargs=2, metavar=("CHECKPOINT", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(compile_once(*map(Path, arguments.child), arguments.target, arguments.max_seq_len)))
        return
    heads = ("checkpoint", "layers", "seconds", "engine MB", "/ weights", "/ files", "peak MB", "/ weights")
    print(("{:<40}" + "{:>11}" * 7).format(*heads))
    for folder in arguments.checkpoints:
        report(folder, arguments)
    if arguments.random:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
            report(make_random(Path(work), int(arguments.random)), arguments)


def make_random(work: Path, parameters: int) -> Path:
    """A float16 checkpoint of random weights."""
    from convert import make_source

    from engine_recipes import checkpoint

    source, out = work / "source", work / f"random-{parameters / 1e9:g}e9-fp16"
    make_source(source, parameters)
    out.mkdir()
    with checkpoint.open_source(source) as opened:
        checkpoint.convert(opened, out, "float16", 1, 1)
    tell_apart(out / "rank0.safetensors")
    return out


def tell_apart(file: Path) -> None:
    """Give each tensor a start of its own: they are cut from one pool, and the library stores equal ones once."""
    import numpy as np

    size = int.from_bytes(file.open("rb").read(8), "little")
    header = json.loads(file.open("rb").read(8 + size)[8:])
    data = np.memmap(file, np.uint8, "r+", 8 + size)
    for number, tensor in enumerate(entry for name, entry in header.items() if name != "__metadata__"):
        start = tensor["data_offsets"][0]
        data[start : start + 16] = np.full(8, 0.01 + 1e-4 * number, np.float16).view(np.uint8)
    data.flush()


def report(folder: Path, arguments: argparse.Namespace) -> None:
    """Compile in a child and print one line."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as out:
        options = ["--target", arguments.target, "--max-seq-len", str(arguments.max_seq_len)]
        command = [sys.executable, __file__, *options, "--child", str(folder), out]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    engine, weights, peak = found["engine"], found["weights"], found["peak"]
    files = sum(path.stat().st_size for path in folder.glob("rank*.safetensors"))
    sizes = f"{engine / 1e6:>11.1f}{engine / weights:>11.3f}{engine / files:>11.3f}"
    memory = f"{peak / 1e6:>11.0f}{peak / weights:>11.2f}"
    print(f"{folder.name:<40}{found['layers']:>11}{found['seconds']:>11.1f}{sizes}{memory}", flush=True)


def compile_once(folder: Path, out: Path, target: str, max_seq_len: int) -> dict[str, Any]:
    """Stage 2, in this process."""
    from engine_recipes import Artifact, StageContext
    from engine_recipes_engines import tensorrt_rtx

    inputs = (Artifact("trtllm-checkpoint", folder, "0" * 64),)
    options = {"max_seq_len": max_seq_len, "max_batch_size": 1}
    start = time.perf_counter()
    tensorrt_rtx.stage2(StageContext("m:p@tensorrt-rtx", "stage2", options, inputs, out, target))
    seconds = time.perf_counter() - start
    settings = json.loads((out / "rtx.json").read_text())
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        "seconds": seconds,
        "layers": settings["layers"],
        "engine": (out / "model.engine").stat().st_size,
        "weights": sum(settings["weights"].values()),
        "peak": next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")),
    }


if __name__ == "__main__":
    main()
