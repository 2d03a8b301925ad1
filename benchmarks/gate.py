"""What does the gate find? Good engines of one model and spoilt ones, each measured and judged; a table in Markdown.

    RECIPES_WORKSPACE=WORKSPACE python benchmarks/gate.py FOLDER [--only fp8] [--json FILE]

FOLDER is a Hugging Face folder. Each precision is built by the product (what is in the workspace is used again), then
its checkpoint is copied, spoilt by one function of tests/sabotage.py, compiled and judged with the registry's limits.
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

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import judged
import sabotage
from engine_recipes import RequestError

SIZES = {"window": 512, "max_tokens": 48}
#: Of every 16-bit checkpoint.
PLAIN = ("rope_base", "norm_epsilon", "swap_qk", "permute_layer", "swap_fc_gate", "drop_last_layer", "norms_one")
#: What is built: precision, `--set` options, and which sabotages are made of it.
BUILDS: dict[str, tuple[str, dict[str, str], tuple[str, ...]]] = {
    "fp16": ("fp16", {}, (*PLAIN, "head_4_bits", "nan_in_one", "wrong_tokenizer")),
    "bf16": ("bf16", {}, ()),
    "int8-wo": ("int8-wo", {}, ()),
    "fp8": ("fp8", {}, ("scale_times_8", "activation_scale_quarter", "swap_fc_gate", "permute_layer", "head_int8")),
    "fp8 + FP8 KV": ("fp8", {"kv_cache": "fp8"}, ("kv_scale_times_8",)),
    "int4-awq": ("int4-awq", {}, ("swap_nibbles", "one_group_times_8", "scale_times_8", "swap_qk")),
    "int4-awq + INT8 KV": ("int4-awq", {"kv_cache": "int8"}, ("kv_scale_times_8", "kv_scale_one")),
    "int4-wo": ("int4-wo", {}, ()),
}
SHOWN = ("weight_error", "weight_rounding", "mean_kl", "perplexity_ratio", "top1_agreement", "confident_flips")
SHOWN += ("questions", "repetition")


def main() -> None:
    """Parse arguments, build, spoil, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", action="append", choices=BUILDS)
    parser.add_argument("--json", type=Path, help="write everything that was found here")
    arguments = parser.parse_args()
    found = []
    print(f"| engine | verdict | {' | '.join(SHOWN)} | rejected by |")
    print("|---" * (len(SHOWN) + 3) + "|")
    for name in arguments.only or BUILDS:
        precision, settings, spoils = BUILDS[name]
        build = built(arguments.folder, precision, settings)
        for spoil in ("", *spoils):
            found.append(row(name, build, spoil))
            print(line(found[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def built(folder: Path, precision: str, settings: dict[str, str]) -> dict[str, Any]:
    """The product's own build, judged or not."""
    words = [
        f"{folder}:{precision}",
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
    ]
    command = [sys.executable, "-c", "from engine_recipes.cli import main; main()", "build", *words, "--json", "-q"]
    done = subprocess.run([*command, "--until", "baseline"], stdout=subprocess.PIPE, text=True, check=True)
    build: dict[str, Any] = json.loads(done.stdout)["builds"][0]
    return build


def row(name: str, build: dict[str, Any], spoil: str) -> dict[str, Any]:
    """One engine, judged. Seconds include compiling it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        made = judged.from_build(Path(work, "made"), build, SIZES)
        changes = getattr(sabotage, spoil) if spoil else None
        where = "spoil_engine" if spoil == "wrong_tokenizer" else "spoil"
        try:
            report = judged.judge(made, Path(work, "bad"), **{where: changes})
        except RequestError as error:
            return {"engine": name, "spoil": spoil, "verdict": "refused", "failed": [error.message], "metrics": {}}
    return {
        "engine": name,
        "spoil": spoil,
        "verdict": report.verdict,
        "failed": sorted(report.failed),
        "warned": sorted(check.name for check in report.checks if check.verdict == "warn"),
        "metrics": dict(report.metrics),
        "seconds": time.perf_counter() - start,
    }


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    title = f"{found['engine']}, {found['spoil'].replace('_', ' ')}" if found["spoil"] else f"**{found['engine']}**"
    cells = [f"{found['metrics'][key]:.3g}" if key in found["metrics"] else "-" for key in SHOWN]
    why = ", ".join(found["failed"]) or ("warns: " + ", ".join(found["warned"]) if found.get("warned") else "")
    return f"| {title} | {found['verdict']} | {' | '.join(cells)} | {why} |"


if __name__ == "__main__":
    main()
