"""CPU seconds of the commands people wait for most often: `--help`, `list`, and a build with nothing to do.

    python benchmarks/startup.py [--rounds 9] [--ref smollm2-135m:fp16]

Each command runs as a process of its own, in turn with a bare `python -c pass`, so that the ratio holds on a busy
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

GOALS = {"--help": 0.10, "list": 0.20, "build": 0.30}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure and print one line a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ref", default="smollm2-135m:fp16")
    options = parser.parse_args()
    recipes = shutil.which("recipes", path=os.path.dirname(sys.executable)) or "recipes"
    commands = {
        "--help": [recipes, "--help"],
        "list": [recipes, "list"],
        "build": [recipes, "build", options.ref, "-q"],
    }
    bare = [sys.executable, "-c", "pass"]
    seconds: dict[str, list[float]] = {name: [] for name in ["bare", *commands]}
    for name, command in commands.items():
        cpu_seconds(command)  # warm the page cache and the bytecode
        seconds[name].clear()
    for _ in range(options.rounds):
        seconds["bare"].append(cpu_seconds(bare))
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(command))
    floor = statistics.median(seconds["bare"])
    print(f"{'command':<14} {'median':>7} {'min':>7} {'max':>7} {'goal':>6}  times `python -c pass`")
    for name, values in seconds.items():
        median = statistics.median(values)
        goal = f"{GOALS[name]:.2f}" if name in GOALS else "-"
        print(f"{name:<14} {median:7.3f} {min(values):7.3f} {max(values):7.3f} {goal:>6}  {median / floor:.1f}")


if __name__ == "__main__":
    main()
