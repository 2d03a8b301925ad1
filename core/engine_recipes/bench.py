"""Speed and memory of a built engine, measured in a process of its own and kept in `bench.json` beside it."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from . import events
from .errors import RequestError
from .events import Event
from .store import read_json, write_json

if TYPE_CHECKING:
    from .api import Setup
    from .facts import Facts
    from .host import Host
    from .planning import Plan
    from .types import Provider, Runtime, Sampling

BENCH = "bench.json"
_KEPT = 10  # results an engine keeps
_LARGEST = 1e300  # JSON has whole numbers that no float holds
#: Above this share of the cores, the load average says that others work here too.
BUSY = 0.5


class BatchRuntime(Protocol):
    """What a Runtime has besides, if it can generate for several prompts at once. Optional."""

    def generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Yield one new token id for each prompt, step by step: what `generate` gives for each of them alone.

        Args:
            prompts: token ids, all of one length.
            sampling: as for `generate`; each prompt has a sampler of its own with this seed.
        """
        ...


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        batch: sequences at a time.
        prompt_tokens: length of each prompt.
        new_tokens: tokens to generate for each, 2 or more: decoding is what comes after the first.
        warmup: generations before those that count.
        repeat: generations, and loads, that count.
        threads: for the engine's runtime; None: what it chooses.
    """

    batch: int = 1
    prompt_tokens: int = 128
    new_tokens: int = 64
    warmup: int = 1
    repeat: int = 5
    threads: int | None = None


def run(setup: Setup, plan: Plan, settings: Settings, listen: Callable[[Event], None]) -> dict[str, Any]:
    """Measure one engine in a fresh process, and keep the result beside it.

    Args:
        listen: gets progress and warnings.

    Returns:
        One of the `benches` of `recipes bench --json`.

    Raises:
        RecipesError: it is not built, cannot be loaded, or cannot do what the settings ask.
    """
    from datetime import datetime, timezone

    from . import launch

    folder, provider = setup.usable(plan), plan.stage("stage2").provider
    created, machine = datetime.now(timezone.utc), _machine(setup.facts, plan)
    started = time.monotonic()
    stage = {"event": "stage", "stage": "bench", "provider": str(provider)}
    request = {
        "action": "bench",
        "providers": [asdict(provider)],
        "folder": str(folder),
        "settings": asdict(settings),
        "options": plan.stage("stage2").options,
        "prompts": prompts_for(folder, settings),
        "protected": [str(place) for place in setup.store.places],
    }
    listen({**stage, "status": "started"})
    measured = launch.call(
        f"bench of {provider}", request, None, lambda e: listen({**e, "stage": "bench"}), plan.gpus
    ).value
    listen({**stage, "status": "run", "seconds": time.monotonic() - started})
    result = {
        "ref": str(plan.ref),
        "engine_dir": str(folder),
        "target": plan.target,
        "engine": plan.engine.name,
        "precision": plan.precision.name,
        "settings": asdict(settings),
        "metrics": measured,
        "machine": machine,
        "created": created.isoformat(timespec="seconds"),
    }
    try:
        keep(folder, result)
    except OSError as error:
        listen({"event": "warn", "text": f"{folder / BENCH} cannot be written: {error.strerror or error}"})
    return result


def read(folder: Path) -> list[dict[str, Any]]:
    """What was measured of an engine: the last of each settings, newest last. What is damaged is left out."""
    benches = read_json(folder / BENCH).get("benches")
    return [bench for bench in benches if _is_sound(bench)] if isinstance(benches, list) else []


def _is_sound(bench: Any) -> bool:
    """Whether what others rely on is there and of its type, and every number is one that JSON has."""
    try:
        settings, metrics, machine = bench["settings"], bench["metrics"], bench["machine"]
        numbers = [value for value in settings.values() if value is not None]
        numbers += [value for value in metrics.values() if not (value is None or isinstance(value, dict))]
        spreads = [value for value in metrics.values() if isinstance(value, dict)]
        numbers += [spread[name] for spread in spreads for name in ("median", "min", "max", "iqr")]
        json.dumps(bench, allow_nan=False, ensure_ascii=False).encode()
        return isinstance(machine["gpus"], list) and all(abs(number) < _LARGEST for number in numbers)
    except (KeyError, TypeError, ValueError, AttributeError):
        return False


def keep(folder: Path, result: Mapping[str, Any]) -> None:
    """Add a result to the engine's file, in place of an older one with the same settings."""
    others = [bench for bench in read(folder) if bench.get("settings") != result["settings"]]
    write_json(folder / BENCH, {"schema": 1, "benches": [*others, result][-_KEPT:]})


def prompts_for(folder: Path, settings: Settings) -> list[list[int]]:
    """Token ids of the engine's vocabulary, none of them special, the same each time. [batch][prompt_tokens]"""
    from .tokenizer import Tokenizer

    size = Tokenizer.load(folder).size
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens") or ()
    ordinary = sorted(set(range(size)) - {token["id"] for token in added}) or [0]
    choice = random.Random(0)
    return [choice.choices(ordinary, k=settings.prompt_tokens) for _ in range(settings.batch)]


def measure(
    host: Host,
    provider: Provider,
    folder: Path,
    settings: Settings,
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Load and generate, in this process, which must be fresh.

    The first load imports the engine's libraries; whether it reads the disk depends on the page cache, which nobody
    empties. Generations use that first runtime; then it is closed and loaded again `repeat` times. So peak memory is
    that of one load and its generations.

    Args:
        options: of the engine, for loading it.

    Returns:
        The `metrics` of a result. Seconds, tokens a second over the whole batch, bytes.
    """
    options = {**(options or {}), **({} if settings.threads is None else {"threads": settings.threads})}

    def load() -> tuple[Runtime, float]:
        start = time.perf_counter()
        return host.load_engine(provider, folder, options), time.perf_counter() - start

    runtime, first_load = load()
    memory, gpu = rss_bytes(), gpu_bytes()
    turns = []
    for number in range(settings.warmup + settings.repeat):
        turns.append(_turn(runtime, provider.name, settings, prompts))
        gpu = max(gpu or 0, gpu_bytes() or 0) or None
        done = number + 1 - settings.warmup
        events.progress("measuring", max(done, 0), settings.repeat, "repeats")
    peak = _peak_rss_bytes()
    loads = []
    for _ in range(settings.repeat):
        runtime.close()
        runtime, seconds = load()
        loads.append(seconds)
    runtime.close()
    prefill, decode = zip(*turns[settings.warmup :], strict=True)
    return {
        "first_load_seconds": spread([first_load]),
        "load_seconds": spread(loads),
        "first_token_seconds": spread(prefill),
        "prefill_tokens_per_second": spread([settings.batch * settings.prompt_tokens / s for s in prefill]),
        "decode_tokens_per_second": spread([settings.batch * (settings.new_tokens - 1) / s for s in decode]),
        "peak_rss_bytes": peak,
        "rss_after_load_bytes": memory,
        "peak_gpu_bytes": gpu,
    }


def _turn(runtime: Runtime, name: str, settings: Settings, prompts: Sequence[Sequence[int]]) -> tuple[float, float]:
    """One generation: seconds to the first token, and from there to the last."""
    start = time.perf_counter()
    times = [time.perf_counter() for _ in _steps(runtime, name, settings, prompts)]
    if len(times) < settings.new_tokens:
        raise RequestError(
            f"{name} generated {len(times)} of {settings.new_tokens} tokens after {settings.prompt_tokens}",
            "its longest sequence is shorter: give a smaller --new-tokens or --prompt-tokens",
        )
    return times[0] - start, times[-1] - times[0]


def _steps(runtime: Any, name: str, settings: Settings, prompts: Sequence[Sequence[int]]) -> Iterator[Any]:
    from .types import Sampling

    sampling = Sampling(settings.new_tokens)
    if len(prompts) == 1:
        return iter(runtime.generate(prompts[0], sampling))
    if not hasattr(runtime, "generate_batch"):
        raise RequestError(f"{name} generates one sequence at a time", "leave out --batch")
    batched: BatchRuntime = runtime
    return batched.generate_batch(prompts, sampling)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest, largest and interquartile range (between the values themselves, linear) of one or more."""
    quarters = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "iqr": quarters[2] - quarters[0],
    }


def load_average() -> float:
    """Processes that wanted to run during the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def rss_bytes() -> int:
    """What this process has in memory now, mapped files included; its peak where /proc does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError):
        return _peak_rss_bytes()
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_rss_bytes() -> int:
    from .worker import peak_rss_bytes

    return peak_rss_bytes()


def gpu_bytes() -> int | None:
    """GPU memory of this process on all GPUs; None if NVML is not there or does not know the process.

    In a container NVML may know it by another number only.
    """
    if not Path("/proc/driver/nvidia/version").exists():
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        processes = [process for device in devices for process in pynvml.nvmlDeviceGetComputeRunningProcesses(device)]
        return sum(process.usedGpuMemory or 0 for process in processes if process.pid == os.getpid()) or None
    except pynvml.NVMLError:
        return None


def _machine(facts: Facts, plan: Plan) -> dict[str, Any]:
    from .availability import requirements

    return {
        "cpu": _cpu(),
        "cores": facts.cpus,
        "gpus": [gpu.name for gpu in facts.gpus],
        "load_average": load_average(),
        "python": facts.python,
        "packages": facts.tools(requirements(plan.engine, plan.target)),
    }


def _cpu() -> str:
    """The processor's name, as far as the system tells it."""
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
