"""The hooks. A plugin is a module with some of these functions, marked `@hookimpl`; nothing to inherit.

Each hook is called on the provider that the plan chose, by name; `validate` alone is asked of everyone involved
(family, precision and engine).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pluggy

from .decoder import Decoder
from .types import Check, Measure, Report, Runtime, StageContext, Value

NAME = "engine_recipes"
hookspec = pluggy.HookspecMarker(NAME)
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec
def resolve_checkpoint(context: StageContext, config: Mapping[str, Any]) -> Decoder:
    """Say what the model is. Called on the family, in a worker, after the source folder passed its checks.

    Args:
        context: as for every stage. `context.out` is for files a family wants beside the description; most
            write none.
        config: the checkpoint's parsed `config.json`.

    Returns:
        The description. Core then demands exactly the tensors, shapes and dtypes that it implies.

    Example:
        ```python
        from engine_recipes import Decoder, from_hf, hookimpl

        @hookimpl
        def resolve_checkpoint(config) -> Decoder:
            return from_hf(config, qkv_bias=True, dense_bias=False)
        ```
    """


@hookspec
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse early what can never work. Called on the calibration, the precision and the engine, before long work.

    Args:
        context: of the provider's own stage: its options and the target. Its inputs are
            what is there so far, and nothing is written.
        decoder: what the family said the model is.

    Example:
        ```python
        from engine_recipes import RequestError, hookimpl

        @hookimpl
        def check_decoder(decoder) -> None:
            if decoder.head_size % 8:
                raise RequestError(f"heads of {decoder.head_size}", "choose another engine")
        ```
    """


@hookspec
def calibrate(context: StageContext) -> None:
    """Measure what stage 1 needs to know beside the weights. Called on the calibration that the precision names.

    Write an artifact of the kind that the registry entry `gives` into `context.out`; for `calibration` that is what
    `checkpoint.write_statistics` writes. It is kept under a key of its own: neither another choice in stage 1 nor
    another precision that names the same calibration measures again.

    Example:
        ```python
        from engine_recipes import checkpoint, hookimpl, read_texts

        @hookimpl
        def calibrate(context) -> None:
            source = checkpoint.open_source(context.input("hf-checkpoint"))
            amax = measure_somehow(source, read_texts(str(context.options["data"])))
            checkpoint.write_statistics(context.out, amax, {"method": "mine"})
        ```
    """


@hookspec
def stage1(context: StageContext) -> None:
    """Convert or quantize. Called on the precision, in a worker.

    Write an artifact of the kind that the registry entry `gives` into `context.out`; for `trtllm-checkpoint` that
    is `config.json` and `rank<r>.safetensors`, which core verifies before it publishes them.

    Example:
        ```python
        from engine_recipes import checkpoint, hookimpl

        @hookimpl
        def stage1(context) -> None:
            source = checkpoint.open_source(context.input("hf-checkpoint"))
            checkpoint.convert(source, context.out, dtype="float16", tp_size=1, pp_size=1)
        ```
    """


@hookspec
def command(context: StageContext) -> Sequence[str]:
    """Which program of the user's stage 2 would run, and with which arguments. Called on engines that name `programs`.

    `recipes plan` shows it; nothing is run, and nothing of `context.inputs` need exist. Called in the caller's process:
    it must be quick and import nothing heavy.

    Args:
        context: of stage 2. Its `out` is where the engine will lie in the end.

    Example:
        ```python
        from engine_recipes import hookimpl

        @hookimpl
        def command(context):
            return ["acme-build", str(context.input("trtllm-checkpoint").path), "--output", str(context.out)]
        ```
    """


@hookspec
def stage2(context: StageContext) -> Mapping[str, Any] | None:
    """Compile. Called on the engine, in a worker.

    Turn the checkpoint in `context.inputs` into files the engine can load, in `context.out`. Tokenizer files are
    copied beside them by core.

    Returns:
        Nothing, or what the manifest should tell as `result`. Of that `versions` (distribution -> version) is compared
        before the engine is loaded, for what the registry entry `binds`; needed only where the engine's library lies
        in another environment than ours.

    Example:
        ```python
        from engine_recipes import checkpoint, hookimpl

        @hookimpl
        def stage2(context) -> None:
            weights = checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path)
            compile_somehow(weights, context.out / "model.engine")
        ```
    """


@hookspec
def load_source(context: StageContext) -> Runtime:
    """Run the unquantised source, as exactly as can be. Called on the reference, in a worker, for the baseline.

    Args:
        context: its input of kind `hf-checkpoint` is the source. `context.out` is for files that the runtime needs
            meanwhile; it is removed afterwards.

    Returns:
        A Runtime that gives `logits`. Its attribute `about` (str to str), if it has one, is kept with the baseline.

    Raises:
        RequestError: this reference does not know the model.
        MachineError: the model is too large for this machine.

    Example:
        ```python
        from engine_recipes import checkpoint, hookimpl

        @hookimpl
        def load_source(context):
            with checkpoint.open_source(context.input("hf-checkpoint")) as source:
                return MyRuntime(source.folder)
        ```
    """


@hookspec
def fallbacks(context: StageContext, report: Report) -> list[Mapping[str, Value]]:
    """What to try after a rejection. Called on the precision, for `build --fallback`.

    Args:
        context: of the rejected build's stage 1: its options, all of them; nothing is written.
        report: why it was rejected. `report.layers` has the relative weight error of each linear layer.

    Returns:
        Settings that change, as in `--set`, the best offer first. The first that was not tried yet is built, judged,
        and this hook asked again if it is rejected too.

    Example:
        ```python
        from engine_recipes import hookimpl

        @hookimpl
        def fallbacks(context, report):
            return [{"kv_cache": "none"}] if context.options["kv_cache"] != "none" else []
        ```
    """


@hookspec
def validate(context: StageContext) -> list[Check | Measure]:
    """Judge what was built. Called on the family, the precision and the engine, in a worker.

    `context.inputs` are the engine, the checkpoint, the calibration if there is one, and the source. Return one Check
    a question asked, with value and limit where there are numbers; or a Measure of a metric that your registry
    defines, whose limits users can set. Core adds what it measures itself and joins it all; one `fail` rejects
    the engine.

    Example:
        ```python
        from engine_recipes import Check, hookimpl

        @hookimpl
        def validate(context) -> list[Check]:
            size = sum(f.stat().st_size for f in context.inputs[0].path.iterdir())
            return [Check("engine size", "pass" if size else "fail", value=size, limit=1, note="bytes")]
        ```
    """


@hookspec
def simulate(context: StageContext) -> Runtime:
    """Compute what the engine computes on a machine where it cannot run. Called on the engine, in a worker. Optional.

    `validate` asks for it where the engine's GPU is not here, so that a build can be judged all the same; the verdict
    says that the engine itself did not run, and is at best a warning.

    Args:
        context: of validate: the engine, the checkpoint and the source are among its inputs. `context.out` is for
            files that the runtime needs meanwhile.

    Returns:
        A Runtime that gives the same numbers, as far as arithmetic allows.

    Example:
        ```python
        from engine_recipes import checkpoint, hookimpl

        @hookimpl
        def simulate(context):
            with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
                return MyRuntimeOnTheCpu(weights)
        ```
    """


@hookspec
def load_engine(folder: Path, options: Mapping[str, Any]) -> Runtime:
    """Load a built engine. Called on the engine, by `run`, `validate` and `bench` alike.

    Args:
        folder: the engine's folder, as stage 2 wrote it, with tokenizer files and `manifest.json`.
        options: those of stage 2 as they are settled on this machine, and over them what was given to
            `engine_recipes.load`; may be ignored.

    Returns:
        A Runtime. Its `logits` may return None where the engine does not give them. It may have `generate_batch` as
        well (see `engine_recipes.bench.BatchRuntime`), which `recipes bench --batch` needs.

    Example:
        ```python
        from engine_recipes import hookimpl

        @hookimpl
        def load_engine(folder):
            return MyRuntime(folder / "model.engine")
        ```
    """
