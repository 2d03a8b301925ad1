"""The errors people see. Nothing else is caught at the top; anything else is a bug and shows its traceback.

RecipesError                what is wrong + what to do about it
├── RequestError      2     the request is wrong: unknown name, bad option, unsupported pair
├── MachineError      3     this machine cannot do it: missing package, GPU, disk, checkpoint not fetched
├── StageFailed       4     a stage failed; the tool's own output is kept
├── Rejected          5     built, but the quality gate rejected it
└── Interrupted     130     Ctrl-C, SIGTERM
"""

from __future__ import annotations

from collections.abc import Iterable


class RecipesError(Exception):
    """Base of every error a user can cause or repair.

    Args:
        message: one line, what is wrong, with the name or number that is wrong in it.
        hint: one line, what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class RequestError(RecipesError):
    """The request is wrong: unknown name, bad option, a pair that no engine supports."""

    exit_code = 2


class MachineError(RecipesError):
    """This machine cannot do it: missing package, GPU, disk or memory, or a checkpoint not fetched."""

    exit_code = 3


class StageFailed(RecipesError):
    """A stage started and failed. `output` holds the last lines the tool printed."""

    exit_code = 4

    def __init__(self, message: str, hint: str = "", output: str = "") -> None:
        super().__init__(message, hint)
        self.output = output


class Rejected(RecipesError):
    """The engine was built, and the quality gate refused it."""

    exit_code = 5


class Interrupted(RecipesError):
    """The user or the system asked us to stop."""

    exit_code = 130


def one_line(text: object) -> str:
    """A message or a hint as the one line that it must be, whatever a plugin gave; empty if it cannot be printed."""
    try:
        return printable(" ".join(str(text).split()))
    except Exception:  # its own __str__
        return ""


def printable(text: str) -> str:
    """Text with what a terminal would obey spelled out, an escape as `\\x1b`. Tabs and ends of lines stay."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c in "\t\n" else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The kind of a foreign exception and the first line of what it says; it may say nothing that can be printed."""
    try:
        said = printable(next(iter(str(error).strip().splitlines()), ""))
    except Exception:  # its own __str__
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def disk_error(error: OSError, place: object) -> MachineError:
    """What the system said when something could not be written."""
    return MachineError(
        f"{error.filename or place} cannot be written: {error.strerror or error}",
        "free some disk space, or choose another place with --workspace",
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names up to three close matches of `name`, or lists a few known names."""
    from difflib import get_close_matches

    names = sorted(set(known))
    close = get_close_matches(name, names, n=3, cutoff=0.6) or [known for known in names if known.startswith(name)][:3]
    if close:
        return f"did you mean {' or '.join(close)}?"
    shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"known: {shown}" if names else "none are known"
