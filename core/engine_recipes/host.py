"""Imports the modules a plan names and calls the chosen provider. The only user of pluggy."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from reprlib import Repr, repr as shortened
from traceback import StackSummary, TracebackException
from typing import Any

import pluggy

from . import hookspecs
from .decoder import Decoder
from .errors import MachineError, RecipesError, StageFailed, first_line, one_line
from .types import Check, Findings, Measure, Provider, Report, Runtime, StageContext, Value


class Host:
    """A plugin manager that holds just the providers it was asked to load."""

    def __init__(self, providers: Iterable[Provider] = ()) -> None:
        self._manager = pluggy.PluginManager(hookspecs.NAME)
        self._providers: dict[str, Provider] = {}  # by module
        self._manager.add_hookspecs(hookspecs)
        if os.environ.get("RECIPES_TRACE", "0") != "0":
            self._manager.add_hookcall_monitoring(_trace_call, _trace_result)
        for provider in providers:
            self.load(provider)

    def load(self, provider: Provider) -> None:
        """Import a provider's module and check its hooks. Loading twice is the same as once.

        Raises:
            MachineError: the module cannot be imported, or has a hook that does not exist; whose it is, is said.
            RecipesError: what the module raised, if that is one.
        """
        if self._manager.has_plugin(provider.module):
            return
        try:
            with _time_limit(provider, f"importing {provider.module}"):
                module = import_module(provider.module)
        except (RecipesError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the one guard around foreign code at import
            raise _unusable(provider, first_line(error)) from error
        try:
            self._manager.register(module, name=provider.module)
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            self._manager.unregister(name=provider.module)
            reason = str(error).splitlines()[-1].strip()
            raise _unusable(provider, f"{reason}; hooks are {', '.join(sorted(_HOOKS))}") from error
        self._providers[provider.module] = provider

    def resolve_checkpoint(self, provider: Provider, context: StageContext, config: Mapping[str, Any]) -> Decoder:
        """Ask a family what the model is."""
        decoder = self._one("resolve_checkpoint", provider)(context=context, config=config)
        if not isinstance(decoder, Decoder):
            raise _unusable(provider, f"resolve_checkpoint returned {type(decoder).__name__}, not Decoder")
        return decoder

    def check_decoder(self, provider: Provider, context: StageContext, decoder: Decoder) -> None:
        """Let a provider refuse the model, if it has something to refuse."""
        self._one("check_decoder", provider, optional=True)(context=context, decoder=decoder)

    def calibrate(self, provider: Provider, context: StageContext) -> None:
        """Have a calibration measure the model."""
        self._one("calibrate", provider)(context=context)

    def stage1(self, provider: Provider, context: StageContext) -> None:
        """Have a precision write a checkpoint."""
        self._one("stage1", provider)(context=context)

    def stage2(self, provider: Provider, context: StageContext) -> dict[str, Any]:
        """Have an engine compile. What it tells of it, for the manifest."""
        told = self._one("stage2", provider)(context=context)
        return dict(told) if isinstance(told, Mapping) else {}

    def command(self, provider: Provider, context: StageContext) -> list[str] | None:
        """Ask an engine which program of the user's it would run, with which arguments.

        Raises:
            MachineError: it took too long, or returned something else; whose it is, is said.
        """
        ask = self._one("command", provider, optional=True)
        with _time_limit(provider, "its `command`"):
            words = ask(context=context)
        if words is None:
            return None
        if (
            isinstance(words, (str, bytes))
            or not isinstance(words, Sequence)
            or not all(isinstance(word, str) for word in words)
        ):
            raise _unusable(provider, f"its `command` returned {one_line(shortened(words))}, no sequence of str")
        return list(words)

    def simulate(self, provider: Provider, context: StageContext) -> Runtime | None:
        """Have an engine compute what it would compute where it cannot run; None if it cannot do that."""
        runtime: Runtime | None = self._one("simulate", provider, optional=True)(context=context)
        return runtime

    def load_engine(self, provider: Provider, folder: Path, options: Mapping[str, Any]) -> Runtime:
        """Have an engine load what it compiled.

        Raises:
            StageFailed: it returned something that cannot generate, or cannot be closed.
        """
        runtime: Runtime = self._one("load_engine", provider)(folder=folder, options=options)
        lacking = [name for name in ("generate", "close") if not callable(getattr(runtime, name, None))]
        if lacking:
            raise StageFailed(
                f"load_engine of {provider} returned {type(runtime).__name__}, which has no {lacking[0]}",
                f"report this to the authors of {provider.package}",
            )
        return runtime

    def load_source(self, provider: Provider, context: StageContext) -> Runtime:
        """Have a reference load the unquantised source."""
        runtime: Runtime = self._one("load_source", provider)(context=context)
        return runtime

    def fallbacks(self, provider: Provider, context: StageContext, report: Report) -> list[Mapping[str, Value]]:
        """Ask a precision what to try after a rejection; nothing if it has nothing to offer."""
        return list(self._one("fallbacks", provider, optional=True)(context=context, report=report) or ())

    def validate(self, context: StageContext) -> list[Check | Measure]:
        """Ask everyone who is loaded, in the order of loading."""
        found: list[Check | Measure] = []
        plugins = self._manager.list_name_plugin()
        for name, _ in plugins:
            others = [plugin for other, plugin in plugins if other != name]
            answers = _first(self._manager.subset_hook_caller("validate", others)(context=context)) or ()
            for answer in answers:
                if not _is_answer(answer):
                    raise StageFailed(
                        f"validate of {self._providers[name]} answered {_shown(answer)}, which is no Check "
                        "and no Measure with a name",
                        f"report this to the authors of {self._providers[name].package}",
                    )
                found.append(answer)
        return found

    def _one(self, hook: str, provider: Provider, optional: bool = False) -> Callable[..., Any]:
        """The hook of one provider alone: pluggy would call every plugin and answer with the last registered."""
        self.load(provider)
        others = [p for name, p in self._manager.list_name_plugin() if name != provider.module]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        if not caller.get_hookimpls() and not optional:
            raise _unusable(provider, f"{provider.module} has no `@hookimpl def {hook}`")

        return lambda **arguments: _first(caller(**arguments))


def import_problem(provider: Provider) -> str:
    """Why a provider's module cannot be used: the reason, and the traceback of its own code. Empty if it can."""
    try:
        Host([provider])
    except RecipesError as error:
        found = TracebackException.from_exception(error.__cause__ or error)
        ours = (__file__, "<frozen importlib", importlib.__file__, contextlib.__file__)
        found.stack = StackSummary.from_list([frame for frame in found.stack if not frame.filename.startswith(ours)])
        lines = list(found.format(chain=False))
        if isinstance(error.__cause__, _Hangs):
            lines.pop()  # its name, which says nothing to anybody
        return f"{one_line(error.message)}\n{''.join(lines).rstrip()}"
    return ""


def import_seconds() -> float:
    """How long the import of a plugin's module may take: `RECIPES_IMPORT_SECONDS`, from 0.1 to a day, or 30."""
    try:
        seconds = float(os.environ.get(_SECONDS, ""))
    except ValueError:
        return 30.0
    return 30.0 if math.isnan(seconds) else min(max(seconds, 0.1), 86400.0)


class _Hangs(BaseException):
    """Something took too long. No Exception: a plugin may catch those."""


@contextmanager
def _time_limit(provider: Provider, what: str) -> Iterator[None]:
    """Interrupt the main thread if the block takes too long; elsewhere signals do not reach, and nothing is done."""
    seconds = import_seconds()
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(sign: int, frame: Any) -> None:
        raise _Hangs

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Hangs as error:
        hint = f"mend or uninstall {provider.package}, or give it more time with {_SECONDS}"
        raise _unusable(provider, f"{what} took more than {seconds:g} seconds", hint) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


_SECONDS = "RECIPES_IMPORT_SECONDS"
_HOOKS = tuple(name for name, hook in vars(hookspecs).items() if hasattr(hook, f"{hookspecs.NAME}_spec"))


def _is_answer(answer: Any) -> bool:
    """Whether it is a Check or a Measure with a name, and its fields have their types: it must survive being written
    and read."""
    try:
        found = Findings((answer,)) if isinstance(answer, Measure) else Findings(checks=(answer,))
        Findings.from_json(found.as_json())
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
        return False
    return bool(answer.name.strip())


def _shown(answer: Any) -> str:
    whole = Repr()
    whole.maxother = 200
    return one_line(whole.repr(answer))


def _first(results: list[Any]) -> Any:
    """pluggy leaves None out of the results."""
    return results[0] if results else None


def _unusable(provider: Provider, reason: str, hint: str = "") -> MachineError:
    hint = hint or f"mend or uninstall {provider.package}, or report this to its authors"
    return MachineError(f"{provider} cannot be used: {reason}", hint)


def _trace_call(hook: str, impls: Any, arguments: Mapping[str, Any]) -> None:
    names = ", ".join(impl.plugin_name for impl in impls)
    print(f"hook {hook} -> {names}: {dict(arguments)}", file=sys.stderr)


def _trace_result(outcome: Any, hook: str, impls: Any, arguments: Mapping[str, Any]) -> None:
    print(f"hook {hook} <- {outcome.exception or outcome.get_result()}", file=sys.stderr)
