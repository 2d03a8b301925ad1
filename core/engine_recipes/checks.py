"""What can be checked of any engine that is fed step by step, without its source: its numbers, cache and vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .stepping import Stepper
from .tokenizer import Tokenizer
from .types import Check, Verdict

#: Tokens of the sample: some more than a few steps, few enough for a second of work on a small model.
SAMPLE = 32
#: Largest difference between prefill and steps (root mean square over all logits, in their standard deviations), by
#: the type that is computed with. The two multiply the same numbers in another order, so they differ by rounding:
#: some 1e-6 in float32, grown by the number of layers. Measured on SmolLM2 (30 layers): 3e-6 in float32; a cache
#: that is wrong in every layer gives 1.4 to 5, one that is wrong in one layer 0.35 to 0.6.
CACHE_LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
#: The same where activations or the cache are rounded to few bits. A difference of 1e-7 beside a boundary becomes a
#: step of the grid, and that moves values in every later layer over theirs: two correct programs differ by about
#: as much as any two roundings. Measured on SmolLM2: 0.13 with FP8 layers (0.10 between float32 and float64 in
#: PyTorch), 0.24 with an FP8 cache as well, 0.008 with an INT8 cache alone, 0.15 with all layers' inputs in INT8.
ROUNDING_LIMITS = {"float8_e4m3fn": 0.6, "int8": 0.3}


def judge_numbers(runtime: Stepper, compute: str, rounding: Iterable[str]) -> list[Check]:
    """Whether the logits are numbers, and those of one token at a time are those of all at once.

    Args:
        runtime: a loaded engine.
        compute: the type that it computes with, a key of CACHE_LIMITS.
        rounding: types that activations or the cache are rounded to, keys of ROUNDING_LIMITS.

    Returns:
        Two checks; one, if there is nothing to compare: the logits are no numbers, or the engine hides them.
    """
    import numpy as np

    count = min(SAMPLE, runtime.max_seq_len)
    ids = np.random.default_rng(0).integers(runtime.vocab_size, size=count).tolist()
    at_once: Any = runtime.logits(ids)  # [count, vocabulary]
    if at_once is None:
        return [Check("logits are finite", "not run", note="the engine gives no logits")]
    broken = int(np.size(at_once) - np.isfinite(at_once).sum())
    finite = Check("logits are finite", "fail" if broken else "pass", value=broken, limit=0, note="NaN or infinite")
    if broken:
        return [finite]
    difference = float(np.sqrt(np.mean((runtime.stepwise_logits(ids) - at_once) ** 2)) / at_once.std())
    limit = max(CACHE_LIMITS[compute], *(ROUNDING_LIMITS[dtype] for dtype in rounding), 0)
    verdict: Verdict = "pass" if difference <= limit else "fail"
    note = "one token at a time against all at once: root mean square, in standard deviations of the logits"
    return [finite, Check("cache agrees with prefill", verdict, value=difference, limit=limit, note=note)]


def judge_vocabulary(runtime: Stepper, folder: Path) -> Check:
    """Whether the tokenizer beside the engine gives ids that the engine has."""
    name = "tokenizer fits the engine"
    if not (folder / "tokenizer.json").is_file():
        return Check(name, "warn", note="there is no tokenizer.json beside the engine")
    size, limit = Tokenizer.load(folder).size, runtime.vocab_size
    # vocabularies are padded to round numbers, never by a tenth
    verdict: Verdict = "fail" if size > limit else "warn" if size < 0.9 * limit else "pass"
    return Check(name, verdict, value=size, limit=limit, note="ids the tokenizer knows, rows the engine has")
