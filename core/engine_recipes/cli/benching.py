"""`bench`: speed and memory of built engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from .. import bench, gate
from ..api import Setup
from ..bench import Settings
from ..errors import RecipesError, RequestError
from ..planning import Plan
from ..space import human_bytes
from . import report
from .building import title
from .common import F, complete_ref, json_option, print_json, print_table, quiet_option, recipe_options
from .progress import Lines, reporter

#: Interquartile range over median from which a number is called unsteady.
_UNSTEADY = 0.1
_NAMES = {
    "load_seconds": "load time",
    "first_token_seconds": "time to the first token",
    "decode_tokens_per_second": "decode speed",
}
_DEFAULT = Settings()
#: Of anything that is counted: prompts are made before the first is used.
_MOST = 1_000_000
_THREADS_A_CORE = 4  # more of them only wait, and starting them takes for ever


def _count(name: str, least: int, text: str, default: int | None) -> Callable[[F], F]:
    kind = click.IntRange(least, _MOST)
    return click.option(name, type=kind, default=default, show_default=default is not None, help=text)


@click.command("bench")
@click.argument("references", nargs=-1, required=True, metavar="REF...", shell_complete=complete_ref)
@_count("--batch", 1, "sequences at a time", _DEFAULT.batch)
@_count("--prompt-tokens", 1, "length of each prompt", _DEFAULT.prompt_tokens)
@_count("--new-tokens", 2, "tokens to generate for each", _DEFAULT.new_tokens)
@_count("--warmup", 0, "generations that do not count", _DEFAULT.warmup)
@_count("--repeat", 1, "generations that count", _DEFAULT.repeat)
@_count("--threads", 1, "threads of the engine; default: the engine's own choice", None)
@json_option
@quiet_option
@recipe_options
def bench_command(
    references: tuple[str, ...], as_json: bool, quiet: bool, setup: Setup, choices: dict[str, Any], **counts: Any
) -> None:
    """Measure built engines, one after another, each in a process of its own: medians and their spread."""
    settings = Settings(**counts)
    _check(settings, setup.facts.cpus)
    plans = [setup.plan(text, **choices) for text in references]
    for plan in plans:
        setup.usable(plan)  # all of them before minutes are spent on the first
    results: list[dict[str, Any]] = []
    failures: list[RecipesError] = []
    with reporter(quiet) as lines:
        _warn_if_busy(lines, setup)
        for plan in plans:
            try:
                results.append(_measured(lines, setup, plan, settings))
            except RecipesError as error:
                failures.append(error)
    if as_json:
        print_json({"schema": 1, "benches": results})
    elif results:
        print_table(_HEADER, [_row(result) for result in results])
    for failure in failures:
        report(failure)
    raise SystemExit(failures[0].exit_code if failures else 0)


def _check(settings: Settings, cores: int) -> None:
    """Refuse what this machine cannot do in any sensible time."""
    most = _THREADS_A_CORE * cores
    if settings.threads is not None and settings.threads > most:
        raise RequestError(
            f"--threads {settings.threads:,} on a machine of {cores} cores", f"{most} at most; more would only wait"
        )
    tokens = settings.batch * settings.prompt_tokens
    if tokens > _MOST:
        raise RequestError(
            f"--batch {settings.batch:,} of --prompt-tokens {settings.prompt_tokens:,} are {tokens:,} tokens",
            f"{_MOST:,} at most: give a smaller --batch or --prompt-tokens",
        )


def _measured(lines: Lines, setup: Setup, plan: Plan, settings: Settings) -> dict[str, Any]:
    lines.say(title(plan))
    judged = gate.read(setup.usable(plan))
    if judged and judged.verdict == "fail" and not judged.accepted:
        lines.warn({"text": f"{plan.ref} was rejected by the quality gate: fast or not, it is not fit for use"})
    result = bench.run(setup, plan, settings, lines)
    for name in unsteady(result["metrics"]):
        part = result["metrics"][name]["iqr"] / result["metrics"][name]["median"]
        text = f"{_NAMES[name]} is unsteady: the middle half spreads over {part:.0%} of the median"
        lines.warn({"text": f"{text}; close other programs or raise --repeat"})
    return result


def unsteady(metrics: Mapping[str, Any]) -> Sequence[str]:
    """Which of the times and speeds spread too far to compare."""
    return [name for name in _NAMES if metrics[name]["iqr"] > _UNSTEADY * metrics[name]["median"]]


def _warn_if_busy(lines: Lines, setup: Setup) -> None:
    load, cores = bench.load_average(), setup.facts.cpus
    if load > bench.BUSY * cores:  # asked once: later the load is our own
        text = f"this machine is busy, or was a minute ago: load average {load:.1f} on {cores} cores"
        lines.warn({"text": f"{text}; the numbers will be too low"})


_HEADER = ("REF", "LOAD", "FIRST TOKEN", "PREFILL tok/s", "DECODE tok/s", "PEAK MEMORY")


def _row(result: Mapping[str, Any]) -> tuple[str, ...]:
    metrics = result["metrics"]
    gpu = metrics["peak_gpu_bytes"]
    return (
        result["ref"],
        f"{_number(metrics['load_seconds'])} s",
        f"{_number(metrics['first_token_seconds'], 1000)} ms",
        _number(metrics["prefill_tokens_per_second"]),
        _number(metrics["decode_tokens_per_second"]),
        human_bytes(metrics["peak_rss_bytes"]) + (f", GPU {human_bytes(gpu)}" if gpu else ""),
    )


def _number(found: Mapping[str, float], factor: float = 1) -> str:
    """`1,234 ± 5`: the median and half the interquartile range, with about three digits."""
    median, half = found["median"] * factor, found["iqr"] * factor / 2
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:,.{digits}f} ± {half:,.{digits}f}"
