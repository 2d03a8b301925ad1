"""What the workers of `baseline` and `validate` do: run the source, look at the checkpoint, run the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import events
from ..errors import MachineError, RecipesError, RequestError, first_line
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
    Runtime,
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
    with TemporaryDirectory(prefix=".tmp-", dir=context.out) as scratch:  # the source again, it may be large
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
        claims: `algorithm`, `bits` and `gives` of the precision; `not_compared`: why there is no baseline;
            `unwitnessed`: why the baseline would not show that the model is described wrongly; `cannot_run`: why this
            machine cannot run the engine, which is simulated then; `engine_options`: for loading it.

    Raises:
        MachineError: this machine cannot run it, which is not the engine's fault.
    """
    findings, why, options = _artifact(context, claims), claims["cannot_run"], claims["engine_options"]
    if claims["unwitnessed"]:
        findings += Findings(checks=(Check("model is described rightly", "warn", note=claims["unwitnessed"]),))
    if why:
        findings += _not_run(why)
    try:
        if why:
            runtime = _simulated(host, providers[-1], context, why)
        else:
            runtime = host.load_engine(providers[-1], context.inputs[0].path, options)
    except MachineError:
        raise
    except Exception as error:  # an engine's own code, on files that may be damaged
        note = error.message if isinstance(error, RecipesError) else first_line(error)
        return findings + Findings(checks=(Check("engine loads", "fail", note=note),))
    try:
        findings += _behaviour(runtime, context, claims["not_compared"])
    finally:
        runtime.close()
    answers = host.validate(context)
    measures = tuple(answer for answer in answers if isinstance(answer, Measure))
    return findings + Findings(measures, tuple(answer for answer in answers if isinstance(answer, Check)))


def _not_run(why: str) -> Findings:
    note = f"{why}: its arithmetic was simulated; validate it again where it will run"
    return Findings(checks=(Check("engine ran", "warn", note=note),))


def _simulated(host: Host, provider: Provider, context: StageContext, why: str) -> Runtime:
    try:
        runtime = host.simulate(provider, context)
    except RequestError:  # what it would compute from is not here
        runtime = None
    if runtime is None:
        raise MachineError(why, "copy its folder to such a machine and run `recipes validate FOLDER` there")
    return runtime


def material(context: StageContext) -> texts.Material:
    """What engines read and are asked."""
    return texts.load(str(context.options["texts"]), BUILTIN)


def _sizes(context: StageContext) -> dict[str, Any]:
    return {name: int(context.options[name]) for name in ("window", "max_tokens")}


def _artifact(context: StageContext, claims: Mapping[str, Any]) -> Findings:
    """Tokenizer, and the checkpoint's weights and settings, before anything is run."""
    from ..checkpoint import open_source, read_statistics
    from . import artifact

    kinds = {given.kind for given in context.inputs}
    with open_source(context.input(HF_CHECKPOINT)) as source:
        found = Findings(checks=(artifact.tokenizer_check(source.folder, context.inputs[0].path),))
        if claims["gives"] != TRTLLM_CHECKPOINT:
            note = f"how a {claims['gives']} stores them is not known here"
            return found + Findings(checks=(Check("weights compared", "not run", note=note),))
        if TRTLLM_CHECKPOINT not in kinds:
            note = "the checkpoint it was made from is not here: weights, scales and settings were not compared"
            return found + Findings(checks=(Check("weights compared", "warn", note=note),))
        statistics = read_statistics(context.input(CALIBRATION).path) if CALIBRATION in kinds else None
        folder, bits = context.input(TRTLLM_CHECKPOINT).path, claims["bits"]
        return found + artifact.examine(folder, source, algorithm=claims["algorithm"], bits=bits, statistics=statistics)


def _behaviour(runtime: Runtime, context: StageContext, not_compared: str) -> Findings:
    """What the engine computes and says."""
    from . import baseline, behaviour

    folder = context.inputs[0].path
    if not (folder / "tokenizer.json").is_file():
        return Findings(checks=(Check("engine speaks", "warn", note="there is no tokenizer: it was not run"),))
    known = next((baseline.read(given.path) for given in context.inputs if given.kind == BASELINE), None)
    tokenizer, sizes = Tokenizer.load(folder), _sizes(context)
    return behaviour.observe(runtime, tokenizer, material(context), known, **sizes, not_compared=not_compared)
