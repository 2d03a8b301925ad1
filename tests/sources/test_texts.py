"""Calibration texts: where a spec's files are, what is read from them, and what is said of bad ones."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from engine_recipes.errors import MachineError, RecipesError, RequestError
from engine_recipes.sources import texts
from engine_recipes.sources.texts import locate, read_texts

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DEFAULT = "package:engine_recipes_precisions/calibration.txt.xz"


def put(name: str, content: str | bytes) -> str:
    """Write a file in the current folder, packed as its name says."""
    data = content.encode() if isinstance(content, str) else content
    packed = gzip.compress(data) if name.endswith(".gz") else lzma.compress(data) if name.endswith(".xz") else data
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(packed)
    return name


def refused(spec: str, kind: type[RecipesError] = RequestError) -> tuple[str, str]:
    """The two lines with which a spec is refused, at once or on the way."""
    with pytest.raises(kind) as caught:
        list(read_texts(spec))
    assert caught.value.message and caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value.message, caught.value.hint


# -- files


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_plain_and_packed_files_hold_the_same(suffix: str) -> None:
    assert list(read_texts(put(f"a.txt{suffix}", "Größe\r\none\n\f\n \f two\n"))) == ["Größe\none", " two"]
    lines = '{"text": "a"}\n\n   \n"b\\n"\r\n{"text": "c"}'
    assert list(read_texts(put(f"a.jsonl{suffix}", lines))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"article": "x", "id": 3}, "x"),
        ({"content": "x"}, "x"),
        ({"prompt": "q", "completion": "a"}, "q\n\na"),
        ({"prompt": "q", "response": "a"}, "q\n\na"),
        ({"prompt": "q"}, "q"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "q\n\na"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"content": None}]}, "q"),
        ({"text": "first", "article": "second"}, "first"),
        ({"prompt": [{"role": "user", "content": [{"text": "q"}]}], "completion": [{"content": "a"}]}, "q\n\na"),
        ({"text": ["a", {"type": "image"}, "b"]}, "a\n\nb"),
        ({"text": None, "messages": [{"content": "q"}]}, "q"),
        ({"text": "\ud800!"}, "\ufffd!"),
    ],
)
def test_where_a_line_has_its_text(line: dict[str, Any], text: str) -> None:
    assert list(read_texts(put("a.jsonl", json.dumps(line)))) == [text]


def test_lines_without_text_are_skipped() -> None:
    lines = [{"text": None}, {"text": " "}, {"messages": []}, {"messages": None}, {"text": "x"}]
    assert list(read_texts(put("a.jsonl", "\n".join(map(json.dumps, lines))))) == ["x"]


def test_a_byte_order_mark_is_no_text() -> None:
    assert list(read_texts(put("a.txt", b"\xef\xbb\xbfx"))) == ["x"]
    assert list(read_texts(put("a.jsonl", b'\xef\xbb\xbf{"text": "x"}'))) == ["x"]


def test_the_home_folder_is_found(own_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(own_world))
    (own_world / "mine.TXT").write_text("x")
    assert list(read_texts("~/mine.TXT")) == ["x"]
    assert "~nobody-of-this-name" in refused("~nobody-of-this-name/a.txt")[0]


# -- large ones


def test_a_long_document_comes_in_pieces_cut_at_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "LONGEST", 100)
    monkeypatch.setattr(texts, "_CHUNK", 64)
    words = " ".join(f"wörd{n}" for n in range(300))
    for spec in (put("a.txt", f"{words}\ftail"), put("a.jsonl", f'{json.dumps(words)}\n"tail"')):
        *pieces, tail = read_texts(spec)
        assert tail == "tail"
        assert "".join(pieces) == words
        assert all(len(piece) <= 100 for piece in pieces)
        assert all(piece.endswith(" ") for piece in pieces[:-1])
    assert [len(piece) for piece in read_texts(put("b.txt", "x" * 250))] == [100, 100, 50]


def test_one_enormous_line_is_read_in_bounded_pieces() -> None:
    spec = put("a.txt.gz", b"word " * (5 << 20))
    pieces = list(read_texts(spec))
    assert sum(map(len, pieces)) == 25 << 20
    assert max(map(len, pieces)) <= texts.LONGEST


def test_many_form_feeds_cost_nothing_much() -> None:
    assert list(read_texts(put("a.txt", "\f" * (1 << 20) + "x"))) == ["x"]


def test_what_is_not_asked_for_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_MOST_UNPACKED", 3 << 20)
    spec = put("a.txt.gz", b"word " * (1 << 20))
    assert len(list(islice(read_texts(spec), 2))) == 2
    message, _ = refused(spec)
    assert message == "a.txt.gz unpacks to more than 3 MiB"
    assert "unpacks to" in refused(put("a.jsonl.xz", b'"' + b"x" * (4 << 20)))[0]
    assert len(list(read_texts(put("plain.txt", b"word " * (1 << 20))))) >= 5  # what lies on the disk is no bomb


def test_a_line_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_LONGEST_LINE", 1 << 20)
    assert refused(put("a.jsonl", '"x"\n"' + "y" * (1 << 20) + '"'))[0] == "line 2 of a.jsonl is longer than 1 MiB"


def test_a_line_that_unpacks_to_much_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "_LONGEST_PACKED_LINE", 1000)
    line = json.dumps([[]] * 1000)
    assert refused(put("a.jsonl.xz", line))[0] == "line 1 of a.jsonl.xz is longer than 0 MiB"
    assert "neither an object nor a string" in refused(put("a.jsonl", line))[0]


# -- bad ones


def test_a_missing_file_names_its_neighbour() -> None:
    put("data/calib.jsonl", '"x"')
    put("data/other.bin", "x")
    assert refused("data/calb.jsonl") == ("there is no file data/calb.jsonl", "did you mean calib.jsonl?")
    message, _ = refused("nowhere/calib.jsonl")
    assert message.startswith("there is no folder ") and message.endswith("nowhere for nowhere/calib.jsonl")


def test_what_is_no_file_is_refused() -> None:
    put("data/calib.jsonl", '"x"')
    assert refused("data") == ("data is a folder", "name one file of it: calib.jsonl")
    os.mkfifo("pipe.txt")
    assert refused("pipe.txt")[0] == "pipe.txt is no ordinary file"
    assert "nothing is downloaded" in refused("https://example.com/a.txt")[0]
    assert "cannot be looked at" in refused("x" * 300 + ".txt")[0]
    for spec in ("", "  ", "a\0.txt"):
        assert "names no calibration data" in refused(spec)[0]


@pytest.mark.parametrize("name", ["a.csv", "a", "a.parquet.gz", "a.gz"])
def test_an_unknown_kind_is_refused(name: str) -> None:
    assert f"{name} is of an unknown kind" in refused(put(name, "x"))[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_an_empty_file_is_refused_at_once(name: str) -> None:
    with pytest.raises(RequestError, match="is empty"):
        read_texts(put(name, ""))


@pytest.mark.parametrize(
    ("name", "content"), [("a.txt", " \n\f\t\n"), ("a.jsonl", '\n \n{"text": ""}\n'), ("a.txt.gz", "")]
)
def test_white_space_is_no_text(name: str, content: str) -> None:
    assert refused(put(name, content))[0] == f"{name} holds no text, only white space"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", b"abc\0def", "a zero at byte 3"),
        ("a.txt", b"abc\xff", "byte 3 is not UTF-8"),
        ("a.txt", "ä".encode()[:1], "byte 0 is not UTF-8"),
        ("a.txt", b"x" * (1 << 20) + b"\xc3", "byte 1048576 is not UTF-8"),
        ("a.txt", b"x" * ((1 << 20) - 1) + b"\xc3\xffy", "byte 1048575 is not UTF-8"),
        ("a.txt", "utf-16".encode("utf-16"), "a zero at byte 3"),
        ("a.jsonl", b'"x"\n"\xff"', "byte 1 of line 2 is not UTF-8"),
        ("a.jsonl", b'"x"\n\0', "a zero in line 2"),
    ],
)
def test_binary_is_refused_with_its_place(name: str, content: bytes, what: str) -> None:
    assert refused(put(name, content))[0] == f"{name} is no text file: {what}"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": ', "line 3 of a.jsonl is not JSON (Expecting value at character 9)"),
        ("[" * 100_000, "line 3 of a.jsonl is not JSON (nested too deeply)"),
        ("1" * 5000, "line 3 of a.jsonl is not JSON (a number too long)"),
        ("[1]", "line 3 of a.jsonl is neither an object nor a string"),
        ('{"text": 3}', "line 3 of a.jsonl: text is no string but int"),
        ('{"messages": "hi"}', "line 3 of a.jsonl: messages is no list of objects"),
        ('{"messages": [3]}', "line 3 of a.jsonl: messages is no list of objects"),
        ('{"titel": 1, "body": 2}', "line 3 of a.jsonl has no key with a text; it has: titel, body"),
        ('{"text": ' + '[{"text": ' * 200 + "1" + "}]" * 200 + "}", "line 3 of a.jsonl: text is no string but list"),
        ('{"text": [' + '{"text": ' * 200 + "1" + "}" * 200 + "]}", "line 3 of a.jsonl: text is no string but dict"),
        ("{}", "line 3 of a.jsonl has no key with a text; it has: none"),
    ],
)
def test_a_bad_line_is_named(line: str, what: str) -> None:
    spec = put("a.jsonl", f'"x"\n\n{line}\n')
    assert refused(spec)[0] == what
    assert next(read_texts(spec)) == "x"  # until there, all is well


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_a_damaged_archive_is_refused(suffix: str) -> None:
    name = put(f"a.txt{suffix}", os.urandom(99).hex())
    whole = Path(name).read_bytes()
    for damaged in (whole[:-20], b"no archive", whole[:30] + b"????" + whole[34:]):
        Path(name).write_bytes(damaged)
        assert f"{name} cannot be unpacked" in refused(name)[0]


def test_a_file_that_cannot_be_read_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = put("a.txt", "x")

    def denied(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "a.txt cannot be read (Permission denied)" in refused(spec, MachineError)[0]
    with pytest.raises(MachineError, match="cannot be read"):
        _ = locate(spec).identity


# -- packages


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package on the path that must not be imported."""
    folder = tmp_path / "site" / "its_texts"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('locating must not import this')\n")
    (folder / "data" / "a.txt").write_text("x")
    (folder.parent / "its_module.py").write_text("")
    (folder.parent / "secret.txt").write_text("x")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_file_of_a_package_is_found_without_importing_it(package: Path) -> None:
    assert locate("package:its_texts/data/a.txt").files == (package / "data" / "a.txt",)
    assert list(read_texts("package:its_texts/data/a.txt")) == ["x"]
    assert "its_texts" not in sys.modules
    assert refused("package:its_texts/data/b.txt")[1] == "did you mean a.txt?"


@pytest.mark.parametrize(
    "rest",
    ["", "its_texts", "its_texts/", "/a.txt", "its_texts/../secret.txt", "its_texts//etc/a.txt", "its.texts/a.txt"],
)
def test_a_package_spec_stays_inside(package: Path, rest: str) -> None:
    assert "names no file of a package" in refused(f"package:{rest}")[0]


def test_a_package_that_is_not_there(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "nowhere_to_be_found of " in refused("package:nowhere_to_be_found/a.txt", MachineError)[0]
    monkeypatch.setitem(sys.modules, "made_by_hand", ModuleType("made_by_hand"))  # says nothing of where it is from
    assert "is not installed" in refused("package:made_by_hand/a.txt", MachineError)[0]
    assert "is no package but a single module" in refused("package:its_module/secret.txt")[0]


# -- datasets in the Hugging Face cache


def dataset(cache: Path, *names: str, commit: str = COMMIT, ref: str = "main") -> Path:
    """A dataset as huggingface_hub leaves it: links into blobs/."""
    repository = cache / "datasets--org--data"
    for name in names:
        blob = repository / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        path = repository / "snapshots" / commit / name
        for folder in (blob.parent, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        blob.write_text(json.dumps({"text": name}))
        path.symlink_to(os.path.relpath(blob, path.parent))
    (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit)
    return repository / "snapshots" / commit


def test_a_dataset_is_read_in_the_order_of_names(own_hub_cache: Path) -> None:
    dataset(own_hub_cache, "b.jsonl", "a/z.json", "README.md", "dataset_infos.json", ".hidden.txt", ".git/x.txt")
    assert list(read_texts("hf:org/data")) == ["a/z.json", "b.jsonl"]
    assert list(read_texts("hf:org/data#b.jsonl")) == ["b.jsonl"]


def test_what_is_for_training_is_preferred(own_hub_cache: Path) -> None:
    folder = dataset(own_hub_cache, "data/test.jsonl", "data/train-1.jsonl", "data/train-0.jsonl", ref="refs/pr/1")
    found = locate("hf:org/data@refs/pr/1")
    assert found.files == (folder / "data" / "train-0.jsonl", folder / "data" / "train-1.jsonl")
    assert locate(f"hf:org/data@{COMMIT}").identity == found.identity
    assert refused("hf:org/data", MachineError)[0] == "the dataset org/data is not on this machine"


def test_another_cache_is_found_where_huggingface_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    dataset(tmp_path / "elsewhere" / "hub", "a.jsonl")
    assert list(read_texts("hf:org/data")) == ["a.jsonl"]


def test_the_librarys_own_lookup_agrees(own_hub_cache: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = dataset(own_hub_cache, "a.jsonl", ref="v1")
    found = hub.snapshot_download(
        "org/data", repo_type="dataset", revision="v1", local_files_only=True, cache_dir=own_hub_cache
    )
    assert Path(found) == folder == locate("hf:org/data@v1").files[0].parent


def test_a_dataset_that_is_not_there_says_how_to_get_it(own_hub_cache: Path) -> None:
    assert refused("hf:org/data@v2", MachineError) == (
        "the dataset org/data@v2 is not on this machine",
        "get it: hf download --repo-type dataset org/data --revision v2",
    )
    dataset(own_hub_cache, "README.md")
    assert refused("hf:org/data#a.jsonl", MachineError) == (
        "a.jsonl of the dataset org/data is not on this machine",
        "get it: hf download --repo-type dataset org/data a.jsonl",
    )
    assert "no .txt, .jsonl or .parquet file" in refused("hf:org/data")[0]


@pytest.mark.parametrize(
    "rest", ["", "data", "org/data#", "org/data#../a.txt", "org/data#/etc/a.txt", "org/data@", "a/b/c"]
)
def test_a_malformed_dataset_spec(rest: str) -> None:
    assert "names no dataset" in refused(f"hf:{rest}")[0]


# -- prompts among texts


def test_prompts_come_as_they_are_and_everything_else_as_text() -> None:
    lines = [{"prompt": "q", "answers": ["a"]}, {"text": "t"}, {"prompt": "p"}, {"prompt": "p", "response": "r"}, "s"]
    spec = put("a.jsonl", "\n".join(map(json.dumps, lines)))
    assert list(texts.read_prompts_and_texts(spec)) == [lines[0], "t", lines[2], "p\n\nr", "s"]
    assert list(texts.read_prompts_and_texts(put("a.txt", "one\ftwo"))) == ["one", "two"]
    assert list(texts.read_prompts_and_texts(put("b.jsonl", '{"text": " "}'))) == []


# -- Parquet


def test_parquet_needs_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    message, hint = refused(put("a.parquet", "PAR1"), MachineError)
    assert "pyarrow" in message and hint == "pip install pyarrow"


def test_parquet_columns_are_read_like_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class File:
        schema_arrow = SimpleNamespace(names=["image", "text"])

        def __init__(self, path: Path) -> None:
            pass

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def iter_batches(self, batch_size: int, columns: list[str]) -> Any:
            asked.append(columns)
            yield SimpleNamespace(nbytes=100, to_pylist=lambda: [{"text": "x"}, {"text": None}])
            yield SimpleNamespace(nbytes=100, to_pylist=lambda: [{"text": 3}])

    fake, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    fake.ArrowException, fake.parquet, parquet.ParquetFile = KeyError, parquet, File  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", fake)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    spec = put("a.parquet", "PAR1")
    assert next(read_texts(spec)) == "x"
    assert asked == [["text"]]
    assert refused(spec)[0] == "row 3 of a.parquet: text is no string but int"
    File.schema_arrow = SimpleNamespace(names=["image", "label"])
    assert refused(spec)[0] == "a.parquet has no column with a text; it has: image, label"


def test_real_parquet() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"n": [1, 2], "messages": [[{"role": "user", "content": "q"}], []]}), "a.parquet"
    )
    assert list(read_texts("a.parquet")) == ["q"]
    assert "b.parquet is no sound Parquet file" in refused(put("b.parquet", "nonsense"))[0]


# -- identity


def test_identity_is_of_contents_and_boundaries() -> None:
    def identity(**files: str) -> str:
        paths = tuple(Path(put(name.replace("_", "."), content)) for name, content in files.items())
        return texts.Texts("spec", paths).identity

    one = identity(a_txt="ab", b_txt="c")
    assert re.fullmatch(r"[0-9a-f]{64}", one)
    assert one == identity(other_txt="ab", more_txt="c")
    different = [identity(a_txt="a", b_txt="bc"), identity(a_txt="abc"), identity(b_txt="c", a_txt="ab")]
    different += [identity(a_jsonl="ab", b_txt="c"), identity(a_txt="ab", b_txt="d")]
    assert len({one, *different}) == 6


# -- the default text


def test_the_default_text_is_the_one_that_its_notes_describe() -> None:
    (path,) = locate(DEFAULT).files
    content = lzma.decompress(path.read_bytes())
    notes = (path.parent / "calibration.md").read_text(encoding="utf-8")
    assert f"`{hashlib.sha256(content).hexdigest()}`" in notes
    assert f"{len(content):,} bytes" in notes and f"{path.stat().st_size:,} bytes packed" in notes
    assert "Copyright (c) 2001-2024 Python Software Foundation; All Rights Reserved" in notes
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in notes and "public domain" in notes


def test_the_default_text_is_enough_and_clean() -> None:
    documents = list(read_texts(DEFAULT))
    assert sum(map(len, documents)) > 4.25 * 512 * 512  # characters of a token, with room
    assert len(documents) == 90 and min(map(len, documents)) >= 11_990
    for text in documents:
        assert not re.search(r"[ \t\r]$|[\x00-\x09\x0b-\x1f\x7f]|\ufffd", text, re.M)
