"""Events to the terminal, on stderr: bars where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import click

from ..events import Event
from ..space import human_bytes
from . import style

_NAMES = {"stage1": "stage 1", "stage2": "stage 2"}
_EVERY = 5.0  # seconds between plain progress lines


class Lines:
    """Plain lines. Use as a context manager; call with events."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self._said = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        pass

    def __call__(self, event: Event) -> None:
        """Show one event."""
        getattr(self, event["event"], lambda event: None)(event)

    def say(self, text: str) -> None:
        """One line, unless quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def stage(self, event: Event) -> None:
        """A stage began, ended or was there already."""
        what = event["status"]
        if what == "started":
            self.started(event)
        elif what == "cached":
            self.line(event, "there already")
        elif what == "waiting":
            self.line(event, "another process is building this: waiting for it")
        else:
            size = f", {human_bytes(event['bytes'])}" if "bytes" in event else ""
            verdict = f", {event['verdict']}" if "verdict" in event else ""
            self.line(event, f"{event['provider']}: {event['seconds']:.1f} s{size}{verdict}")

    def started(self, event: Event) -> None:
        """A stage began."""
        self.line(event, f"{event['provider']} …")

    def line(self, event: Event, text: str) -> None:
        """One line about a stage."""
        self.say(f"  {_stage(event):<10}{text}")

    def progress(self, event: Event) -> None:
        """How far it is, every few seconds."""
        if time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            self.line(event, f"{event['label']}: {_amount(event)}")

    def log(self, event: Event) -> None:
        """What a tool said, with -v."""
        if self.verbose:
            self.line(event, event["text"])

    def output(self, event: Event) -> None:
        """What a tool of the user's printed."""
        self.line(event, event["text"])

    def fallback(self, event: Event) -> None:
        """Another build, after a rejection."""
        settings = " ".join(f"--set {key}={value}" for key, value in event["settings"].items())
        self.say(f"  {style('rejected', fg='red')}: {event['reason']}\n  falling back to {settings}")

    def warn(self, event: Event) -> None:
        """What the user should see now."""
        if not self.quiet:
            click.echo(f"{style('warning:', fg='yellow')} {event['text']}", err=True)


class Bars(Lines):
    """Bars on a terminal; the lines stay above them."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        super().__init__(quiet, verbose)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
        )
        self._bars = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            self._bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stage(self, event: Event) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
        super().stage(event)

    def started(self, event: Event) -> None:
        name = f"{_stage(event)}  {event['provider']}"
        self._tasks[name] = self._bars.add_task(name, total=None, amount="")

    def progress(self, event: Event) -> None:
        label, total = event["label"], event["total"] or None
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total, amount="")
        self._bars.update(self._tasks[label], completed=event["done"], total=total, amount=_amount(event))

    def warn(self, event: Event) -> None:
        self.say(f"warning: {event['text']}")


def reporter(quiet: bool = False, verbose: bool = False) -> Lines:
    """Bars if stderr is a terminal, else lines."""
    return Bars(quiet, verbose) if sys.stderr.isatty() and not quiet else Lines(quiet, verbose)


def _amount(event: Event) -> str:
    done, total, unit = event["done"], event["total"], event["unit"]
    if unit == "B":
        return f"{human_bytes(done)} of {human_bytes(total)}" if total else human_bytes(done)
    return f"{done:g} of {total:g} {unit}" if total else f"{done:g} {unit}"


def _stage(event: Event) -> str:
    name = str(event.get("stage", ""))
    return _NAMES.get(name, name)
