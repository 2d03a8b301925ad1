"""How a case ends other than well. Cases raise these; only `Case` knows pytest."""

from __future__ import annotations


class Fault(AssertionError):
    """A promise is not kept: what the plugin does, and what is expected of it."""


class Skip(Exception):
    """This case cannot be checked here, and why."""


def expect(holds: object, message: str) -> None:
    """Raise Fault with `message` unless something holds."""
    if not holds:
        raise Fault(message)
