"""What the workers of `baseline` and `validate` do: run the source, look at the checkpoint, run the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import events
from ..host import Host
from ..tokenizer import Tokenizer
from ..types import (
    BASELINE,
    CALIBRATION,
    HF_CHECKPOINT,
    TRTLLM_CHECKPOINT,
    Check,
    Findings,
    Measure,
    Provider,
    StageContext,
)
from . import texts

#: What is read and asked unless the user gives texts of their own.
BUILTIN = "package:engine_recipes/gate/texts.jsonl"


def record(host: Host, provider: Provider, context: StageContext) -> dict[str, Any]:
    """Run the source with a reference and write what it says to `context.out`. Returns what the manifest tells."""
    from ..checkpoint import open_source
    from . import baseline

    with open_source(context.input(HF_CHECKPOINT)) as source:
        tokenizer = Tokenizer.load(source.folder)
    events.progress("loading the source", 0, 0, "")
    with TemporaryDirectory(prefix="engine-recipes-") as scratch:
        runtime = host.load_source(provider, replace(context, out=Path(scratch)))
        try:
            about = {"reference": str(provider)}
            baseline.record(context.out, runtime, tokenizer, material(context), **_sizes(context), about=about)
        finally:
            runtime.close()
    return about


def measure(host: Host, providers: Sequence[Provider], context: StageContext, claims: Mapping[str, Any]) -> Findings:
    """Everything about an engine: its checkpoint, what it computes and says, and what its plugins ask.

    Args:
        providers: family, precision and engine.
        claims: `algorithm` and `bits` of the precision; `not_compared`: why there is no baseline.
    """
    findings = _artifact(context, claims) + _behaviour(host, providers[-1], context, claims["not_compared"])
    answers = host.validate(context)
    measures = tuple(answer for answer in answers if isinstance(answer, Measure))
    return findings + Findings(measures, tuple(answer for answer in answers if isinstance(answer, Check)))


def material(context: StageContext) -> texts.Material:
    """What engines read and are asked."""
    return texts.load(str(context.options["texts"]), BUILTIN)


def _sizes(context: StageContext) -> dict[str, Any]:
    return {name: int(context.options[name]) for name in ("window", "max_tokens")}


def _artifact(context: StageContext, claims: Mapping[str, Any]) -> Findings:
    """The checkpoint's weights and settings, before anything is run."""
    kinds = {artifact.kind for artifact in context.inputs}
    if TRTLLM_CHECKPOINT not in kinds:
        return Findings()
    from ..checkpoint import open_source, read_statistics
    from . import artifact

    statistics = read_statistics(context.input(CALIBRATION).path) if CALIBRATION in kinds else None
    with open_source(context.input(HF_CHECKPOINT)) as source:
        found = artifact.examine(
            context.input(TRTLLM_CHECKPOINT).path,
            source,
            algorithm=claims["algorithm"],
            bits=claims["bits"],
            statistics=statistics,
        )
        return found + Findings(checks=(artifact.tokenizer_check(source.folder, context.inputs[0].path),))


def _behaviour(host: Host, engine: Provider, context: StageContext, not_compared: str) -> Findings:
    """What the engine computes and says."""
    folder = context.inputs[0].path
    if not (folder / "tokenizer.json").is_file():
        return Findings(checks=(Check("engine speaks", "warn", note="there is no tokenizer: it was not run"),))
    from . import baseline, behaviour

    known = next((baseline.read(given.path) for given in context.inputs if given.kind == BASELINE), None)
    events.progress("loading the engine", 0, 0, "")
    runtime = host.load_engine(engine, folder, {})
    try:
        tokenizer = Tokenizer.load(folder)
        sizes = _sizes(context)
        return behaviour.observe(
            runtime, tokenizer, material(context), known, **sizes, not_compared=not_compared or "there is no baseline"
        )
    finally:
        runtime.close()
