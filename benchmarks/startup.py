"""CPU seconds of the commands people wait for most often: `--help`, `list`, and a build with nothing to do.

    python benchmarks/startup.py [--rounds 9] [--ref smollm2-135m:fp16] [--plugins 30]

`list+30` is `list` with thirty generated packages installed: 22 families with a model each, 3 precisions, 2 engines and
3 that only add models, which makes five times as many rows. Each command runs as a process of its own, in turn with a
bare `python -c pass`, so that the ratio holds on a busy
machine. The reference must have been built already.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

GOALS = {"--help": 0.10, "list": 0.20, "list+30": 0.20, "build": 0.30}
MODEL = """
[models."f{i}-1b"]
family = "{family}"
source = "hf:acme/F{i}-1B"
parameters = 1_000_000_000
"""
FAMILY = """
[families.f{i}]
module = "engine_recipes_p{i}.family"
architectures = ["F{i}ForCausalLM"]
"""
PRECISION = """
[precisions.p{i}]
module = "engine_recipes_p{i}.precision"
requires = ["numpy>=1.26"]
bits = 8
algorithm = "FP8"
[precisions.p{i}.options]
group_size = {{ default = 128, choices = [64, 128], help = "weights that share a scale" }}
"""
ENGINE = """
[engines.e{i}]
module = "engine_recipes_p{i}.engine"
takes = ["trtllm-checkpoint"]
gives = "e{i}-engine"
targets = ["cpu"]
requires = ["numpy>=1.26"]
algorithms = {{ cpu = [] }}
"""


def write_packages(folder: Path, count: int) -> None:
    """Third-party packages as pip leaves them. Importing one of them is an error."""
    for i in range(count):
        kind = {7: PRECISION, 8: ENGINE, 9: MODEL}.get(i % 10 if i != 8 else 0, FAMILY + MODEL)
        module = folder / f"engine_recipes_p{i}"
        module.mkdir()
        (module / "__init__.py").write_text("raise RuntimeError('listing imports no plugin')\n")
        text = kind.format(i=i, family=f"f{i}" if FAMILY in kind else "llama")
        (module / "registry.toml").write_text(f"api = 1\n{text}")
        info = folder / f"engine_recipes_p{i}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: engine-recipes-p{i}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[engine_recipes]\np{i} = engine_recipes_p{i}\n")


def cpu_seconds(command: list[str], environment: Mapping[str, str]) -> float:
    """User and system time of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False, env=environment
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ref", default="smollm2-135m:fp16")
    parser.add_argument("--plugins", type=int, default=30)
    options = parser.parse_args()
    recipes = shutil.which("recipes", path=os.path.dirname(sys.executable)) or "recipes"
    with tempfile.TemporaryDirectory() as folder:
        write_packages(Path(folder), options.plugins)
        # bytecode is kept, as it is after a first command on any machine
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        commands = {
            "bare": ([sys.executable, "-c", "pass"], plain),
            "--help": ([recipes, "--help"], plain),
            "list": ([recipes, "list"], plain),
            f"list+{options.plugins}": ([recipes, "list"], {**plain, "PYTHONPATH": folder}),
            "build": ([recipes, "build", options.ref, "-q"], plain),
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for command, environment in commands.values():
            cpu_seconds(command, environment)  # warm the page cache and the bytecode
        for _ in range(options.rounds):
            for name, (command, environment) in commands.items():
                seconds[name].append(cpu_seconds(command, environment))
    floor = statistics.median(seconds["bare"])
    print(f"{'command':<14} {'median':>7} {'min':>7} {'max':>7} {'goal':>6}  times `python -c pass`")
    for name, values in seconds.items():
        median = statistics.median(values)
        goal = f"{GOALS[name]:.2f}" if name in GOALS else "-"
        print(f"{name:<14} {median:7.3f} {min(values):7.3f} {max(values):7.3f} {goal:>6}  {median / floor:.1f}")


if __name__ == "__main__":
    main()
