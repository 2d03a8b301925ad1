"""`builds.jsonl`: one line a finished build. Lines are appended whole, so two builds never mix."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

NAME = "builds.jsonl"


def append(workspace: Path, line: Mapping[str, Any]) -> None:
    """Add one build. A single write of one line in append mode: whole or not at all."""
    workspace.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(line, sort_keys=True) + "\n").encode()
    handle = os.open(workspace / NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)


def read(workspace: Path) -> Iterator[dict[str, Any]]:
    """Every build, oldest first. A line cut short by a full disk is skipped."""
    path = workspace / NAME
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue
