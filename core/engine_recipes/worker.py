"""The child process of one stage. Reads one call as JSON from stdin, writes events as JSON lines to stdout.

Whatever libraries print goes to stderr, which the parent keeps as the stage's log. When the parent dies, stdin
closes and the worker ends with it.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from . import events, gate, leftovers, staged
from .confine import confine
from .decoder import Decoder
from .errors import MachineError, RecipesError, RequestError, StageFailed, first_line, one_line
from .host import Host, import_problem, import_seconds
from .types import CALIBRATION, DECODER, HF_CHECKPOINT, TRTLLM_CHECKPOINT, Provider, Report, StageContext

T = TypeVar("T")
_GRACE = 5.0  # seconds


def main() -> None:
    """Run the call on stdin. Exit code 0: a result was sent; 1: an error was sent."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # a C library's printf must not end up between the JSON lines
    lock = threading.Lock()

    def send(event: events.Event) -> None:
        with lock:
            channel.write(json.dumps(event, default=_plain) + "\n")

    call = json.loads(sys.stdin.buffer.readline())
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # who asks a question in a stage gets no answer, and does not wait
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    _confine(call)
    code = 1
    # what plugins say is wrapped: none of it can be taken for what the worker itself says
    with events.sink(lambda event: send({"said": event})):
        try:
            value = perform(call, send)
            send({"event": "result", "value": value, "peak_rss_bytes": peak_rss_bytes()})
            code = 0
        except BaseException as error:  # whatever a plugin raises: nobody interrupts a worker by an exception
            send(_as_event(error))
    channel.close()
    sys.stderr.flush()
    os._exit(code)  # threads and atexit hooks of foreign libraries must not keep a finished stage alive


def _confine(call: Mapping[str, Any]) -> None:
    """Keep what other stages made from being changed by this one."""
    contexts = [call["context"]] if "context" in call else call.get("contexts", ())
    # who is only asked has no folder to write into: `out` is where the engine may lie already
    places = [] if call["action"] == "command" else ["out"]
    if any(provider["kind"] == "engine" for provider in call["providers"]):
        places.append("cache")  # the engine's own
    allowed = [Path(context[place]) for context in contexts for place in places]
    packages = dict.fromkeys(provider["package"] for provider in call["providers"])
    confine(call["what"], " or ".join(packages), [Path(path) for path in call.get("protected", ())], allowed)


def perform(call: Mapping[str, Any], send: events.Sink) -> Any:
    """Do what the call says and return plain data. `send` gets what the caller must know before that."""
    providers = [Provider(**provider) for provider in call["providers"]]
    if call["action"] == "import":
        return _import(providers, send)
    host = Host()
    for provider in providers:
        _watched(provider, host.load, send)
    if call["action"] == "check":
        return _check(host, call)
    if call["action"] == "command":
        faulthandler.dump_traceback_later(import_seconds() + _GRACE, exit=True)
        return host.command(providers[0], StageContext.from_json(call["context"]))
    if call["action"] == "bench":
        from .bench import Settings, measure

        settings, prompts = Settings(**call["settings"]), call["prompts"]
        return measure(host, providers[0], Path(call["folder"]), settings, prompts, call["options"])
    if call["action"] == "fallbacks":
        report = gate.read(Path(call["engine"])) or Report()
        return [dict(offer) for offer in host.fallbacks(providers[0], StageContext.from_json(call["context"]), report)]
    context = StageContext.from_json(call["context"])
    if context.stage == "resolve":
        return _resolve(host, providers[0], context, call)
    if context.stage == "calibrate":
        host.calibrate(providers[0], context)
        staged.check(context.out, str(providers[0]))
        _check_data(context, call["data"])
        return _finish_calibrate(context, call["gives"])
    if context.stage == "stage1":
        host.stage1(providers[0], context)
        staged.check(context.out, str(providers[0]))
        return _finish_stage1(context, call["gives"], providers[0])
    if context.stage == "stage2":
        told = host.stage2(providers[0], context)
        staged.check(context.out, str(providers[0]))
        _finish_stage2(context)
        return told
    from .gate import measuring

    if context.stage == "baseline":
        found = measuring.record(host, providers[0], context)
        staged.check(context.out, str(providers[0]))
    else:
        found = measuring.measure(host, providers, context, call["claims"]).as_json()
    _check_data(context, call["data"])
    return found


def _import(providers: Sequence[Provider], send: events.Sink) -> dict[str, str]:
    """Module -> why it cannot be used, empty if it can. All together get the time of one."""
    found: dict[str, str] = {}
    late = time.monotonic() + import_seconds()
    for provider in providers:
        if time.monotonic() < late:
            found[provider.module] = _watched(provider, import_problem, send)
    return found


def _watched(provider: Provider, load: Callable[[Provider], T], send: events.Sink) -> T:
    """Import a provider. The caller learns whose import ends this process; one that hangs and lets no exception through
    is ended here, and the place printed."""
    send({"event": "importing", "provider": str(provider)})
    faulthandler.dump_traceback_later(import_seconds() + _GRACE, exit=True)
    answer = load(provider)
    faulthandler.cancel_dump_traceback_later()
    send({"event": "importing", "provider": ""})
    return answer


def _check(host: Host, call: Mapping[str, Any]) -> None:
    """That every provider can be imported, and none refuses the model."""
    if call["decoder"]:
        decoder = Decoder.read(Path(call["decoder"]))
        for provider, context in zip(call["providers"], call["contexts"], strict=True):
            if context["stage"] != "resolve":
                host.check_decoder(Provider(**provider), StageContext.from_json(context), decoder)


def _resolve(host: Host, provider: Provider, context: StageContext, call: Mapping[str, Any]) -> dict[str, Any]:
    from .checkpoint.source import expect_tensors, source_tensors
    from .sources.inspect import check_architecture, inspect

    folder = Path(call["source"]["folder"])
    config = inspect(folder)
    check_architecture(config, provider.name, call["architectures"])
    decoder = host.resolve_checkpoint(provider, context, config)
    staged.check(context.out, str(provider))
    tensors = source_tensors(folder)
    expect_tensors(decoder, tensors)
    decoder.write(context.out / DECODER)
    (context.out / "source.json").write_text(json.dumps(call["source"], indent=2, sort_keys=True), encoding="utf-8")
    return {"architecture": decoder.architecture, "parameters": decoder.parameters}


def _check_data(context: StageContext, digests: Mapping[str, str]) -> None:
    """That what was read is what the key says: the plan may be minutes old."""
    from .sources import texts

    for option, digest in digests.items():
        spec = str(context.options[option])
        if texts.locate(spec).identity != digest:
            raise StageFailed(f"{spec} changed while it was being used", "run the same command again")


def _finish_calibrate(context: StageContext, gives: str) -> dict[str, Any]:
    if gives != CALIBRATION:
        return {}
    from .checkpoint import read_statistics

    return dict(read_statistics(context.out).about)


def _finish_stage1(context: StageContext, gives: str, provider: Provider) -> dict[str, Any]:
    if gives == TRTLLM_CHECKPOINT:
        from .checkpoint import verify

        # our converter checked the values while it wrote them
        verify(context.out, contents=provider.package != "engine-recipes")
    return {}


def _finish_stage2(context: StageContext) -> None:
    from .checkpoint import open_source
    from .tokenizer import copy_tokenizer

    with open_source(context.input(HF_CHECKPOINT)) as source:
        copy_tokenizer(source.folder, context.out)


def _plain(value: Any) -> Any:
    """What JSON lacks: a number of numpy's as Python's, anything else as its text."""
    return value.item() if hasattr(value, "item") else str(value)


def _as_event(error: BaseException) -> events.Event:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        error = MachineError(
            f"no space left on the device while writing {error.filename or 'the output'}",
            "free some, or choose another place with --workspace",
        )
    if isinstance(error, RecipesError):
        # a plugin's own subclass travels as what it is to the caller; none of them may say that the gate rejected
        kinds = (RequestError, MachineError, StageFailed)
        kind = next((kind for kind in kinds if isinstance(error, kind)), StageFailed).__name__
        data = {"message": one_line(error.message), "hint": one_line(error.hint)}
        return {"event": "error", "kind": kind, **data, "output": str(getattr(error, "output", ""))}
    with suppress(Exception):  # of an exception that cannot be printed
        traceback.print_exception(error)
    return {"event": "crash", "message": first_line(error)}


def peak_rss_bytes() -> int:
    """The largest resident set of this process or of a child it waited for."""
    unit = 1 if sys.platform == "darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:  # ru_maxrss of a fresh process starts at its parent's size, VmHWM does not
        status = Path("/proc/self/status").read_text(encoding="ascii")
        own = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(own, children)


def _die_with_parent(lifeline: int) -> None:
    os.read(lifeline, 1)  # returns only when the parent has gone or has closed the pipe to stop us
    leftovers.end(os.environ.get(leftovers.MARK, ""))
    os.killpg(0, signal.SIGKILL)
