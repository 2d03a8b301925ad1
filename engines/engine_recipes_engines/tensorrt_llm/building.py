"""Stage 2: runs `trtllm-build`, keeps what it says, and believes nothing but the files it leaves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine_recipes import MachineError, StageContext, StageFailed, checkpoint, events

from .arguments import TIMING_CACHE, command, container
from .environment import Environment
from .failures import blames_timing_cache, explain, last_words, tail
from .process import TooLate, run
from .timing import TimingCache

#: What the tool said, kept with the engine.
LOG = "trtllm-build.log"
_KEYS = ("version", "pretrained_config", "build_config")
#: An engine file has at least this part of its rank's weights: a tied table is stored once instead of twice.
_LEAST = 0.45
#: Of algorithms whose weights the tool quantises as it loads them: the engine's bytes for each of the checkpoint's.
_SHRINKS = {"W8A16": 0.5, "W4A16": 0.25}
#: What each rank goes through: what is said when a step is done, and what comes next.
_STEPS = (
    (re.compile(r"Total time of constructing network"), "compiling"),
    (re.compile(r"Engine generation completed"), "writing the engine"),
    (re.compile(r"Engine serialized"), "loading the weights"),
)
#: A log at its most talkative is not held in memory; causes stand near its end.
_KEPT_LINES = 20_000
_MINUTE = 60.0


def build(context: StageContext) -> dict[str, str]:
    """Compile the checkpoint into `rank<r>.engine` and `config.json`.

    Returns:
        What was used: `{"tensorrt-llm": "1.2.1", "tensorrt": "10.14.1"}`.

    Raises:
        MachineError: TensorRT-LLM is missing, or is another version.
        RequestError: the checkpoint is damaged.
        StageFailed: the tool failed, was killed, took too long, or left less than an engine.
    """
    least = least_bytes(context)
    environment = Environment.of(context.options)
    versions = environment.require()
    name = "-".join([*(word for item in sorted(versions.items(), reverse=True) for word in item), context.target])
    kept = TimingCache(context.cache, name, context.out / TIMING_CACHE)
    tool = Tool(environment, context, ranks=len(least))
    lent = kept.lend()
    outcome = tool.run()
    if lent and outcome.may_be_the_cache:
        events.warn(f"trtllm-build failed with the timing cache {kept.path}: again without it")
        kept.forget()
        tool.clear()
        outcome = tool.run()
    outcome.require_success()
    check_engine(context.out, least, outcome)
    kept.keep()
    return versions


def least_bytes(context: StageContext) -> list[int]:
    """How large the engine of each rank is at least; 0 where its weights may be elsewhere.

    Raises:
        RequestError: the checkpoint is damaged.
    """
    folder = context.input("trtllm-checkpoint").path
    with checkpoint.open_checkpoint(folder) as weights:
        shrinks = _SHRINKS.get(str(weights.scheme.algorithm), 1.0)
        sizes = [(folder / f"rank{rank}.safetensors").stat().st_size for rank in range(len(weights.ranks))]
    elsewhere = any(context.options.get(name) for name in ("strip_plan", "weight_streaming", "fast_build"))
    return [0 if elsewhere else int(size * shrinks * _LEAST) for size in sizes]


@dataclass(frozen=True)
class Outcome:
    """How the tool ended: its exit code, negative for a signal, and what it said."""

    code: int
    lines: list[str]

    @property
    def may_be_the_cache(self) -> bool:
        """Whether it failed, for no known reason, with a complaint about the timing cache or by crashing."""
        crashes = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
        suspicious = -self.code in crashes or (self.code > 0 and blames_timing_cache(self.lines))
        return suspicious and explain(self.lines) is None

    def require_success(self) -> None:
        """Raise StageFailed unless the tool says that all went well."""
        if self.code == 0:
            return
        # warnings that memory is short stand in logs of good builds too, so they do not explain this
        known = None if self.code == -signal.SIGKILL else explain(self.lines)
        if known:
            raise known
        if self.code < 0:
            hint = "the kernel kills so when memory runs out: free some, or set build.workers=1"
            name = signal.Signals(-self.code).name
            raise self.failed(f"trtllm-build was killed by {name}", hint if self.code == -signal.SIGKILL else "")
        raise self.failed(f"trtllm-build failed: {last_words(self.lines)}")

    def failed(self, message: str, hint: str = "") -> StageFailed:
        """An error with the last lines. Without a hint, core says where all of them are."""
        return StageFailed(message, hint, tail(self.lines))


def check_engine(out: Path, least: Iterable[int], outcome: Outcome) -> None:
    """Demand every file of a whole engine, whatever the tool said.

    Raises:
        StageFailed: one is missing or too small.
    """
    reason = _incomplete(out, list(least))
    if reason:
        raise outcome.failed(f"trtllm-build said that all went well, and {reason}")


def _incomplete(out: Path, least: list[int]) -> str:
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "config.json is missing or damaged"
    missing = [key for key in _KEYS if not isinstance(config, Mapping) or key not in config]
    if missing:
        return f"config.json has no {missing[0]}"
    for rank, size in enumerate(least):
        file = out / f"rank{rank}.engine"
        found = file.stat().st_size if file.is_file() else 0
        if not found:
            return f"{file.name} of {len(least)} is missing or empty"
        if found < size:
            return f"{file.name} has {found:,} bytes, where its weights alone take {size:,}"
    return ""


class Tool:
    """`trtllm-build` for one build."""

    def __init__(self, environment: Environment, context: StageContext, ranks: int) -> None:
        self.environment, self.context, self.ranks = environment, context, ranks
        self.log = context.out / LOG
        self.minutes = int(context.options.get("timeout") or 0)

    def run(self) -> Outcome:
        """Run it to its end, or stop it with all that it started.

        Raises:
            StageFailed: it took longer than the option `timeout` allows.
            MachineError: it cannot be started.
        """
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        progress = Progress(self.ranks)

        def listen(line: str) -> None:
            lines.append(line)
            self.say(line)
            progress.see(line)

        words = command(self.context)
        self.say(shlex.join(words))
        try:
            # in a folder of its own: whatever it drops where it stands belongs to no engine
            with tempfile.TemporaryDirectory() as cwd, self.environment.guarded(container(self.context)):
                return Outcome(run(words, listen, _MINUTE * self.minutes, Path(cwd)), list(lines))
        except TooLate:
            raise StageFailed(
                f"trtllm-build took more than {self.minutes} minutes, and was stopped",
                "set build.timeout higher, or 0 for no limit",
                tail(lines),
            ) from None
        except OSError as error:
            raise MachineError(f"{words[0]} cannot be started: {error.strerror}", "see `recipes doctor`") from None

    def say(self, line: str) -> None:
        """Show a line now, and keep it with the engine and in the workspace's log."""
        events.output(line)
        print(line, file=sys.stderr, flush=True)
        with suppress(OSError), self.log.open("a", encoding="utf-8") as file:  # a full disk must not hide the rest
            file.write(line + "\n")

    def clear(self) -> None:
        """Remove what a failed run left, but for what it said: nothing of it may look like part of the next one."""
        for path in self.context.out.iterdir():
            if path.name != LOG:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class Progress:
    """How far the ranks are, as far as the tool's lines say."""

    def __init__(self, ranks: int) -> None:
        self.total, self.done = ranks * len(_STEPS), 0
        events.progress("trtllm-build: starting", 0, self.total, "steps")

    def see(self, line: str) -> None:
        """Look for the end of a step."""
        following = next((step for pattern, step in _STEPS if pattern.search(line)), "")
        if following:
            self.done = min(self.done + 1, self.total)
            step = "done" if self.done == self.total else following
            events.progress(f"trtllm-build: {step}", self.done, self.total, "steps")
