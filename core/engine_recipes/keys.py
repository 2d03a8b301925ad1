"""Content keys: sha256 over canonical JSON. Knows nothing of what is hashed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, plain ASCII and no NaN: the same value gives the same bytes everywhere."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def key_of(preimage: Mapping[str, Any]) -> str:
    """sha256 of the canonical form, 64 hex digits."""
    import hashlib

    return hashlib.sha256(canonical(preimage)).hexdigest()
