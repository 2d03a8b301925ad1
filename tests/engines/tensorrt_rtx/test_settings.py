from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine_recipes import RequestError, StageFailed
from engine_recipes_engines.tensorrt_rtx.settings import SETTINGS, Settings, Tensor, read_settings

WHOLE = Settings(
    4, 64, 16, 256, 3, 2, 16, "bfloat16", "int8", ["sm89", "sm120"], "1.7", {"bfloat16": 10}, {"float32": 0},
    [Tensor("x", "INT64", [-1])], [Tensor("y", "FLOAT", [-1, 2])], 1000, "ab",
)  # fmt: skip


def test_what_was_noted_is_read(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    assert read_settings(tmp_path) == WHOLE


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"{}", b"null", b"7", b'"text"', b"[" * 99999, b"\xff"],
    ids=lambda text: repr(text)[:9],
)
def test_what_is_no_json_object_is_two_lines(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SETTINGS).write_bytes(content)
    refused(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("layers", value) for value in ("x", None, 0, -1, True, 1.5, [1])],
        *[("compute", value) for value in ("garbage", "float32", None, [1])],
        *[("cache_rounding", value) for value in ("int4", 8, {})],
        *[("weights", value) for value in (None, [1], {"float16": "x"}, {"float16": -1})],
        *[("constants", value) for value in (None, 5, {"x": None})],
        *[("inputs", value) for value in (None, 5, [{}], [5], "text", [{"name": "x", "dtype": "y", "shape": 5}])],
        *[("outputs", [{"name": "x", "dtype": "y", "shape": [None]}]), ("outputs", [{"name": 1}])],
        *[("targets", value) for value in (None, 5, [5])],
        *[("library", 5), ("sha256", None), ("bytes", 0), ("bytes", "x")],
    ],
)
def test_every_wrong_value_is_two_lines(tmp_path: Path, name: str, value: Any) -> None:
    WHOLE.write(tmp_path)
    noted = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps({**noted, name: value}))
    refused(tmp_path)
    del noted[name]
    (tmp_path / SETTINGS).write_text(json.dumps(noted))
    assert f"it has no {name}" in refused(tmp_path)


def refused(folder: Path) -> str:
    with pytest.raises(StageFailed, match=r"rtx\.json is damaged: .") as caught:
        read_settings(folder)
    assert "\n" not in caught.value.message
    assert caught.value.hint == "build the engine again"
    return caught.value.message


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no tensorrt-rtx engine"):
        read_settings(tmp_path)
