"""The hooks. A plugin is a module with some of these functions, marked `@hookimpl`; nothing to inherit.

Each hook is called on the provider that the plan chose, by name; `validate` alone is asked of everyone involved
(family, precision and engine). An implementation may take just the arguments that it needs.

The texts below are the documentation: `docs/generate.py` makes `docs/reference/hooks.md` of them, and tests run every
example. Together the examples are one package, `engine_recipes_acme`; the first line of each says in which module it
lies.
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
#: Marks a plugin's function as an implementation of the hook of its name.
hookimpl = pluggy.HookimplMarker(NAME)


@hookspec
def resolve_checkpoint(context: StageContext, config: Mapping[str, Any]) -> Decoder:
    """Say what the model is.

    Called:
        On the family, in a worker, after the source folder passed its checks.

    `engine_recipes.from_hf` reads the common keys and both layouts of rope settings, and never falls back to a rope
    base that the checkpoint does not state. A family says only how it differs.

    Args:
        context: as for every stage. `context.out` is for files a family wants beside the description; most
            write none.
        config: the checkpoint's parsed `config.json`.

    Returns:
        The description. Core then demands exactly the tensors, shapes and dtypes that it implies.

    Raises:
        RequestError: the config says something that the description has no field for.

    Example:
        ```python
        # engine_recipes_acme/family.py
        from engine_recipes import Decoder, RequestError, from_hf, hookimpl


        @hookimpl
        def resolve_checkpoint(config) -> Decoder:
            if config.get("sliding_window"):
                raise RequestError("this model attends within a window", "choose one that attends to everything")
            return from_hf(config, qkv_bias=True, dense_bias=False)
        ```
    """


@hookspec
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse early what can never work.

    Called:
        On the calibration, the precision, the engine and the reference, in a worker, before the first long stage.

    So a split or a size that cannot work costs a second and not an hour. Optional.

    Args:
        context: of the provider's own stage: its options and the target. Its inputs are what is there so far, and
            nothing is written.
        decoder: what the family said the model is.

    Raises:
        RequestError: this model cannot be done, or not with these options.

    Example:
        ```python
        # engine_recipes_acme/engine.py
        from engine_recipes import RequestError, hookimpl


        @hookimpl
        def check_decoder(decoder) -> None:
            if decoder.tied:
                raise RequestError("the head of this model is its embedding", "choose another engine")
        ```
    """


@hookspec
def calibrate(context: StageContext) -> None:
    """Measure what stage 1 needs to know beside the weights.

    Called:
        On the calibration that the precision names, in a worker, after the source was resolved.

    Write an artifact of the kind that the registry entry `gives` into `context.out`; for `calibration` that is what
    `checkpoint.write_statistics` writes: [names and shapes](checkpoint-format.md#statistics). Stage 1 reads it with
    `checkpoint.read_statistics(context.input("calibration").path)`, and `checkpoint.quantize` makes an FP8 or int4-awq
    checkpoint of statistics with these names, whoever measured them. It is kept under a key of its own: neither another
    choice in stage 1 nor another precision that names the same calibration measures again. `engine_recipes.read_texts`
    reads the text that an option with `data = true` names.

    Args:
        context: its input of kind `hf-checkpoint` is the source.

    Raises:
        RequestError: the text or an option does not fit the model.
        MachineError: something is missing on this machine.

    Example:
        ```python
        # engine_recipes_acme/bounds.py: what RMS norm gives has at most the length √n, so no text is needed
        from engine_recipes import checkpoint, hookimpl


        @hookimpl
        def calibrate(context) -> None:
            bounds = {}
            with checkpoint.open_source(context.input("hf-checkpoint")) as source:
                names = source.decoder.names
                for layer in range(source.decoder.layers):
                    for norm, linears in (("input_norm", ("q", "k", "v")), ("post_norm", ("gate", "up"))):
                        largest = abs(source.array(names[norm].format(layer)).astype("float32")).max()
                        for linear in linears:
                            bound = largest * source.decoder.hidden_size**0.5
                            bounds[names[linear].format(layer) + ".input_amax"] = [bound]
            checkpoint.write_statistics(context.out, bounds, {"method": "acme-bounds"})
        ```
    """


@hookspec
def stage1(context: StageContext) -> None:
    """Convert or quantize.

    Called:
        On the precision, in a worker, after the calibration if it names one.

    Write an artifact of the kind that the registry entry `gives` into `context.out`; for `trtllm-checkpoint` that
    is `config.json` and `rank<r>.safetensors`, [described here](checkpoint-format.md), which core verifies before it
    publishes them.

    Args:
        context: its inputs are the calibration, if there is one, and the source.

    Raises:
        RequestError: the model or an option cannot be done.
        MachineError: no room, or something is missing on this machine.

    Example:
        ```python
        # engine_recipes_acme/precision.py
        from engine_recipes import checkpoint, hookimpl


        @hookimpl
        def stage1(context) -> None:
            with checkpoint.open_source(context.input("hf-checkpoint")) as source:
                checkpoint.convert(source, context.out, dtype=context.options["dtype"])
        ```
    """


@hookspec
def stage2(context: StageContext) -> Mapping[str, Any] | None:
    """Compile.

    Called:
        On the engine, in a worker, after stage 1.

    Turn the checkpoint in `context.inputs` into files the engine can load, in `context.out`. Tokenizer files are
    copied beside them by core. `context.cache` is a folder of the engine's own that outlives builds.

    Args:
        context: its inputs are the checkpoint, the calibration if there is one, and the source.

    Returns:
        Nothing, or what the manifest should tell as `result`. Of that `versions` (distribution -> version) is compared
        before the engine is loaded, for what the registry entry `binds`; needed only where the engine's library lies
        in another environment than ours.

    Raises:
        RequestError: the model or an option cannot be done.
        StageFailed: a tool that was called failed; its `output` is shown.

    Example:
        ```python
        # engine_recipes_acme/engine.py
        from engine_recipes import checkpoint, hookimpl

        TABLES = ("transformer.vocab_embedding.weight", "lm_head.weight")  # both [vocabulary, hidden]


        @hookimpl
        def stage2(context):
            import numpy as np

            with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
                embedding, head = (weights.array(name).astype(np.float32) for name in TABLES)
                np.savez(context.out / "weights.npz", embedding=embedding, head=head)
            return {"layers": 0}
        ```
    """


@hookspec
def command(context: StageContext) -> Sequence[str]:
    """Which program of the user's stage 2 would run, and with which arguments.

    Called:
        On the engine if its entry names `programs`, in a worker, for `recipes plan` to print it.

    Nothing is run, and nothing of `context.inputs` need exist. It must be quick and import nothing heavy.

    Args:
        context: of stage 2. Its `out` is where the engine will lie in the end.

    Returns:
        The program and its arguments, word by word.

    Example:
        ```python
        # engine_recipes_acme/tool.py
        from engine_recipes import hookimpl


        @hookimpl
        def command(context):
            return ["acme-build", str(context.input("trtllm-checkpoint").path), "--output", str(context.out)]
        ```
    """


@hookspec
def simulate(context: StageContext) -> Runtime:
    """Compute what the engine computes on a machine where it cannot run.

    Called:
        On the engine, in a worker, by `validate` where the engine's GPU is not in this machine.

    So a build can be judged all the same; the verdict says that the engine itself did not run, and is at best a
    warning. Optional.

    Args:
        context: of validate: the engine, the checkpoint and the source are among its inputs. `context.out` is for
            files that the runtime needs meanwhile.

    Returns:
        A `Runtime` that gives the same numbers, as far as arithmetic allows.

    Example:
        ```python
        # engine_recipes_acme/engine.py
        from engine_recipes import checkpoint, hookimpl


        @hookimpl
        def simulate(context):
            with checkpoint.open_checkpoint(context.input("trtllm-checkpoint").path) as weights:
                return Bigram(*(weights.array(name).astype("float32") for name in TABLES))
        ```
    """


@hookspec
def load_source(context: StageContext) -> Runtime:
    """Run the unquantised source, as exactly as can be.

    Called:
        On the reference, in a worker, once for each source.

    What it says is the baseline that builds of this model are compared with.

    Args:
        context: its input of kind `hf-checkpoint` is the source. `context.out` is for files that the runtime needs
            meanwhile; it is removed afterwards.

    Returns:
        A `Runtime` that gives `logits`. Its attribute `about` (str to str), if it has one, is kept with the baseline.

    Raises:
        RequestError: this reference does not know the model.
        MachineError: the model is too large for this machine.

    Example:
        ```python
        # engine_recipes_acme/reference.py
        from engine_recipes import checkpoint, hookimpl

        from .engine import Bigram


        @hookimpl
        def load_source(context):
            with checkpoint.open_source(context.input("hf-checkpoint")) as source:
                tables = (source.decoder.names[role] for role in ("embedding", "lm_head"))
                return Bigram(*(source.array(name).astype("float32") for name in tables))
        ```
    """


@hookspec
def validate(context: StageContext) -> list[Check | Measure]:
    """Judge what was built.

    Called:
        On the family, the precision and the engine, in a worker, after stage 2 and by `recipes validate`.

    A `Check` has its verdict; a `Measure` is a number of a metric that your registry defines, judged by limits that
    users can set (`--set gate.acme_gigabytes.fail=3`). Core adds what it measures itself and joins it all; one `fail`
    rejects the engine. Optional.

    Args:
        context: its inputs are the engine, the checkpoint, the calibration if there is one, the source, and last the
            baseline if there is one.

    Returns:
        One `Check` a question asked, with value and limit where there are numbers, and any number of `Measure`.

    Example:
        ```python
        # engine_recipes_acme/engine.py
        from zipfile import is_zipfile

        from engine_recipes import Check, Measure, hookimpl


        @hookimpl
        def validate(context) -> list[Check | Measure]:
            weights = context.input("acme-engine").path / "weights.npz"
            return [
                Check("weights are whole", "pass" if is_zipfile(weights) else "fail"),
                Measure("acme_gigabytes", weights.stat().st_size / 1e9, note="on disk"),
            ]
        ```
    """


@hookspec
def fallbacks(context: StageContext, report: Report) -> list[Mapping[str, Value]]:
    """What to try after a rejection.

    Called:
        On the precision, in a worker, for `build --fallback`.

    The first offer that was not tried yet is built and judged, and this hook asked again if it is rejected too.
    Optional.

    Args:
        context: of the rejected build's stage 1: its options, all of them; nothing is written.
        report: why it was rejected. `report.layers` has the relative weight error of each linear layer.

    Returns:
        Settings that change, as in `--set`, the best offer first.

    Example:
        ```python
        # engine_recipes_acme/precision.py
        from engine_recipes import hookimpl


        @hookimpl
        def fallbacks(context, report):
            overflowed = "logits are finite" in report.failed and context.options["dtype"] == "float16"
            return [{"dtype": "bfloat16"}] if overflowed else []
        ```
    """


@hookspec
def load_engine(folder: Path, options: Mapping[str, Any]) -> Runtime:
    """Load a built engine.

    Called:
        On the engine, in a worker or the caller's process, by `run`, `validate` and `bench` alike.

    `engine_recipes.stepping` has all of a runtime but the arithmetic, for engines that are fed tokens and give logits.

    Args:
        folder: the engine's folder, as stage 2 wrote it, with tokenizer files and `manifest.json`. It may have been
            moved, and it may be read-only.
        options: those of stage 2 as they are settled on this machine, and over them what was given to
            `engine_recipes.load`; may be ignored.

    Returns:
        A `Runtime`. Its `logits` may return None where the engine does not give them. It may have `generate_batch` as
        well (a list of prompts of one length, and the sampling, give a list of ids a step), which
        `recipes bench --batch` needs.

    Raises:
        RequestError: the folder is damaged.
        MachineError: this machine cannot run it.

    Example:
        ```python
        # engine_recipes_acme/engine.py: embedding times head, the smallest thing that generates
        from engine_recipes import hookimpl, stepping


        class Bigram(stepping.Stepper):
            def __init__(self, embedding, head) -> None:  # both float32 [vocabulary, hidden]
                super().__init__((embedding, head), max_seq_len=4096, vocab_size=len(head))

            def start(self, length, batch):
                return BigramRun(self, batch)


        class BigramRun(stepping.Run):
            def __init__(self, engine, batch) -> None:
                super().__init__(batch, engine.vocab_size, stepping.CHUNK)
                self.embedding, self.head = engine.session

            def feed(self, ids, out) -> None:  # a real engine runs its layers here, and fills its cache
                out[:] = self.embedding[ids[:, -out.shape[1] :]] @ self.head.T


        @hookimpl
        def load_engine(folder):
            import numpy as np

            with np.load(folder / "weights.npz", allow_pickle=False) as weights:
                return Bigram(weights["embedding"], weights["head"])
        ```
    """
