"""The talk with `server.py`, which runs in TensorRT-LLM's own environment: JSON lines through pipes."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from io import BufferedReader
from queue import Empty, SimpleQueue
from typing import IO, Any, cast

from engine_recipes import MachineError, RecipesError, StageFailed, events

from .failures import explain

Event = dict[str, Any]
_FINAL = ("end", "error", "died")
_LAST_LINES = 40
_GRACE = 10.0  # seconds that a server gets to end by itself, a little more than it takes for that
_PRINTING = 2.0  # seconds until the last of what it printed is here


class Link:
    """The server's process, and who waits for which of its answers.

    Args:
        argv: what starts it.
        guard: entered meanwhile; left with an error if the server had to be killed.

    Raises:
        MachineError: it cannot be started.
    """

    def __init__(self, argv: Sequence[str], guard: AbstractContextManager[None]) -> None:
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # one signal reaches all that it starts, and Ctrl-C does not
            )
        except OSError as error:
            raise MachineError(
                f"{argv[0]} cannot be started: {error.strerror or error}", "check --set build.python and build.runtime"
            ) from error
        self._guard = guard
        guard.__enter__()
        self._last: deque[str] = deque(maxlen=_LAST_LINES)
        self._numbers = itertools.count(1)
        self._loading: SimpleQueue[Event] = SimpleQueue()
        self._waiting = {0: self._loading}
        # a queue, not a lock: a generator that is collected says so from wherever that happens
        self._outbox: SimpleQueue[Event | None] = SimpleQueue()
        self._is_ready = self._is_dead = self._is_closed = False
        process = self._process
        assert process.stdin and process.stdout and process.stderr
        self._reader = threading.Thread(target=self._keep, args=(process.stderr,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._send, args=(process.stdin,), daemon=True).start()
        threading.Thread(target=self._receive, args=(cast("BufferedReader", process.stdout),), daemon=True).start()

    def await_ready(self, name: str, timeout: float) -> None:
        """Wait until the engine is loaded.

        Args:
            name: of the engine, for people.
            timeout: in seconds.

        Raises:
            MachineError: it cannot be loaded, the server died or takes too long. It may be the engine's fault or not:
                nobody can tell from here, and an engine must not be judged by it.
            RequestError: what it was asked for cannot be.
        """
        started = time.monotonic()
        while (waited := time.monotonic() - started) < timeout:
            events.progress(f"loading {name}", round(waited), 0, "seconds")
            try:
                event = self._loading.get(timeout=min(1.0, timeout - waited))
            except Empty:
                continue
            if event["event"] == "ready":
                self._is_ready = True
                return
            if event["event"] == "died":
                raise self._death()
            self._reader.join(_PRINTING)  # what it printed says more than its last error
            error = self._failure(f"TensorRT-LLM cannot load {name}", event, [*self._last])
            raise MachineError(error.message, error.hint) if isinstance(error, StageFailed) else error
        raise MachineError(f"{name} was not loaded within {timeout:g} s", "set build.load_timeout higher")

    def ask(self, request: Event) -> Iterator[Event]:
        """Yield the answers to one request, see `server.py`. To stop asking is to cancel it.

        Raises:
            RecipesError: TensorRT-LLM failed; StageFailed if the reason is not known.
            ValueError: the link was closed.
        """
        number = next(self._numbers)
        inbox: SimpleQueue[Event] = SimpleQueue()
        self._waiting[number] = inbox
        if self._is_dead:
            inbox.put({"event": "died"})
        self._outbox.put({"id": number, **request})
        event: Event = {"event": "asked"}
        try:
            while (event := inbox.get())["event"] not in _FINAL:
                yield event
        finally:
            del self._waiting[number]
            if event["event"] not in _FINAL:
                self._outbox.put({"id": number, "do": "cancel"})
        if event["event"] == "died":
            raise self._death()
        if event["event"] == "error":
            raise self._failure("TensorRT-LLM failed", event, [])

    def end(self) -> None:
        """Let the server shut down, or kill it with all that it started."""
        self._is_closed = True
        if self._is_ready:
            self._outbox.put({"do": "close"})
        self._outbox.put(None)
        killed: StageFailed | None = None
        try:
            self._process.wait(_GRACE if self._is_ready else 2)
        except subprocess.TimeoutExpired:
            killed = StageFailed("the server of TensorRT-LLM did not end")
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        if threading.current_thread() is not self._reader:  # which may be where the runtime is collected
            self._reader.join(_PRINTING)  # so that its last words are told
        self._guard.__exit__(type(killed) if killed else None, killed, None)

    def _send(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:  # it died: the receiver says so
            while (request := self._outbox.get()) is not None:
                pipe.write(json.dumps(request).encode() + b"\n")
                pipe.flush()

    def _receive(self, pipe: BufferedReader) -> None:
        with pipe:
            for line in pipe:
                try:
                    event = json.loads(line)
                    inbox = self._waiting.get(event["id"])
                except (ValueError, TypeError, KeyError):  # containers greet before they start it
                    self._note(line)
                    continue
                if "bytes" in event:
                    event["data"] = bytearray(event["bytes"])
                    if pipe.readinto(event["data"]) < event["bytes"]:
                        break  # it died
                if inbox:
                    inbox.put(event)
        self._is_dead = True
        for inbox in list(self._waiting.values()):
            inbox.put({"event": "died"})

    def _keep(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self._note(line)

    def _note(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._last.append(text)
        events.log(text)

    def _failure(self, what: str, event: Event, printed: list[str]) -> RecipesError:
        lines = [*printed, *event["message"].splitlines()]
        first = next((line for line in event["message"].splitlines() if line.strip()), "no reason given")
        return explain(lines) or StageFailed(
            f"{what}: {event['kind']}: {first}", "-v shows what it printed", "\n".join(self._last)
        )

    def _death(self) -> Exception:
        if self._is_closed:
            return ValueError("this engine was closed")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self._reader.join(_PRINTING)
        code, printed = self._process.poll(), list(self._last)
        if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
            how, hint = "was killed", "the kernel kills so when memory runs out: free some, and load the engine again"
        else:
            how = f"ended with exit code {code}" if code is not None and code >= 0 else f"died ({code})"
            hint = "-v shows what it printed; load the engine again"
        return explain(printed) or MachineError(f"the server of TensorRT-LLM {how}", hint)
