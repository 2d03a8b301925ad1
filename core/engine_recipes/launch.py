"""Starts a worker, hands it one call, listens. Its death is an error with the last lines of its output."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

from . import errors, leftovers
from .events import Event

#: -c rather than -m: the folder the user stands in must not be importable.
_START = "import sys; sys.path[:] = sys.argv[1:]; from engine_recipes.worker import main; main()"
#: No telemetry from libraries that stages use, and no spinning threads where cores are shared.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRTLLM_NO_USAGE_STATS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
}
_NUMBER = (int, float)
#: What plugins may say -> what that has beside its name, and of which type.
_SAID: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "progress": {"label": str, "done": _NUMBER, "total": _NUMBER, "unit": str},
    "log": {"text": str},
    "output": {"text": str},
    "warn": {"text": str},
}
#: The same of what the worker itself sends.
_OWN: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "importing": {"provider": str},
    "result": {"value": object, "peak_rss_bytes": int},
    "error": {"kind": str, "message": str, "hint": str, "output": str},
    "crash": {"message": str},
}
_MOST = 1e18  # of anything that progress counts
_LAST_LINES = 40
_LONGEST = 2000  # characters of a line that is shown; the log has it whole
_PATIENCE = 0.5  # seconds that processes get to end which the worker left
_GRACE = 3.0  # seconds that a worker and its pipes get to end by themselves


@dataclass(frozen=True)
class Answer:
    """What a worker sent at the end. Memory in bytes."""

    value: Any
    peak_rss_bytes: int


def call(
    what: str, request: Mapping[str, Any], log: Path | None, listen: Callable[[Event], None], gpus: str = ""
) -> Answer:
    """Run one call in a fresh process.

    Args:
        what: who does what, for messages: `stage1 of precision fp16 (engine-recipes 0.1.0)`.
        request: the call, see worker.perform.
        log: file that gets everything the worker and its tools print; None throws it away.
        listen: gets progress, log and warn events as they come.
        gpus: which GPUs it may see, as CUDA_VISIBLE_DEVICES; empty: those that this process sees.

    Raises:
        RecipesError: what the worker raised.
        StageFailed: it died, or its code has a bug; `output` holds the last lines.
    """
    mark = secrets.token_hex(16)
    process = subprocess.Popen(
        [sys.executable, "-c", _START, *[p or os.getcwd() for p in sys.path]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**_ENVIRONMENT, **os.environ, leftovers.MARK: mark, **({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})},
        start_new_session=True,  # so that one signal reaches the worker's own children too
    )
    assert process.stdin and process.stdout and process.stderr
    last: deque[str] = deque(maxlen=_LAST_LINES)
    inbox: Queue[Event | None] = Queue()
    reader = threading.Thread(target=_keep, args=(process.stderr, log, last), daemon=True)
    receiver = threading.Thread(target=_receive, args=(process.stdout, inbox), daemon=True)
    for thread in (reader, receiver):
        thread.start()
    try:
        with suppress(BrokenPipeError):  # it died at once: what it printed says why
            process.stdin.write(json.dumps({**request, "what": what}).encode() + b"\n")
            process.stdin.flush()
        final = _listen(process, inbox, listen, last)
    finally:
        stop(process)
        if left := leftovers.end(mark, patience=_PATIENCE):
            names = ", ".join(sorted(set(left)))
            listen({"event": "warn", "text": f"{what} left {len(left)} running, which were ended: {names}"})
        for thread in (reader, receiver):
            thread.join(timeout=_GRACE)
        with suppress(BrokenPipeError):
            process.stdin.close()
    return _answer(what, final, process.returncode, "\n".join(last), log)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a worker and everything it started."""
    for sign, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=patience)
        except (ProcessLookupError, PermissionError):
            break
        except subprocess.TimeoutExpired:
            continue
    process.poll()


def _listen(
    process: subprocess.Popen[bytes], inbox: Queue[Event | None], listen: Callable[[Event], None], last: deque[str]
) -> Event | str:
    """Pass events on until the final one; without one, say whose import was going on. The pipe may stay open in a
    child that a dead worker forked."""
    died, importing = 0.0, ""
    while True:
        try:
            event = inbox.get(timeout=0.2)
        except Empty:
            if process.poll() is not None:
                died = died or time.monotonic()
                if time.monotonic() - died > _GRACE:
                    return importing
            continue
        if event is None:
            process.wait()
            return importing
        if event["event"] in ("result", "error", "crash"):
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_GRACE)
            return event
        if event["event"] == "importing":
            importing = event["provider"]
            continue
        if event["event"] in ("log", "output"):
            last.append(event["text"])
        listen(event)


def _receive(pipe: IO[bytes], inbox: Queue[Event | None]) -> None:
    with pipe:  # closed here: a grandchild that left the session may hold it open for longer than we wait
        for line in pipe:
            with suppress(ValueError, RecursionError):  # a line cut short by a kill, or made to be no event
                event = json.loads(line)
                is_said = isinstance(event, dict) and "said" in event
                read = _read(event["said"], _SAID) if is_said else _read(event, _OWN)
                if read:
                    inbox.put(read)
    inbox.put(None)


def _read(event: Any, known: Mapping[str, Mapping[str, type | tuple[type, ...]]]) -> Event | None:
    """An event as it may be shown; None if it is none that is known, or not whole: plugins may emit what they like."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in known:
        return None
    read: Event = {"event": kind}
    for name, types in known[kind].items():
        value: Any = event.get(name)
        if not isinstance(value, types) or (types == _NUMBER and not _counts(value)):
            return None
        is_text = types is str
        read[name] = "\n".join(map(_shown, str(value).splitlines()[-_LAST_LINES:])) if is_text else value
    return read


def _counts(value: Any) -> bool:
    return not isinstance(value, bool) and 0 <= value < _MOST


def _shown(line: str) -> str:
    """A line as a terminal may get it: not endless, and nothing in it that a terminal obeys."""
    cut = f"{line[:_LONGEST]} …" if len(line) > _LONGEST else line
    return errors.printable(cut)


def _keep(pipe: IO[bytes], log: Path | None, last: deque[str]) -> None:
    with pipe:
        for line in pipe:
            last.append(_shown(line.decode(errors="replace").rstrip()))
            if log:  # opened for each line: most stages print nothing and need no file
                with suppress(OSError), log.open("ab") as file:  # a full disk must not stop the reading
                    file.write(line)


def _answer(what: str, final: Event | str, code: int, output: str, log: Path | None) -> Answer:
    where = f"its whole output: {log}" if log else "report this to the authors of the package"
    if isinstance(final, str):
        what = f"{what}: importing {final}" if final else what
        raise errors.StageFailed(f"{what} {_died(code)}", f"{_why(code)}{where}", output)
    if final["event"] == "crash":
        raise errors.StageFailed(f"{what} failed: {final['message']}", where, output)
    if final["event"] == "error" and final["kind"] == "StageFailed":
        raise errors.StageFailed(final["message"], final["hint"] or where, final["output"] or output)
    if final["event"] == "error":
        raise getattr(errors, final["kind"])(final["message"], final["hint"])
    return Answer(final["value"], final["peak_rss_bytes"])


def _died(code: int) -> str:
    if code < 0:
        names = {sign.value: sign.name for sign in signal.Signals}  # signals for programs' own use have none
        return f"was killed by {names.get(-code, f'signal {-code}')}"
    return f"ended with exit code {code} and no result"


def _why(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the kernel kills so when memory runs out: free some, or split the work; "
    return ""
