"""TinyLlama: Llama in every respect, so nothing is written again.

The 1.1B model has 22 layers, hidden size 2048, 32 query heads sharing 4 key/value heads of 64 elements, an MLP of
5632, 32000 tokens, positions up to 2048 with rope base 10000, and an untied head.
"""

from __future__ import annotations

from .llama import resolve_checkpoint

__all__ = ["resolve_checkpoint"]
