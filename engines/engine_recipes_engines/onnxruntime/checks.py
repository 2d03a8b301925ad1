"""What the engine can check about itself, without the source model."""

from __future__ import annotations

import time
from pathlib import Path

from engine_recipes import Check, Tokenizer, Verdict

from .runtime import OnnxRuntime

#: Tokens of the sample: some more than a few steps, few enough for a second of work on a small model.
SAMPLE = 32
#: Largest difference between prefill and steps, in standard deviations of the logits. The two multiply the same
#: numbers in another order, so they differ by rounding: some 1e-5 in float32, grown by the number of layers. A wrong
#: position or cache entry gives differences around 1.
CACHE_LIMITS = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}


def judge(folder: Path) -> list[Check]:
    """All checks of one engine folder. An engine that cannot be loaded raises, with what to do about it."""
    start = time.perf_counter()
    runtime = OnnxRuntime(folder, {})
    try:
        took = time.perf_counter() - start
        checks = [Check("engine loads", "pass", value=round(took, 3), note="seconds")]
        return [*checks, *_numbers(runtime), _vocabulary(runtime, folder)]
    finally:
        runtime.close()


def _numbers(runtime: OnnxRuntime) -> list[Check]:
    import numpy as np

    count = min(SAMPLE, runtime.max_seq_len)
    ids = np.random.default_rng(0).integers(runtime.vocab_size, size=count).tolist()
    at_once = runtime.logits(ids)  # [count, vocabulary]
    broken = int(np.size(at_once) - np.isfinite(at_once).sum())
    finite = Check("logits are finite", "fail" if broken else "pass", value=broken, limit=0, note="NaN or infinite")
    if broken:
        return [finite]
    difference = float(np.abs(runtime.stepwise_logits(ids) - at_once).max() / at_once.std())
    limit = CACHE_LIMITS[runtime.compute]
    verdict: Verdict = "pass" if difference <= limit else "fail"
    note = "one token at a time against all at once, in standard deviations of the logits"
    return [finite, Check("cache agrees with prefill", verdict, value=difference, limit=limit, note=note)]


def _vocabulary(runtime: OnnxRuntime, folder: Path) -> Check:
    name = "tokenizer fits the engine"
    if not (folder / "tokenizer.json").is_file():
        return Check(name, "warn", note="there is no tokenizer.json beside the engine")
    size, limit = Tokenizer.load(folder).size, runtime.vocab_size
    # vocabularies are padded to round numbers, never by a tenth
    verdict: Verdict = "fail" if size > limit else "warn" if size < 0.9 * limit else "pass"
    return Check(name, verdict, value=size, limit=limit, note="ids the tokenizer knows, rows the engine has")
