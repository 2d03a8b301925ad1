"""What fp8 and int4-awq offer after a rejection, one after another until nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from converted import resolve
from engine_recipes import Artifact, Decoder, Report, StageContext
from engine_recipes.checkpoint import excluded_linears, linear_sizes, open_source
from engine_recipes_precisions import fp8, int4_awq

AT = "transformer.layers."
OPTIONS = {"tp_size": 1, "pp_size": 1, "dtype": "auto", "kv_cache": "none", "exclude": "", "device": "cpu"}
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 10, "vocab_size": 64}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resolve(tiny.write(tmp_path_factory.mktemp("hf"), "llama", **SIZES))


def context(hf: Path, **options: Any) -> StageContext:
    return StageContext(
        "m:p@onnxruntime", "stage1", {**OPTIONS, **options}, (Artifact("hf-checkpoint", hf, "0" * 64),), hf / "out"
    )


def decoder_of(hf: Path) -> Decoder:
    with open_source(hf) as source:
        return source.decoder


def errors(hf: Path, **worse: float) -> dict[str, float]:
    """A tenth everywhere, and more where `worse` says so: `L7_mlp_proj=0.4`."""
    names = {f"{AT}{n[1:].replace('_', '.')}": error for n, error in worse.items()}
    return dict.fromkeys(linear_sizes(decoder_of(hf)), 0.1) | names


def sequence(module: Any, hf: Path, layers: dict[str, float], **options: Any) -> list[dict[str, Any]]:
    """Every offer that is tried if each build is rejected: always the first, as `--fallback` does."""
    tried = []
    while offers := module.fallbacks(context=context(hf, **options), report=Report("fail", layers=layers)):
        for offer in offers:
            assert all(options.get(name, OPTIONS.get(name)) != value for name, value in offer.items())
            changed = {**options, **offer}
            module.check_decoder(context=context(hf, **changed), decoder=decoder_of(hf))
            json.dumps(offer)
        options = {**options, **offers[0]}
        tried.append(dict(offers[0]))
        assert len(tried) < 9
    return tried


def share(hf: Path, exclude: str) -> float:
    """Of the linear layers' weights, what stays at 16 bits."""
    sizes = linear_sizes(decoder_of(hf))
    return sum(sizes[name] for name in exclude.split(",")) / sum(sizes.values())


def test_fp8_gives_up_the_small_cache_first_and_then_the_worst_layers_up_to_a_fifth(hf: Path) -> None:
    layers = errors(hf, L7_mlp_proj=0.4, L3_attention_qkv=0.3, L4_attention_dense=0.25, L5_mlp_gate=0.2)
    cache, *rest = sequence(fp8, hf, layers, kv_cache="fp8")
    assert cache == {"kv_cache": "none"}
    found = [offer["exclude"] for offer in rest]
    assert [list(offer) for offer in rest] == [["exclude"]] * 3
    assert found[0] == f"{AT}3.attention.qkv,{AT}4.attention.dense,{AT}7.mlp.proj"
    assert found[1].startswith(f"{found[0]},{AT}")
    assert {f"{AT}5.mlp.fc", f"{AT}5.mlp.gate"} < set(found[1].split(","))  # though fc is no worse than others
    shares = [share(hf, exclude) for exclude in found]
    assert 0.05 <= shares[0] < 0.10 <= shares[1] < shares[2] <= 0.20
    assert set(found[1].split(",")) < set(found[2].split(","))


def test_equal_errors_are_taken_in_the_order_of_the_layers(hf: Path) -> None:
    first, *_ = sequence(fp8, hf, errors(hf))
    assert first == {"exclude": f"{AT}0.attention.qkv,{AT}0.attention.dense,{AT}0.mlp.fc,{AT}0.mlp.gate"}


@pytest.mark.parametrize("group_size", [0, 128])
def test_int4_takes_smaller_groups_before_it_excludes_layers(hf: Path, group_size: int) -> None:
    layers = errors(hf, L9_mlp_proj=0.4)
    tried = sequence(int4_awq, hf, layers, kv_cache="int8", group_size=group_size)
    assert [list(offer) for offer in tried] == [["kv_cache"], ["group_size"], ["exclude"], ["exclude"], ["exclude"]]
    assert tried[1] == {"group_size": 64}
    assert f"{AT}9.mlp.proj" in tried[2]["exclude"].split(",")


@pytest.mark.parametrize("options", [{"group_size": 64}, {"group_size": 0, "tp_size": 2}])
def test_groups_that_are_small_already_are_not_offered(hf: Path, options: dict[str, Any]) -> None:
    tried = sequence(int4_awq, hf, errors(hf), **options)  # over two ranks 128 does not divide
    assert {name for offer in tried for name in offer} == {"exclude"}


def test_what_is_excluded_already_counts_and_stays(hf: Path) -> None:
    given = "*.2.mlp.proj, transformer.layers.3.mlp.fc"
    layers = errors(hf, L2_mlp_proj=0.9, L3_mlp_gate=0.9, L6_mlp_proj=0.8)
    tried = [offer["exclude"] for offer in sequence(fp8, hf, layers, exclude=given)]
    assert tried[0].startswith(f"*.2.mlp.proj,{AT}3.mlp.fc,")
    assert len(tried) == 2  # it begins at 6 %
    names = excluded_linears(decoder_of(hf), tried[-1].split(","))
    assert {f"{AT}2.mlp.proj", f"{AT}3.mlp.gate", f"{AT}6.mlp.proj"} < set(names)
    assert sequence(fp8, hf, layers, exclude="*.mlp.proj") == []  # more than a fifth


def test_layers_without_an_error_that_is_a_number_are_not_excluded(hf: Path) -> None:
    assert sequence(fp8, hf, {}) == []
    assert sequence(fp8, hf, dict.fromkeys(linear_sizes(decoder_of(hf)), 0.0)) == []
    broken = errors(hf, L1_mlp_proj=float("nan"), L2_mlp_proj=float("inf"))
    for offer in sequence(fp8, hf, broken):
        assert not {f"{AT}1.mlp.proj", f"{AT}2.mlp.proj"} & set(offer["exclude"].split(","))


def test_pipeline_ranks_share_one_list_so_single_layers_are_not_offered(hf: Path) -> None:
    assert sequence(fp8, hf, errors(hf), pp_size=2, kv_cache="int8") == [{"kv_cache": "none"}]


def test_a_layer_that_alone_is_more_than_the_bound_is_left(tmp_path: Path) -> None:
    hf = resolve(tiny.write(tmp_path / "hf", "llama", **{**SIZES, "num_hidden_layers": 2}))
    tried = sequence(fp8, hf, errors(hf, L0_mlp_gate=0.9, L1_mlp_proj=0.8))  # fc and gate are a quarter
    assert tried[0] == {"exclude": f"{AT}1.mlp.proj"}
    assert all(share(hf, offer["exclude"]) <= 0.20 for offer in tried)
