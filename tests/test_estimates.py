from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import converted
from engine_recipes import Decoder
from engine_recipes.entries import Calibration, Costs, Engine, Precision
from engine_recipes.estimates import Needs, estimate, kv_token_bytes, runtime, short
from engine_recipes.facts import Facts, Gpu
from engine_recipes.registry import load

GB = 1_000_000_000
SEVEN = 7_615_616_512
WHERE: dict[str, Any] = {"module": "made", "takes": ("trtllm-checkpoint",), "gives": "made"}
HALF = Precision(name="half", module="made", bits=16, costs=Costs(memory_base=50_000_000))
EIGHTH = Precision(name="eighth", module="made", bits=8, costs=Costs(memory_base=50_000_000, disk=1.125))
RANGES = Calibration(name="ranges", module="made", costs=Costs(memory_base=GB, memory=0.5, gpu_memory=1.0))
SWIFT = Engine(
    name="swift",
    targets=("sm89",),
    costs=Costs(memory_base=GB, memory=5.0, disk=4.0, gpu_memory=2.0),
    runtime=Costs(memory_base=GB, gpu_memory=2.0),
    **WHERE,
)
ON_CPU = Engine(name="cpu", targets=("cpu",), runtime=Costs(memory_base=GB, memory=4.0), **WHERE)

#: Layers, KV heads and head size of real models, with their number of parameters.
MODELS = {
    "smollm2-135m": (134_515_008, 30, 3, 64),
    "qwen2.5-0.5b": (494_032_768, 24, 2, 64),
    "llama3.2-1b": (1_235_814_400, 16, 8, 64),
    "llama3.1-8b": (8_030_261_248, 32, 8, 128),
    "qwen3-14b": (14_768_307_200, 40, 8, 128),
    "qwen2.5-7b": (SEVEN, 28, 4, 128),
    "llama3.1-70b": (70_553_706_496, 80, 8, 128),
}


def decoder(folder: Path, **changes: Any) -> Decoder:
    with converted.source(folder, "llama", **changes) as source:
        return source.decoder


def test_each_stage_takes_its_base_and_so_much_for_each_parameter() -> None:
    found = estimate(1_000_000_000, EIGHTH, SWIFT, RANGES)
    assert found == {
        "calibrate": Needs(1_500_000_000),
        # a quarter of so small a model is taken for its tables: 1.25 bytes a parameter
        "stage1": Needs(50_000_000, 1_250_000_000),
        "stage2": Needs(GB + 3_125_000_000, 2_500_000_000, 1_250_000_000),
    }
    assert estimate(1_000_000_000, EIGHTH, SWIFT, RANGES, gpu=True)["calibrate"] == Needs(GB, 0, GB)
    assert "calibrate" not in estimate(GB, HALF, SWIFT)
    assert estimate(GB, HALF, SWIFT)["stage1"].disk == 2 * GB  # by its bits: it names no costs


def test_a_model_of_unknown_size_is_not_estimated() -> None:
    assert estimate(0, HALF, SWIFT, RANGES) == {}
    assert runtime(0, HALF, SWIFT, tokens=4096) == Needs()


def test_ranks_share_gpus_and_the_host_builds_for_all() -> None:
    one, four = (estimate(GB, HALF, SWIFT, ranks=ranks)["stage2"] for ranks in (1, 4))
    assert (four.memory, four.disk, four.gpu_memory) == (one.memory, one.disk, one.gpu_memory // 4)


@pytest.mark.parametrize("tied", [False, True])
def test_with_the_decoder_the_checkpoints_bytes_are_known(tmp_path: Path, tied: bool) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2048, "tie_word_embeddings": tied}
    out = converted.built(tmp_path, "llama", **shape)
    known = decoder(tmp_path / "again", **shape)
    said = estimate(known.parameters, HALF, SWIFT, decoder=known)["stage1"].disk
    assert said == pytest.approx((out / "rank0.safetensors").stat().st_size, rel=0.01)


def test_tables_stay_at_16_bits(tmp_path: Path) -> None:
    known = decoder(tmp_path, vocab_size=2048, tie_word_embeddings=True)
    tables = 2048 * known.hidden_size
    said = estimate(known.parameters, EIGHTH, SWIFT, decoder=known)["stage1"].disk
    assert said == (known.parameters - tables) + 2 * tables * 2


def test_linear_layers_that_are_excluded_stay_at_16_bits(tmp_path: Path) -> None:
    known = decoder(tmp_path)

    def said(*excluded: str) -> int:
        return estimate(known.parameters, EIGHTH, SWIFT, decoder=known, excluded=excluded)["stage1"].disk

    assert said("*.mlp.proj") - said() == known.layers * known.hidden_size * known.intermediate_size
    assert said("*.mlp.fc") - said() == 2 * known.layers * known.hidden_size * known.intermediate_size, "gate as well"
    assert said("no such layer") == said()
    loaded, without = (runtime(1, EIGHTH, SWIFT, tokens=0, decoder=known, excluded=e) for e in (["*.mlp.proj"], []))
    assert loaded.gpu_memory - without.gpu_memory == said("*.mlp.proj") - said()
    half = estimate(known.parameters, HALF, SWIFT, decoder=known)
    assert estimate(known.parameters, HALF, SWIFT, decoder=known, excluded=["*.mlp.proj"]) == half


def test_a_loaded_engine_takes_its_weights_and_the_cache_where_the_weights_are(tmp_path: Path) -> None:
    known = decoder(tmp_path)
    token = 2 * known.layers * known.kv_heads * known.head_size * 2
    weights = known.parameters * 2
    on_cpu = runtime(known.parameters, HALF, ON_CPU, tokens=1000, decoder=known)
    assert on_cpu == Needs(GB + 2 * weights + 1000 * token)
    on_gpu = runtime(known.parameters, HALF, SWIFT, tokens=1000, decoder=known)
    assert on_gpu == Needs(GB, 0, weights + 1000 * token)
    narrow = runtime(known.parameters, HALF, SWIFT, tokens=1000, decoder=known, kv_bytes=1, ranks=2)
    assert narrow.gpu_memory == (weights + 500 * token) // 2


@pytest.mark.parametrize("name", MODELS)
def test_without_a_decoder_the_cache_is_guessed_within_a_factor_of_two(name: str, tmp_path: Path) -> None:
    parameters, layers, kv_heads, head_size = MODELS[name]
    known = replace(decoder(tmp_path), layers=layers, kv_heads=kv_heads, head_size=head_size)
    assert 0.5 <= kv_token_bytes(parameters) / kv_token_bytes(parameters, known) <= 2


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    needs = {"stage2": Needs(20 * GB, 1000, 10 * GB)}
    big = Facts(gpus=(Gpu("A", "8.9", 24 * GB, ""),), memory_available_bytes=24 * GB)
    assert short("m:fp8@swift", needs, big, tmp_path) is None  # type: ignore[arg-type]
    assert short("m:fp8@swift", {}, Facts(memory_available_bytes=1), tmp_path) is None


def test_too_little_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    error = short("m:fp8@swift", {"stage1": Needs(), "stage2": Needs(40 * GB)}, mem(24 * GB), tmp_path)
    assert error is not None
    assert error.message == "stage2 of m:fp8@swift needs about 40.0 GB of memory, 24.0 GB are available"
    assert error.hint.endswith("or --force")
    assert error.exit_code == 3
    assert short("m", {"stage2": Needs(24 * GB)}, mem(24 * GB), tmp_path) is not None  # the rest of the machine
    assert short("m", {"stage2": Needs(40 * GB)}, mem(0), tmp_path) is None  # not known


def test_a_rough_estimate_refuses_nothing_small(tmp_path: Path) -> None:
    assert short("m", {"calibrate": Needs(3 * GB)}, mem(GB // 2), tmp_path) is None
    assert short("m", {"calibrate": Needs(5 * GB)}, mem(GB // 2), tmp_path) is not None


def test_an_engine_that_no_gpu_here_can_hold_is_refused(tmp_path: Path) -> None:
    gpus = (Gpu("A", "8.9", 16 * GB, ""), Gpu("B", "8.9", 24 * GB, ""))
    error = short("m", {"stage2": Needs(gpu_memory=30 * GB)}, Facts(gpus=gpus), tmp_path)
    assert error is not None
    assert error.message == "stage2 of m needs about 30.0 GB of GPU memory, the GPU has 24.0 GB"
    assert short("m", {"stage2": Needs(gpu_memory=30 * GB)}, Facts(), tmp_path) is None  # built for elsewhere
    unknown = Facts(gpus=(Gpu("A", "8.9", 0, ""),))
    assert short("m", {"stage2": Needs(gpu_memory=30 * GB)}, unknown, tmp_path) is None


def test_the_disk_must_hold_what_all_stages_leave(tmp_path: Path) -> None:
    from engine_recipes.space import free_bytes

    half = free_bytes(tmp_path) * 6 // 10
    assert short("m", {"stage1": Needs(disk=half)}, Facts(), tmp_path / "not yet" / "there") is None
    error = short("m", {"stage1": Needs(disk=half), "stage2": Needs(disk=half)}, Facts(), tmp_path)
    assert error is not None
    assert f"in {tmp_path}, " in error.message
    assert error.hint.endswith("or --force")


def mem(available: int) -> Facts:
    return Facts(memory_available_bytes=available)


def test_no_small_model_of_ours_is_refused_on_a_small_machine(tmp_path: Path) -> None:
    registry = load()
    for model in registry.models.entries.values():
        if model.parameters > 500_000_000:
            continue
        for precision in registry.precisions.entries.values():
            for engine in registry.engines.entries.values():
                needs = estimate(model.parameters, precision, engine, registry.calibration_of(precision))
                assert short(model.name, needs, mem(GB), tmp_path) is None, (model.name, precision.name)


def test_a_7b_model_is_calibrated_on_a_laptop_and_a_70b_model_is_not_compiled_on_one() -> None:
    registry = load()
    precision, calibration = registry.precisions["fp8"], registry.calibrations["amax"]
    for name in ("tensorrt-rtx", "tensorrt-llm"):
        engine = registry.engines[name]
        assert estimate(SEVEN, precision, engine, calibration)["calibrate"].memory < 15 * GB
        assert estimate(70_553_706_496, precision, engine)["stage2"].memory > 64 * GB
