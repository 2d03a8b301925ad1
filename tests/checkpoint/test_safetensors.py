from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import tiny
from engine_recipes import RequestError
from engine_recipes.checkpoint.safetensors import SafeFile, read_header, write


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[Any], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


BAD = {
    "empty": (b"", "no safetensors file"),
    "cut off in the length": (b"\x10\0\0", "no safetensors file"),
    "header longer than the file": (raw(b"{}", length=1000), "no safetensors file"),
    "huge header": (raw(b"{}", length=2**63), "no safetensors file"),
    "git-LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-LFS pointer"),
    "zip of pickles": (b"PK\x03\x04" + b"\0" * 300, "pickle"),
    "old pickle": (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + b"\0" * 100, "pickle"),
    "not JSON": (raw(b"{nonsense"), "damaged safetensors header"),
    "not UTF-8": (raw(b'{"\xff\xfe": 1}'), "damaged safetensors header"),
    "UTF-16": (raw('{"a":{}}'.encode("utf-16")), "damaged safetensors header"),
    "a list": (raw([1]), "damaged safetensors header"),
    "nested too deep": (raw(b"[" * 100_000), "damaged safetensors header"),
    "no offsets": (raw({"a": {"dtype": "U8", "shape": [1]}}, b"x"), "damaged safetensors header"),
    "unknown dtype": (raw({"a": entry(0, 1, [1], "F3")}, b"x"), "dtype 'F3' is not known"),
    "size does not fit the shape": (raw({"a": entry(0, 1, [2])}, b"x"), r"U8 \[2\] does not take 1 bytes"),
    "negative shape": (raw({"a": entry(0, 4, [-2, -2])}, b"xxxx"), "whole numbers"),
    "fractions": (raw({"a": entry(0, 1, [1.0])}, b"x"), "whole numbers"),
    "true for one": (raw({"a": entry(0, True, [True])}, b"x"), "whole numbers"),
    "negative offset": (raw({"a": entry(-1, 0, [1])}, b""), "whole numbers"),
    "overlap": (raw({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, b"xxx"), "b leaves a hole or overlaps"),
    "hole": (raw({"a": entry(0, 1, [1]), "b": entry(2, 3, [1])}, b"xxx"), "b leaves a hole or overlaps"),
    "cut off": (raw({"a": entry(0, 9, [9])}, b"xxx"), "is cut off"),
    "too long": (raw({"a": entry(0, 1, [1])}, b"xxx"), "bytes after its last tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_files_are_refused_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        read_header(path)
    assert caught.value.hint
    assert "x.safetensors" in caught.value.message


def test_reads_what_others_write(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.arange(4, dtype=np.float16).reshape(4, 1),
    }
    with SafeFile(tiny.save(tmp_path / "x.safetensors", arrays)) as file:
        for name, array in arrays.items():
            assert file.tensors[name].dtype == array.dtype.name
            np.testing.assert_array_equal(file.array(name), array)
            assert not file.array(name).flags.writeable
            file.forget(name)
            file.forget(name, 2, 4)
            np.testing.assert_array_equal(file.array(name), array)


def test_others_read_what_it_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = tmp_path / "x.safetensors"
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = [[values[:1].tobytes(), values[1:].tobytes()], [b"\0\x40\x80\x3f"]]
    positions = list(write(path, {"a": ("float32", (3, 4)), "b": ("bfloat16", (2,))}, data))
    assert positions[-1] == path.stat().st_size
    assert positions == sorted(positions)
    loaded = load_file(path)
    assert torch.equal(loaded["a"], torch.from_numpy(values))
    assert loaded["b"].tolist() == [2.0, 1.0]


def test_pieces_must_add_up(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a: 1 bytes missing"):
        list(write(tmp_path / "x", {"a": ("uint8", (2,))}, [[b"x"]]))


def test_never_overwrites(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(FileExistsError):
        list(write(tmp_path / "x", {}, []))


def test_a_file_without_tensors(tmp_path: Path) -> None:
    list(write(tmp_path / "x", {}, []))
    assert read_header(tmp_path / "x") == {}
