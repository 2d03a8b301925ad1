"""The Hugging Face hub: downloads what is wanted of a repository into the cache, through huggingface_hub."""

from __future__ import annotations

import errno
import glob
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import Interrupted, MachineError, RecipesError, RequestError
from ..space import require_room
from . import layout, local, polling
from .spec import Confirm, Located, Source, Unreachable

#: Longest wait for one socket, and for a whole answer: name servers that do not answer and hosts with many
#: addresses outlast any socket timeout.
_SOCKET_SECONDS = 5.0
_ANSWER_SECONDS = 10.0
#: Files at a time. What is in flight is lost when the process is killed; more is not faster on large shards.
_WORKERS = 4

Answer = TypeVar("Answer")


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT or https://huggingface.co."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def fetch(source: Source, confirm: Confirm) -> Located:
    """Download what is missing of the wanted files into the Hugging Face cache, and check their sizes.

    Files that were finished before are kept; a connection that drops goes on where it stopped.

    Raises:
        Unreachable: offline, or the hub does not answer within seconds.
        RequestError: unknown repository or revision, or one without safetensors, configuration or tokenizer.
        MachineError: no access, no disk space, a download that broke off, huggingface_hub is missing.
        Interrupted: `confirm` said no.
    """
    if local.offline():
        raise Unreachable("HF_HUB_OFFLINE is set", "unset it to download")
    _need_library()
    commit, sizes = _ask(source)
    folder = local.repository(source) / "snapshots" / commit
    missing = {name: size for name, size in sizes.items() if _size(folder / name) != size}
    amount = sum(missing.values())
    if missing:
        require_room("the download", amount, local.hub_cache(), _MAKE_ROOM)
        if not confirm(f"{source.name} from {urlsplit(endpoint()).netloc}, {len(missing)} files", amount):
            raise Interrupted(f"{source.label} is not downloaded: you said no", "run the command again to start it")
        _download(source, commit, sizes, amount)
    for name, size in sizes.items():
        if _size(folder / name) != size:
            raise MachineError(
                f"{name} has {_size(folder / name):,} bytes, {urlsplit(endpoint()).netloc} says {size:,}",
                f"delete {local.repository(source)} and fetch again",
            )
    _write_ref(source, commit)
    return Located(source, folder, commit)


def _need_library() -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when the library is imported
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MachineError("the Python package huggingface_hub is not installed", "pip install 'engine-recipes[cpu]'")


def _ask(source: Source) -> tuple[str, dict[str, int]]:
    """Commit, and wanted files with their sizes in bytes."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint())

    def question() -> Any:
        info = api.model_info(source.name, revision=source.revision, files_metadata=True, timeout=_SOCKET_SECONDS)
        if info.gated:  # the list of files is public all the same
            api.auth_check(source.name)
        return info

    with _explained(source, broke_off=False):
        info = _within(_ANSWER_SECONDS, question)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    names = layout.wanted(sizes)
    if not any(name.endswith(".safetensors") for name in names):
        raise RequestError(
            f"{source.name} has no safetensors files",
            "choose a repository that has them; pickles (*.bin, *.pt) are never opened here",
        )
    for name in (layout.CONFIG, layout.TOKENIZER):
        if name not in names:
            raise RequestError(f"{source.name} has no {name}", "choose a repository in the transformers layout")
    return str(info.sha), {name: sizes[name] for name in names}


def _download(source: Source, commit: str, sizes: Mapping[str, int], amount: int) -> None:
    from huggingface_hub import snapshot_download

    blobs = local.repository(source) / "blobs"
    before = polling.bytes_below(blobs)
    progress = polling.watch(f"downloading {source.name}", amount, lambda: polling.bytes_below(blobs) - before)
    with _explained(source, broke_off=True), _silent(), progress:
        snapshot_download(
            source.name,
            revision=commit,
            cache_dir=local.hub_cache(),
            endpoint=endpoint(),
            allow_patterns=[glob.escape(name) for name in sizes],
            etag_timeout=_SOCKET_SECONDS,
            max_workers=_WORKERS,
        )


def _within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises, or TimeoutError: then it is left to itself in its thread."""
    future: futures.Future[Answer] = futures.Future()

    def work() -> None:
        try:
            future.set_result(call())
        except Exception as error:  # raised again by result()
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        return future.result(seconds)
    except futures.TimeoutError:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


@contextmanager
def _silent() -> Iterator[None]:
    """No bars and no warnings of the library's own on stderr while the block runs: events say what there is to say.

    HF_HUB_DISABLE_PROGRESS_BARS=0 overrules us.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as its_logging
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    verbosity = its_logging.get_verbosity()
    bars = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    its_logging.set_verbosity(logging.ERROR)
    if bars:
        disable_progress_bars()
    try:
        yield
    finally:
        its_logging.set_verbosity(verbosity)
        if bars:
            enable_progress_bars()


@contextmanager
def _explained(source: Source, broke_off: bool) -> Iterator[None]:
    """Turn the library's errors into ours. `broke_off`: the download had begun, so the hub was there."""
    from huggingface_hub import errors

    # The HTTP library below has changed twice (requests, httpx, httpx2). What its errors have in common stands in
    # the bases of HfHubHTTPError. hf_xet, which moves large files, raises RuntimeError; an answer that is no JSON
    # (a hotel's log-in page) and a name the hub would not accept raise ValueError.
    expected: tuple[type[Exception], ...] = (*errors.HfHubHTTPError.__bases__, OSError, RuntimeError, ValueError)
    try:
        yield
    except expected as error:
        raise _explain(source, error, broke_off) from error


def _explain(source: Source, error: Exception, broke_off: bool) -> RecipesError:
    from huggingface_hub import errors

    page = f"{endpoint()}/{source.name}"
    host = urlsplit(endpoint()).netloc
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return RequestError(f"{source.name} is no name of a repository", "write hf:ORG/NAME as on its page")
    if isinstance(error, errors.GatedRepoError):
        return MachineError(
            f"{source.name} is gated: its owner wants you to accept a licence",
            f"accept it at {page}, then set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RequestError(f"{source.name} has no revision {source.revision}", f"see {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RequestError(
            f"{host} has no model {source.name}, or it is private",
            "check the name; for a private model set HF_TOKEN",
        )
    if status in (401, 403):
        return MachineError(f"{host} refuses access to {source.name} ({status})", "check HF_TOKEN")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"no space left for {source.name} in {local.hub_cache()}", _MAKE_ROOM)
    if isinstance(error, PermissionError):
        return MachineError(f"{error.filename} cannot be written", "give write access, or set HF_HUB_CACHE elsewhere")
    reason = _reason(error)
    if broke_off:
        return MachineError(
            f"the download of {source.name} broke off ({reason})",
            "run the same command again: finished files are kept",
        )
    return Unreachable(f"{host} cannot be reached ({reason})", "check the network, or set HF_ENDPOINT to a mirror")


_MAKE_ROOM = "make room, or set HF_HUB_CACHE to a folder on a larger disk"


def _reason(error: Exception) -> str:
    """One line: the first of the chain of causes that says something, the innermost preferred."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    lines = (str(inner) or str(error)).strip().splitlines()
    return re.sub(r"^\[Errno -?\d+\] ", "", lines[0]).rstrip(".:") if lines else type(error).__name__


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_ref(source: Source, commit: str) -> None:
    """Say which commit a branch or tag stands for. The library does not: it was given the commit."""
    name = source.revision or "main"
    if name == commit:
        return
    ref = local.repository(source) / "refs" / name
    ref.parent.mkdir(parents=True, exist_ok=True)
    part = ref.with_name(f".{ref.name}.{os.getpid()}")
    part.write_text(commit, encoding="ascii")
    os.replace(part, ref)
