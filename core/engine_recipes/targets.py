"""Names of hardware: `cpu`, `sm89` for NVIDIA GPUs of compute capability 8.9, `sm86+sm89` for one engine on both."""

from __future__ import annotations

import re

from .errors import RequestError


def parts(target: str) -> list[str]:
    """The single targets of `sm86+sm89`."""
    return target.split("+")


def normal(text: str) -> str:
    """One spelling for what `--target` says: `SM89,sm86` and `sm86+sm89` are the same.

    Raises:
        RequestError: something that cannot be a target's name; it becomes part of a folder's.
    """
    found = [part.strip().lower() for part in re.split("[,+]", text)]
    if not all(re.fullmatch(r"(?!sm\d*[a-z]?$)[a-z0-9][a-z0-9_-]*|sm\d{2,3}", part) for part in found):
        raise RequestError(f"--target {text!r} is no target", "for example --target sm89, or --target sm86,sm89")
    return "+".join(sorted(dict.fromkeys(found), key=lambda part: (len(part), part)))


def compute_of(target: str) -> str:
    """`8.9` from `sm89`, `12.0` from `sm120`; nothing for a target that is no GPU."""
    digits = target.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}" if target != digits and len(digits) > 1 and digits.isdigit() else ""


def target_of(compute: str) -> str:
    """`sm89` from `8.9`."""
    return "sm" + compute.replace(".", "")
