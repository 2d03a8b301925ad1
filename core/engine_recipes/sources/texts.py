"""Calibration texts: where the data that a spec names is on this machine, and the documents in it.

Texts are an input artifact like a checkpoint: named by a spec, identified by their contents. Nothing is downloaded.

- `package:MODULE/PATH`: a file beside an installed package's modules; the package is not imported;
- `hf:ORG/NAME[@REVISION][#PATH]`: a dataset in the Hugging Face cache, one file of it or all of its text files;
- anything else: the path of a file.

Files are .txt, .jsonl (or .json with one document a line), each also with .gz or .xz, and .parquet. Everything is read
as a stream, so that neither a large file nor a small one that unpacks to a large one costs more than what is used.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn, cast

from ..errors import MachineError, RequestError, did_you_mean
from . import local
from .spec import COMMIT, Source, parse

#: Longest text that `read` yields, in characters. Callers cut windows of a few thousand.
LONGEST = 1 << 20

#: Raise when `read` yields other texts for the same bytes.
_RULES = 1
_CHUNK = 1 << 20
#: Longest line of a .jsonl file and the most that a packed file may unpack to, in bytes. Whoever has more than this
#: has not meant it for calibration, or has been sent a decompression bomb.
_LONGEST_LINE = 256 << 20
_LONGEST_PACKED_LINE = 16 << 20  # a few kB can unpack to it, and JSON takes thirty times as much memory
_MOST_UNPACKED = 1 << 30

_KINDS = {".txt": "txt", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
_PACKED = (".gz", ".xz")
_PLAIN_KEYS = ("text", "article", "content")
_KEYS = (*_PLAIN_KEYS, "prompt", "completion", "response", "messages")
_FORMS = "name a .txt, .jsonl or .parquet file, package:MODULE/PATH or hf:ORG/NAME[@REVISION][#PATH]"
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Texts:
    """Calibration data that is on this machine.

    Attributes:
        spec: as it was written.
        files: in the order in which they are read.
    """

    spec: str
    files: tuple[Path, ...]

    @cached_property
    def identity(self) -> str:
        """sha256 over kind, contents and length of the files in order. Same identity, same texts; paths do not count.

        Reads the files, the first time, so it is worked out when asked for and not when located.
        """
        digest = hashlib.sha256(f"texts {_RULES}\n".encode())
        for path in self.files:
            size = 0
            with _explained(path), path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
            # After the contents, so that a file that is growing cannot contradict what was announced.
            digest.update(struct.pack("<Q8s", size, _kind(path.name).encode()))
        return digest.hexdigest()


def locate(spec: str) -> Texts:
    """Find the files that a spec names. A few stat calls; nothing is read, imported or downloaded.

    Raises:
        RequestError: a malformed spec, a file that is missing, empty, a folder or of an unknown kind.
        MachineError: the package is not installed, or the dataset is not in the Hugging Face cache.
    """
    scheme, _, rest = spec.partition(":")
    if not spec.strip() or "\0" in spec:
        raise RequestError(f"{spec!r} names no calibration data", _FORMS)
    if scheme == "package":
        return Texts(spec, (_checked(package_file(spec), spec),))
    if scheme == "hf":
        return Texts(spec, _in_cache(spec, rest))
    if "://" in spec:
        raise RequestError(f"{spec} is an address: nothing is downloaded here", "download it, and name the file")
    try:
        return Texts(spec, (_checked(Path(spec).expanduser().absolute(), spec),))
    except RuntimeError:  # ~somebody, who is not known here
        raise RequestError(f"there is no home folder for {spec}", "write the whole path") from None


def read_texts(spec: str) -> Iterator[str]:
    """The texts that a spec names, in order, none of them blank, one at a time: stop when you have enough.

    A .txt file is one document, or several with form feeds between them. A .jsonl file has one on each line: a string,
    or an object with it under `text`, `article`, `content`, `prompt` (and `completion` or `response`) or `messages`
    (what is said, with blank lines between). A .parquet file has the same as columns. A document of more than
    `LONGEST` characters comes in several pieces, cut at white space where there is some.

    Raises:
        RequestError: as `locate`, at once; and, on the way, what is wrong in which line or byte, or that there is
            no text at all.
        MachineError: as `locate`; a file cannot be read; pyarrow is needed and missing.
    """
    return _read(locate(spec))


def read_prompts_and_texts(spec: str) -> Iterator[str | Mapping[str, Any]]:
    """As `read_texts`, but a line of a .jsonl file with a `prompt`, perhaps `answers`, and nothing else comes as it is.

    Raises:
        RequestError: as `read_texts`, but none if there is no text at all.
        MachineError: as `read_texts`.
    """
    for path in locate(spec).files:
        with _explained(path):
            if _kind(path.name) != "jsonl":
                yield from _pieces(_parts(path))
                continue
            for value, where in _json_values(path):
                if isinstance(value, Mapping) and {"prompt"} <= value.keys() <= {"prompt", "answers"}:
                    yield value
                else:
                    yield from _pieces((_text_of(value, where), None))


def _read(texts: Texts) -> Iterator[str]:
    found = False
    for path in texts.files:
        with _explained(path):
            for piece in _pieces(_parts(path)):
                found = True
                yield piece
    if not found:
        raise RequestError(f"{texts.spec} holds no text, only white space", "name data with text in it")


# -- finding files


def package_file(spec: str) -> Path:
    """Where `package:MODULE/PATH` would lie, also if there is no such file. The package is not imported.

    Raises:
        RequestError: the spec names nothing inside a package.
        MachineError: the package is not installed.
    """
    from importlib.util import find_spec

    name, _, inside = spec.removeprefix("package:").partition("/")
    if not name.isidentifier() or not _stays_inside(inside):
        raise RequestError(f"{spec} names no file of a package", "write package:MODULE/PATH, the path inside MODULE")
    try:
        found = find_spec(name)  # a top-level name: nothing is imported
    except Exception:  # foreign finders are asked too; __main__ says nothing of where it is from
        found = None
    if found is None:
        raise MachineError(f"the Python package {name} of {spec} is not installed", "install it, or name other data")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    if not folders:
        raise RequestError(f"{name} of {spec} is no package but a single module", _FORMS)
    paths = [folder / inside for folder in folders]
    return next((path for path in paths if path.exists()), paths[0])


def _in_cache(spec: str, rest: str) -> tuple[Path, ...]:
    name, hash_sign, inside = rest.partition("#")
    try:
        source = parse(f"hf:{name}")
    except RequestError:
        source = None
    if source is None or (hash_sign and not _stays_inside(inside)):
        raise RequestError(f"{spec} names no dataset", "write hf:ORG/NAME[@REVISION] or hf:ORG/NAME[@REVISION]#PATH")
    revision = f" --revision {source.revision}" if source.revision else ""
    download = f"hf download --repo-type dataset {source.name}{revision}"
    folder = _snapshot(source)
    if folder is None:
        raise MachineError(f"the dataset {rest} is not on this machine", f"get it: {download}")
    if inside:
        if not (folder / inside).exists():
            raise MachineError(f"{inside} of the dataset {name} is not on this machine", f"get it: {download} {inside}")
        return (_checked(folder / inside, spec),)
    files = _text_files(folder)
    if not files:
        raise RequestError(f"no .txt, .jsonl or .parquet file of the dataset {name} is here", f"get all: {download}")
    return files


def _snapshot(source: Source) -> Path | None:
    """The folder of a dataset's revision in the cache, laid out as huggingface_hub does it for models."""
    repository = local.hub_cache() / ("datasets--" + source.name.replace("/", "--"))
    commit = source.revision or "main"
    try:
        if not COMMIT.fullmatch(commit):
            commit = (repository / "refs" / commit).read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    folder = repository / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _text_files(folder: Path) -> tuple[Path, ...]:
    """What of a dataset is data, by name: those for training if any are called so."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if _kind(name) and not name.startswith(".") and "/." not in name]
    names = [name for name in names if name != "dataset_infos.json"]  # the datasets library's, about the data
    return tuple(folder / name for name in [name for name in names if "train" in name.lower()] or names)


def _stays_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and ".." not in parts and not path.startswith("/")


def _kind(name: str) -> str:
    """What a file's name says of how to read it; empty if nothing."""
    stem, packing = _split(name)
    kind = _KINDS.get(Path(stem).suffix, "")
    return "" if kind == "parquet" and packing else kind


def _split(name: str) -> tuple[str, str]:
    """A name in lower case without `.gz` or `.xz`, and which of them it had."""
    name = name.lower()
    packing = next((suffix for suffix in _PACKED if name.endswith(suffix)), "")
    return name.removesuffix(packing), packing


def _checked(path: Path, spec: str) -> Path:
    """The path, if it is a file with something in it that we know how to read."""
    try:
        status = path.stat()
    except FileNotFoundError:
        _missing(path, spec)
    except OSError as error:
        raise RequestError(f"{spec} cannot be looked at ({error.strerror or error})", "check the path") from None
    if stat.S_ISDIR(status.st_mode):
        inside = ", ".join(_names(path)[:3])
        raise RequestError(f"{spec} is a folder", f"name one file of it: {inside}" if inside else _FORMS)
    if not stat.S_ISREG(status.st_mode):
        raise RequestError(f"{spec} is no ordinary file", "write the data to a file and name that")
    if not _kind(path.name):
        raise RequestError(f"{spec} is of an unknown kind ({path.suffix or 'no extension'})", _FORMS)
    if not status.st_size:
        raise RequestError(f"{spec} is empty", "name a file with text in it")
    return path


def _missing(path: Path, spec: str) -> NoReturn:
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} for {spec}", _FORMS)
    neighbours = _names(path.parent)
    raise RequestError(f"there is no file {spec}", did_you_mean(path.name, neighbours) if neighbours else _FORMS)


def _names(folder: Path) -> list[str]:
    """What could be meant in a folder; nothing if it cannot be listed."""
    try:
        return sorted(child.name for child in folder.iterdir() if _kind(child.name))
    except OSError:
        return []


# -- reading documents


def _parts(path: Path) -> Iterator[str | None]:
    """The texts of one file in parts; None ends a document."""
    kind = _kind(path.name)
    if kind == "txt":
        for chunk in _decoded(path):
            first, *others = chunk.split("\f")
            yield first
            for other in others:
                yield None
                yield other
        yield None
        return
    for text in _parquet_texts(path) if kind == "parquet" else (_text_of(*line) for line in _json_values(path)):
        yield text
        yield None


def _open(path: Path) -> IO[bytes]:
    packing = _split(path.name)[1]
    if packing == ".gz":
        import gzip

        return cast("IO[bytes]", gzip.open(path, "rb"))
    if packing == ".xz":
        import lzma

        return lzma.open(path, "rb")
    return path.open("rb")


def _require_bounded(path: Path, size: int) -> None:
    if size > _MOST_UNPACKED and _split(path.name)[1]:
        raise RequestError(
            f"{path.name} unpacks to more than {_MOST_UNPACKED >> 20} MiB", "name a smaller file, or unpack it first"
        )


def _decoded(path: Path) -> Iterator[str]:
    """A .txt file in chunks, line ends as \\n, checked to be text."""
    import codecs
    import io

    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    end = 0
    with _open(path) as file:
        chunk = b"not yet"
        while chunk:
            chunk = file.read(_CHUNK)
            end += len(chunk)
            _require_bounded(path, end)
            if (zero := chunk.find(0)) >= 0:
                raise _binary(path, f"a zero at byte {end - len(chunk) + zero}")
            try:
                # The second argument makes a character that the end of the file cuts in two an error.
                yield decoder.decode(chunk, not chunk)
            except UnicodeDecodeError as error:
                raise _binary(path, f"byte {end - len(error.object) + error.start} is not UTF-8") from None


def _json_values(path: Path) -> Iterator[tuple[Any, str]]:
    """What each line that is not blank holds, and where it is, for errors."""
    size = 0
    longest = _LONGEST_PACKED_LINE if _split(path.name)[1] else _LONGEST_LINE
    with _open(path) as file:
        for number in count(1):
            line = file.readline(longest + 1)
            if not line:
                return
            size += len(line)
            _require_bounded(path, size)
            where = f"line {number} of {path.name}"
            if len(line) > longest:
                raise RequestError(f"{where} is longer than {longest >> 20} MiB", "write one document a line")
            if 0 in line:
                raise _binary(path, f"a zero in line {number}")
            try:
                # A byte order mark is nothing that the JSON parser takes.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise _binary(path, f"byte {error.start} of line {number} is not UTF-8") from None
            del line  # it may be large, and is not needed while the caller works
            if text:
                yield _json(text, where), where


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at character {error.pos + 1}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError:  # a number of thousands of digits
        reason = "a number too long"
    raise RequestError(f"{where} is not JSON ({reason})", "write one JSON object with a text on each line")


def _parquet_texts(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise MachineError(f"{path.name} needs the Python package pyarrow to be read", "pip install pyarrow") from None
    # Its errors are ValueError (ArrowInvalid), OSError and others, all with this base.
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [key for key in _KEYS if key in names]
            if not wanted:
                raise _no_text(path.name, names, "column")
            number = 0
            for batch in file.iter_batches(batch_size=64, columns=wanted):
                if batch.nbytes > _LONGEST_LINE:
                    raise RequestError(f"64 rows of {path.name} are {batch.nbytes >> 20} MiB", "name a smaller file")
                for row in batch.to_pylist():
                    number += 1
                    yield _text_of(row, f"row {number} of {path.name}")
    except pyarrow.ArrowException as error:
        raise RequestError(
            f"{path.name} is no sound Parquet file ({_first_line(error)})", "fetch it again, or name another"
        ) from None


def _text_of(value: Any, where: str) -> str:
    """The text of one JSON document or row; empty if it says that there is none (null, no messages)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(f"{where} is neither an object nor a string", 'write {"text": "…"}')
    for key in _PLAIN_KEYS:
        if value.get(key) is not None:
            return _string(value[key], key, where)
    if value.get("prompt") is not None:
        answer = next((key for key in ("completion", "response") if key in value), "prompt")
        return _joined(_string(value[key], key, where) for key in dict.fromkeys(("prompt", answer)))
    if not any(key in value for key in (*_PLAIN_KEYS, "prompt", "messages")):
        raise _no_text(where, list(value), "key")
    messages = value.get("messages") or []
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise RequestError(f"{where}: messages is no list of objects", 'write [{"role": "…", "content": "…"}, …]')
    return _joined(_string(message.get("content"), "content", where) for message in messages)


def _string(value: Any, key: str, where: str, depth: int = 2) -> str:
    """A text, or the texts of a list: of strings, of a message's parts, of messages. Parts such as images have none.

    `depth` is how many lists may still be in one another: data, not the interpreter, says what is too deep.
    """
    if isinstance(value, Mapping) and depth < 2:
        value = value.get("text", value.get("content"))
    if isinstance(value, list) and depth:
        return _joined(_string(part, key, where, depth - 1) for part in value)
    if value is None or isinstance(value, str):
        return value or ""
    raise RequestError(f"{where}: {key} is no string but {type(value).__name__}", "write the text as a string")


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text.strip())


# -- pieces


def _pieces(parts: Iterable[str | None]) -> Iterator[str]:
    """Documents, given in parts, in texts of at most LONGEST characters, without the blank ones."""
    buffer = ""
    for part in parts:
        if part is None:
            yield from _sound(buffer)
            buffer = ""
            continue
        buffer += part
        start = 0
        while len(buffer) - start > LONGEST:
            end = _cut(buffer, start)
            yield from _sound(buffer[start:end])
            start = end
        buffer = buffer[start:]


def _cut(text: str, start: int) -> int:
    """Where a piece that begins at `start` ends: after the last white space that is not too near to its start."""
    last = start + LONGEST
    space = max(text.rfind(character, start + LONGEST // 2, last) for character in "\n \t")
    return space + 1 if space >= 0 else last


def _sound(text: str) -> Iterator[str]:
    """The text without newlines around it, unless it is blank. A surrogate, which JSON can hold, is no character."""
    if text and not text.isspace():
        yield _SURROGATES.sub("\ufffd", text.strip("\r\n"))


# -- errors


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the system and the unpackers say into our errors."""
    import zlib
    from lzma import LZMAError

    try:
        yield
    except (EOFError, LZMAError, zlib.error) as error:
        raise _broken(path, error) from None
    except OSError as error:
        if error.errno is None:  # gzip's own
            raise _broken(path, error) from None
        raise MachineError(
            f"{path} cannot be read ({error.strerror or error})", "check the file and its permissions"
        ) from None


def _broken(path: Path, error: Exception) -> RequestError:
    return RequestError(f"{path.name} cannot be unpacked ({_first_line(error)})", "fetch it again: it is damaged")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _binary(path: Path, what: str) -> RequestError:
    return RequestError(f"{path.name} is no text file: {what}", "name a file of UTF-8 text")


def _no_text(where: str, keys: list[str], what: str) -> RequestError:
    shown = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "") if keys else "none"
    return RequestError(f"{where} has no {what} with a text; it has: {shown}", f"one of {', '.join(_KEYS)}")
