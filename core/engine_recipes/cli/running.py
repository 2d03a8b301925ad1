"""`run`: text from a built engine, streamed to stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO

import click

from ..api import Loaded, Setup, load_plan
from ..errors import RequestError, StageFailed
from ..foreign import check_provider
from ..imports import survives
from ..refs import is_folder
from ..store import read_manifest
from ..types import Sampling
from .common import complete_ref, json_option, print_json, quiet_option, recipe_options


@click.command("run")
@click.argument("ref", shell_complete=complete_ref)
@click.argument("prompt")
@click.option(
    "--max-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="most tokens of the answer"
)
@click.option(
    "--temperature", type=click.FloatRange(min=0, max=100), default=0.0, show_default=True, help="0 is greedy"
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the sampler")
@click.option("--raw", is_flag=True, help="no chat template: the prompt as it is")
@json_option
@quiet_option
@recipe_options
def run_command(
    ref: str,
    prompt: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    raw: bool,
    as_json: bool,
    quiet: bool,
    setup: Setup,
    choices: dict[str, Any],
) -> None:
    """Generate text with a built engine."""
    if temperature != temperature:  # NaN passes every range
        raise click.UsageError("--temperature is no number\ngive 0 for greedy, or a number up to 100")
    if not prompt.strip():
        raise click.UsageError("the prompt is empty\nsay something")
    if not prompt.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise click.UsageError("the prompt is no UTF-8 text\ncheck the encoding of your terminal or file")
    _check_not_folder(ref, setup)
    plan = setup.plan(ref, **choices)
    survives(plan.stage("stage2").provider, f"run of {plan.ref}", setup.store, plan.gpus)
    stdout = _take_stdout() if as_json else None
    started = time.monotonic()
    loaded = load_plan(setup, plan)
    seconds = time.monotonic() - started
    answer = Answer(loaded, prompt, Sampling(max_tokens, temperature, seed), raw)
    try:
        for piece in answer.stream():
            if not as_json:
                click.echo(piece, nl=False)
    except BaseException:
        with suppress(StageFailed):  # what went wrong first is what is told
            loaded.runtime.close()
        raise
    loaded.runtime.close()
    if stdout:
        with stdout, redirect_stdout(stdout):
            print_json(answer.as_json(seconds))
        return
    click.echo()
    if not quiet:
        rate = answer.tokens_per_second
        speed = f", {rate:.1f} tokens/s after the first" if rate else ""
        loading = f"loaded in {seconds:.2f} s, first token after {answer.first_token_seconds:.2f} s"
        click.echo(f"[{loading}, {answer.generated_tokens} tokens{speed}]", err=True)


def _check_not_folder(ref: str, setup: Setup) -> None:
    """An engine is run by the reference that it was built as: its folder would be taken for a model's."""
    manifest = read_manifest(Path(os.path.expanduser(ref))) if is_folder(ref) else None
    if manifest and manifest.get("stage") == "stage2":
        check_provider(setup.registry, manifest, ref)
        raise RequestError(f"{ref} is an engine, not a model", f"run it as {manifest.get('ref')}")


def _take_stdout() -> TextIO:
    """What stdout was: from now on whatever an engine prints, from C too and at exit, goes to stderr."""
    if sys.stdout is None:  # closed by the shell, `>&-`
        return open(os.devnull, "w", encoding="utf-8")
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2 if sys.stderr else os.open(os.devnull, os.O_WRONLY), 1)
    return ours


class Answer:
    """One generation, timed while it streams."""

    def __init__(self, loaded: Loaded, prompt: str, sampling: Sampling, raw: bool) -> None:
        self._loaded, self._sampling = loaded, sampling
        tokenizer = loaded.tokenizer
        text = prompt if raw else tokenizer.chat([{"role": "user", "content": prompt}])
        self._ids = tokenizer.encode(text, special=raw)
        self.text = ""
        self.generated_tokens = 0
        self.first_token_seconds = 0.0
        self._seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first, over the time after the first."""
        more = self._seconds - self.first_token_seconds
        return (self.generated_tokens - 1) / more if self.generated_tokens > 1 and more > 0 else 0.0

    def stream(self) -> Iterator[str]:
        """Pieces of text as they are generated."""
        for piece in self._loaded.tokenizer.stream(self._timed()):
            self.text += piece
            yield piece

    def _timed(self) -> Iterator[int]:
        started = time.monotonic()
        for token in self._loaded.runtime.generate(self._ids, self._sampling, self._loaded.tokenizer.stop_ids):
            self._seconds = time.monotonic() - started
            self.generated_tokens += 1
            if self.generated_tokens == 1:
                self.first_token_seconds = self._seconds
            yield token

    def as_json(self, load_seconds: float) -> dict[str, object]:
        """The document of `run --json`."""
        return {
            "schema": 1,
            "text": self.text,
            "prompt_tokens": len(self._ids),
            "generated_tokens": self.generated_tokens,
            "load_seconds": round(load_seconds, 3),
            "first_token_seconds": round(self.first_token_seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }
