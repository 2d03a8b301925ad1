from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import tiny
from converted import built, resolve, source
from engine_recipes import MachineError, RequestError, StageFailed, events
from engine_recipes.checkpoint import convert, layout, open_checkpoint, open_source, verify
from engine_recipes.checkpoint.safetensors import SafeFile

HERE = Path(__file__).resolve().parents[1]
GOLDEN = sorted((HERE / "data" / "golden").glob("*.json"))
ORACLE = HERE.parents[1] / "shared" / "golden"  # the complete records, where they lie beside the repository
module = sys.modules[convert.__module__]


def hashes(path: Path) -> dict[str, list[Any]]:
    with SafeFile(path) as file:
        return {
            name: [info.dtype, list(info.shape), hashlib.sha256(file.array(name).tobytes()).hexdigest()]
            for name, info in file.tensors.items()
        }


def check_golden(tmp_path: Path, golden: dict[str, Any]) -> None:
    folder, out = resolve(tiny.write_golden(tmp_path / "source", golden["model"])), tmp_path / "out"
    out.mkdir()
    with open_source(folder) as opened:
        stats = convert(opened, out, golden["dtype"], golden["tp_size"], golden["pp_size"])
    assert json.loads((out / "config.json").read_text()) == golden["config_json"]
    written = sorted(path.name for path in out.iterdir())
    assert written == ["config.json", *(f"rank{rank}.safetensors" for rank in range(len(golden["ranks"])))]
    for rank, expected in enumerate(golden["ranks"]):
        assert hashes(out / f"rank{rank}.safetensors") == expected
    assert stats.bytes == sum(path.stat().st_size for path in out.glob("rank*"))
    verify(out)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_the_bytes_are_those_of_nvidias_converter(tmp_path: Path, path: Path) -> None:
    check_golden(tmp_path, json.loads(path.read_text()))


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the complete records are not beside this repository")
def test_the_golden_data_are_those_of_the_complete_records(tmp_path: Path) -> None:
    paths = sorted(ORACLE.glob("*.tp?.pp?.json"))
    assert [path.name for path in paths] == [path.name for path in GOLDEN]
    for number, path in enumerate(paths):
        record = json.loads(path.read_text())
        ranks = [
            {name: list(tensor.values()) for name, tensor in rank.items() if name not in record["buffers"]}
            for rank in record["ranks"]
        ]
        golden = {**record["mapping"], "model": record["recipe"]["model"], "ranks": ranks}
        check_golden(tmp_path / str(number), {**record, **golden})


@st.composite
def models(draw: st.DrawFn) -> tuple[str, dict[str, Any], str, str, int, int, int]:
    """Architecture, config, source dtype, checkpoint dtype, tp_size, pp_size, shards: any that can be split so."""
    arch = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    tp_size, kv_heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2), (2, 4), (3, 3), (4, 2)]))
    unit = kv_heads * tp_size // np.gcd(kv_heads, tp_size)
    layers = draw(st.integers(1, 4))
    config = {
        "num_attention_heads": int(unit) * draw(st.integers(1, 2)),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 4, 8])),
        "hidden_size": draw(st.integers(1, 20)),
        "intermediate_size": tp_size * draw(st.integers(1, 9)),
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(1, 40)),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": arch == "llama" and draw(st.booleans()),
        "mlp_bias": arch == "llama" and draw(st.booleans()),
    }
    dtypes = st.sampled_from(["float32", "float16", "bfloat16"])
    return arch, config, draw(dtypes), draw(dtypes), tp_size, draw(st.integers(1, layers)), draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=models())
def test_joining_gives_back_the_source_cast_by_torch(tmp_path: Path, model: Any) -> None:
    import torch

    arch, config, before, after, tp_size, pp_size, shards = model
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    out = built(tmp_path / "model", arch, after, tp_size, pp_size, shards=shards, dtype=before, **config)
    verify(out)
    arrays = tiny.tensors(tiny.config(arch, torch_dtype=before, **config))

    def by_torch(name: str) -> Any:
        array = arrays[name]
        signed = torch.from_numpy(array.view(f"i{array.itemsize}")).view(getattr(torch, before))
        return signed.to(getattr(torch, after))

    with open_checkpoint(out) as checkpoint:
        (specs,) = layout(checkpoint.decoder)
        assert sorted(checkpoint.names()) == sorted(spec.name for spec in specs)
        for spec in specs:
            expected = torch.cat([by_torch(piece.name) for piece in spec.pieces])
            joined = checkpoint.array(spec.name)
            assert checkpoint.info(spec.name) == (after, joined.shape)
            bits = expected.view(torch.int32 if after == "float32" else torch.int16).numpy()
            np.testing.assert_array_equal(joined.view(bits.dtype), bits)


def test_no_block_is_longer_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    longest = []
    cast = module._cast

    def record(*arguments: Any) -> Any:
        array, finding = cast(*arguments)
        longest.append(array.nbytes)
        return array, finding

    monkeypatch.setattr(module, "_cast", record)
    out = built(tmp_path / "blocks", "llama", "bfloat16", tp_size=2, vocab_size=301)
    assert 500 < max(longest) <= 1000
    monkeypatch.undo()
    whole = built(tmp_path / "whole", "llama", "bfloat16", tp_size=2, vocab_size=301)
    for rank in range(2):
        file = f"rank{rank}.safetensors"
        assert (out / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import ml_dtypes, numpy; from engine_recipes import checkpoint\n"
        "peak = lambda: next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))\n"
        "before = peak(); source = checkpoint.open_source(Path(sys.argv[1]))\n"
        "checkpoint.convert(source, Path(sys.argv[2]), 'float16'); print(peak() - before)"
    )
    sizes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    folder = resolve(tiny.write(tmp_path / "source", **sizes, num_hidden_layers=6))  # 200 MB
    (tmp_path / "out").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout) * 1024
    assert grown < 90e6 < sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(("value", "problem"), [(np.nan, "NaN"), (np.inf, "inf")])
def test_a_damaged_source_is_refused_with_the_tensors_name(tmp_path: Path, value: float, problem: str) -> None:
    arrays = tiny.tensors(tiny.config())
    arrays["model.layers.2.mlp.up_proj.weight"][5, 7] = value
    (tmp_path / "out").mkdir()
    with (
        open_source(resolve(tiny.write_tensors(tmp_path / "source", tiny.config(), arrays))) as opened,
        pytest.raises(RequestError, match=rf"model\.layers\.2\.mlp\.up_proj\.weight holds {problem}") as caught,
    ):
        convert(opened, tmp_path / "out")
    assert "damaged" in caught.value.hint
    assert not (tmp_path / "out" / "config.json").exists()


def test_values_that_do_not_fit_are_counted_and_said(tmp_path: Path) -> None:
    arrays = tiny.tensors(tiny.config())
    name = "model.layers.0.mlp.down_proj.weight"
    arrays[name][3, :3] = ml_dtypes.bfloat16(-1e6), ml_dtypes.bfloat16(65536), ml_dtypes.bfloat16(65280)
    seen: list[events.Event] = []
    (tmp_path / "out").mkdir()
    folder = resolve(tiny.write_tensors(tmp_path / "source", tiny.config(), arrays))
    with events.sink(seen.append), open_source(folder) as opened:
        stats = convert(opened, tmp_path / "out", "float16", tp_size=2)
    assert stats.overflows == {name: 2}
    (text,) = [event["text"] for event in seen if event["event"] == "warn"]
    assert text == f"2 values of {name} did not fit float16 and became inf (largest 9.99e+05); bfloat16 keeps them"


def test_progress_is_said(tmp_path: Path) -> None:
    seen: list[events.Event] = []
    with events.sink(seen.append):
        out = built(tmp_path, pp_size=2)
    labels = [event["label"] for event in seen]
    assert labels == sorted(labels)
    assert set(labels) == {"writing rank0.safetensors", "writing rank1.safetensors"}
    assert seen[-1]["done"] == seen[-1]["total"] <= sum(path.stat().st_size for path in out.iterdir())


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = source(tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    (tmp_path / "out").mkdir()
    with opened, pytest.raises(MachineError, match=r"stage 1 needs \d+ kB in .*, 0 B are free"):
        convert(opened, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_error_of_the_disk_is_told(tmp_path: Path) -> None:
    with source(tmp_path / "source") as opened, pytest.raises(MachineError, match=r"rank0\.safetensors failed"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "rank0.safetensors").touch()
        convert(opened, tmp_path / "out")


def test_unknown_dtypes_and_mappings_are_refused(tmp_path: Path) -> None:
    with source(tmp_path / "source") as opened:
        with pytest.raises(RequestError, match="cannot convert to 'int8'"):
            convert(opened, tmp_path, "int8")  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="num_attention_heads 4 cannot be split over tp_size 3"):
            convert(opened, tmp_path, tp_size=3)


def test_an_edit_sees_whole_rows_of_linear_weights_however_the_model_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    arrays = tiny.tensors(tiny.config("qwen2"))
    seen: set[str] = set()

    def by_row(name: str, rows: Any) -> Any:
        assert rows.dtype == np.float32
        assert rows.shape[1] == arrays[name].shape[1]
        seen.add(name)
        rows /= np.abs(rows).max(axis=1, keepdims=True)
        return rows

    folder = resolve(tiny.write(tmp_path / "source", "qwen2"))
    joined: list[dict[str, Any]] = []
    for tp_size, pp_size in ((1, 1), (2, 1), (4, 2)):
        out = tmp_path / f"{tp_size}.{pp_size}"
        out.mkdir()
        with open_source(folder) as opened:
            convert(opened, out, "bfloat16", tp_size, pp_size, edit=by_row)
        verify(out)
        with open_checkpoint(out) as checkpoint:
            joined.append({name: np.array(checkpoint.array(name)) for name in checkpoint.names()})
    assert seen == {name for name in arrays if name.endswith("_proj.weight")}
    name = "model.layers.1.mlp.down_proj.weight"
    expected = arrays[name].astype(np.float32)
    expected /= np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_array_equal(
        joined[0]["transformer.layers.1.mlp.proj.weight"], expected.astype(ml_dtypes.bfloat16)
    )
    for name, array in joined[0].items():
        np.testing.assert_array_equal(joined[1][name], array)
        np.testing.assert_array_equal(joined[2][name], array)
    plain = "model.embed_tokens.weight"
    np.testing.assert_array_equal(joined[0]["transformer.vocab_embedding.weight"], arrays[plain])


@pytest.mark.parametrize(("wrong", "said"), [(np.nan, "holds NaN"), (1e6, ""), (None, "instead of float32")])
def test_an_edit_that_goes_wrong_is_named(tmp_path: Path, wrong: float | None, said: str) -> None:
    def edit(name: str, rows: Any) -> Any:
        return rows[:, 1:] if wrong is None else rows * 0 + wrong

    (tmp_path / "out").mkdir()
    with source(tmp_path / "source") as opened:
        if said:
            with pytest.raises(StageFailed, match=f"_proj.weight was changed and .*{said}") as caught:
                convert(opened, tmp_path / "out", edit=edit)
            assert caught.value.hint == "report this to the authors of the precision"
            assert not (tmp_path / "out" / "config.json").exists()
        else:
            stats = convert(opened, tmp_path / "out", edit=edit)
            assert sum(stats.overflows.values()) == sum(
                array.size for name, array in tiny.tensors(tiny.config()).items() if name.endswith("_proj.weight")
            )


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda rows: None, r"is of type NoneType instead of float32 \[\d+, \d+\]"),
        (lambda rows: rows.tolist(), "is of type list instead of float32"),
        (lambda rows: rows.astype(complex), r"is complex128 \[\d+, \d+\] instead of float32"),
        (lambda rows: rows.astype(np.float64) * 0 + 1e300, "holds inf"),
    ],
)
def test_an_edit_that_gives_no_weights_is_told_so(tmp_path: Path, edit: Any, said: str) -> None:
    (tmp_path / "out").mkdir()
    with source(tmp_path / "source") as opened, pytest.raises(StageFailed, match=said):
        convert(opened, tmp_path / "out", edit=lambda name, rows: edit(rows))


def test_an_edit_may_compute_with_more_bits(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with source(tmp_path / "source") as opened:
        convert(opened, tmp_path / "one")
        convert(opened, tmp_path / "two", edit=lambda name, rows: rows.astype(np.float64))
    one, two = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("to", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 2)])
def test_what_norms_lack_is_added_in_float32_and_rounded_once(
    tmp_path: Path, dtype: str, to: str, tp_size: int, pp_size: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with source(tmp_path / "source", "gemma", dtype=dtype) as opened:
        convert(opened, out, to, tp_size, pp_size)  # type: ignore[arg-type]
        norms = {
            "transformer.layers.2.input_layernorm.weight": "model.layers.2.input_layernorm.weight",
            "transformer.layers.0.post_layernorm.weight": "model.layers.0.post_attention_layernorm.weight",
            "transformer.ln_f.weight": "model.norm.weight",
        }
        exact = {mine: opened.array(theirs).astype(np.float32) + np.float32(1) for mine, theirs in norms.items()}
        table = opened.array("model.embed_tokens.weight").astype(np.float32)
    verify(out)
    with open_checkpoint(out) as checkpoint:
        kind = np.dtype(getattr(ml_dtypes, to, to))
        for name, value in exact.items():
            np.testing.assert_array_equal(checkpoint.array(name), value.astype(kind))
        for name in ("transformer.vocab_embedding.weight", "lm_head.weight"):  # scaled when it runs, not here
            np.testing.assert_array_equal(checkpoint.array(name), table.astype(kind))
