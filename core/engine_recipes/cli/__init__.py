"""The command line: wiring only. Each command's module is imported when it is called, so `--help` stays instant."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import RecipesError, StageFailed, did_you_mean, printable

#: command -> (module, one line of help). The module holds a click command of the same name.
COMMANDS = {
    "list": ("listing", "every model × precision × engine, and what can be built here"),
    "show": ("listing", "one recipe: source, settings and where they come from, needs, sizes"),
    "fetch": ("building", "download a checkpoint: the only command that does"),
    "plan": ("building", "the stages that build would run; changes nothing"),
    "build": ("building", "build engines: resolve, stage 1, stage 2, validate"),
    "validate": ("judging", "judge an engine or a checkpoint against the unquantised source"),
    "run": ("running", "generate text with a built engine"),
    "bench": ("benching", "speed and memory of built engines"),
    "compare": ("comparing", "engines side by side: sizes, times, speed, quality; one page with plots"),
    "engines": ("upkeep", "what has been built"),
    "rm": ("upkeep", "remove one engine"),
    "gc": ("upkeep", "remove what nothing refers to"),
    "plugins": ("packages", "installed packages: what each adds, and what is wrong with them"),
    "new": ("starting", "write a plugin package: a family, a precision, an engine, or models and settings"),
    "doctor": ("machine", "this machine: what can be built here, what to install for the rest"),
    "completion": ("machine", "print a completion script for bash, zsh or fish"),
}


class _ReaderHasGone(Exception):
    """Nobody reads stdout any more."""


class Commands(click.Group):
    """A group that knows its commands' names without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f".{COMMANDS[cmd_name][0]}", __name__)
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"no command {args[0]!r}\n{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:  # None: closed by the shell, `>&-`
                sys.stdout.flush()
        except BrokenPipeError:  # `recipes list | head` is no failure; click would make exit code 1 of it
            raise _ReaderHasGone from None
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="A REF is MODEL[:PRECISION][@ENGINE]: qwen2.5-7b:fp16, ./my-finetune:bf16, Qwen/Qwen3-0.6B@onnxruntime.",
)
@click.version_option(__version__, message="%(version)s")
def cli() -> None:
    """Hugging Face checkpoint in, persistent inference engine out: built once, judged, deployed many times."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code that docs/reference/exit-codes.md promises."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(sign) is not signal.SIG_IGN:  # nohup
            signal.signal(sign, _interrupt)
    try:
        code = cli.main(arguments, prog_name="recipes", standalone_mode=False)
    except RecipesError as error:
        report(error)
        code = error.exit_code
    except click.ClickException as error:
        message, _, hint = error.format_message().partition("\n")
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "recipes"
        _say(message, hint or f"see `{where} --help`")
        code = 2
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted", "nothing that was finished is lost")
        code = 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _say("no space left on the device that the output goes to", "free some, or send it elsewhere")
        code = 3
    except _ReaderHasGone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter's last flush must find an open file
        code = 0
    sys.exit(code or 0)


def style(text: str, **looks: Any) -> str:
    """Text with colour and weight, unless `NO_COLOR` is set (https://no-color.org). Pipes get none either way."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **looks)


def report(error: RecipesError) -> None:
    """Two lines on stderr; before them what the failed tool printed last."""
    if isinstance(error, StageFailed) and error.output:
        click.echo(error.output, err=True)
    _say(error.message, error.hint)
    if os.environ.get("RECIPES_DEBUG", "0") != "0":
        raise error


def _say(message: str, hint: str) -> None:
    click.echo(f"{style('error:', fg='red')} {printable(message)}", err=True)
    if hint:
        click.echo(f"       {printable(hint)}", err=True)


def _interrupt(sign: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
