"""Static checks of a checkpoint: good ones pass, and each bad one is named by what should find it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sabotage
import smollm2
from engine_recipes import Findings, testing
from engine_recipes.checkpoint import Statistics, open_source, read_statistics
from engine_recipes.gate.artifact import examine, tokenizer_check
from sabotage import Made, config, good, tensors

Goods = Callable[..., Made]
SETTINGS, NAMED, SCALES = "settings equal the source's", "quantised as named", "scales are sane"
FINITE, TENSORS, CACHE = "weights are finite", "tensors are the source's", "KV cache risk"


@pytest.fixture(scope="module")
def goods(tmp_path_factory: pytest.TempPathFactory) -> Goods:
    """Good checkpoints, made once for each set of arguments. Copy before changing one."""
    return cache(lambda *args, **named: good(tmp_path_factory.mktemp("good"), *args, **named))


def look(made: Made, folder: Path | None = None, **changes: Any) -> Findings:
    """What is found in a folder that was made from a good checkpoint."""
    choices: dict[str, Any] = {"algorithm": made.algorithm, "bits": made.bits, **changes}
    choices.setdefault("statistics", read_statistics(made.calibration))
    with open_source(made.source) as source:
        return examine(folder or made.checkpoint, source, **choices)


def verdicts(findings: Findings) -> dict[str, str]:
    return {check.name: check.verdict for check in findings.checks}


def note(findings: Findings, name: str) -> str:
    (found,) = [check.note for check in findings.checks if check.name == name]
    return found


def value(findings: Findings, name: str) -> float:
    (found,) = [measure.value for measure in findings.measures if measure.name == name]
    return found


def spoilt(made: Made, tmp_path: Path, spoil: Callable[[Path], None]) -> Path:
    folder = Path(shutil.copytree(made.checkpoint, tmp_path / "bad"))
    spoil(folder)
    return folder


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("arch", "precision", "options"),
    [
        ("llama", "float16", {}),
        ("llama", "float16", {"source_dtype": "float32", "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", "fp8", {"attention_bias": True, "mlp_bias": True, "tp_size": 2}),
        ("llama", "int4", {"kv": "int8", "pp_size": 2, "tie_word_embeddings": True}),
        ("qwen2", "bfloat16", {"tp_size": 2}),
        ("qwen2", "W8A16", {}),
        ("qwen2", "fp8", {}),
        ("qwen3", "fp8", {"kv": "fp8", "tp_size": 2}),
        ("qwen3", "int4", {}),
        ("llama", "int8", {"attention_bias": True, "tp_size": 2}),
        ("qwen2", "int8", {"pp_size": 2}),
    ],
)
def test_a_good_checkpoint_passes_every_check(
    goods: Goods, tmp_path: Path, arch: str, precision: str, options: dict[str, Any], seed: int
) -> None:
    made = good(tmp_path / "made", arch, precision, seed=seed, **options)
    found = look(made)
    assert set(verdicts(found).values()) == {"pass"}, found.checks
    assert (CACHE in verdicts(found)) == ("kv" in options)
    linears = {f"transformer.layers.{i}.{name}" for i in range(4) for name in ("mlp.proj", "attention.qkv")}
    assert linears <= found.layers.keys() and len(found.layers) == 20
    if precision in ("fp8", "int8") or "kv" in options:
        # what is calibrated knows nothing of the dtype that the input scale is rounded to
        assert value(found, "scale_drift") < (0.01 if precision == "int8" else 1e-6)


CASES = [
    (sabotage.rope_base, "float16", "llama", SETTINGS, "fail", "rope_theta is 50000"),
    (sabotage.rope_base, "fp8", "qwen2", SETTINGS, "fail", "rope_theta is 10000"),
    (sabotage.norm_epsilon, "int4", "llama", SETTINGS, "fail", "norm_epsilon is 0.001"),
    (sabotage.activation, "float16", "llama", SETTINGS, "fail", "activation is gelu"),
    (sabotage.fewer_positions, "float16", "llama", SETTINGS, "warn", "max_position_embeddings is 128"),
    (sabotage.drop_last_layer, "float16", "llama", SETTINGS, "fail", "layers is 3, the source's 4"),
    (
        sabotage.drop_last_layer,
        "fp8",
        "llama",
        TENSORS,
        "fail",
        "transformer.layers.3.input_layernorm.weight is mi",
    ),
    (sabotage.nan_in_one, "float16", "llama", FINITE, "fail", "transformer.layers.1.mlp.fc.weight"),
    (sabotage.nan_in_one, "fp8", "llama", FINITE, "fail", "transformer.layers.1.mlp.fc.weight"),
    (sabotage.nan_in_one, "int4", "llama", SCALES, "fail", "layers.1.mlp.fc.weights_scaling_factor holds nan"),
    (sabotage.nan_in_one, "int8", "llama", SCALES, "fail", "layers.1.mlp.fc.weights_scaling_factor holds nan"),
    (
        sabotage.negative_scale,
        "int8",
        "llama",
        SCALES,
        "fail",
        "layers.1.mlp.proj.activation_scaling_factor holds -",
    ),
    (
        sabotage.negative_scale,
        "fp8",
        "llama",
        SCALES,
        "fail",
        "layers.1.mlp.proj.activation_scaling_factor holds -",
    ),
    (sabotage.activation_scales_one, "fp8", "llama", SCALES, "fail", "is 1 in all 4 layers"),
    (sabotage.activation_scales_one, "int8", "llama", SCALES, "fail", "is 1 in all 4 layers"),
    (sabotage.no_activation_scale, "int8", "llama", SCALES, "fail", "layers.1.mlp.proj has no activation_scaling"),
    (sabotage.layer_left_plain, "int8", "llama", NAMED, "fail", "layers.1.mlp.proj.weight is stored as bfloat16"),
    (sabotage.head_int8, "int4", "llama", NAMED, "fail", "lm_head.weight is int8"),
    (sabotage.head_int8, "fp8", "llama", NAMED, "fail", "lm_head is quantised"),
    (sabotage.wrong_dtype_claim, "float16", "llama", NAMED, "fail", "is float16, config.json says bfloat16"),
    (sabotage.wrong_algorithm_claim, "float16", "llama", NAMED, "fail", "quant_algo FP8, the name none"),
    (sabotage.wrong_algorithm_claim, "int4", "llama", NAMED, "fail", "quant_algo null, the name W4A16_AWQ"),
    (sabotage.layer_left_plain, "fp8", "llama", NAMED, "fail", "layers.1.mlp.proj.weight is stored as bfloat16"),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("spoil", "precision", "arch", "name", "verdict", "says"), CASES)
def test_a_bad_checkpoint_is_named(
    goods: Goods,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    precision: str,
    arch: str,
    name: str,
    verdict: str,
    says: str,
    seed: int,
) -> None:
    made = goods(arch, precision, seed=seed)
    found = look(made, spoilt(made, tmp_path, spoil))
    assert verdicts(found)[name] == verdict, found.checks
    assert says in note(found, name)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("spoil", "precision", "kv", "powers", "tensor"),
    [
        (sabotage.activation_scale_quarter, "fp8", "none", 2, "activation_scaling_factor"),
        (sabotage.kv_scale_times_8, "fp8", "fp8", 3, "layers.1.attention."),
        (sabotage.kv_scale_times_8, "int4", "int8", 3, "layers.1.attention."),
        (sabotage.kv_scale_one, "fp8", "int8", 2, "cache_scaling_factor"),
        (sabotage.negative_scale, "fp8", "none", 99, "layers.1.mlp.proj.activation_scaling_factor"),
    ],
)
def test_scales_that_nobody_calibrated_drift(
    goods: Goods,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    precision: str,
    kv: str,
    powers: float,
    tensor: str,
    seed: int,
) -> None:
    made = goods("qwen3", precision, kv=kv, seed=seed)
    found = look(made, spoilt(made, tmp_path, spoil))
    (drift,) = [measure for measure in found.measures if measure.name == "scale_drift"]
    assert drift.value > powers - 0.01
    assert tensor in drift.note


def test_without_a_calibration_no_drift_is_measured(goods: Goods) -> None:
    found = look(goods("llama", "fp8"), statistics=None)
    assert "scale_drift" not in {measure.name for measure in found.measures}
    assert set(verdicts(found).values()) == {"pass"}


def test_a_layer_that_exclude_modules_names_may_be_plain_and_must_be(goods: Goods, tmp_path: Path) -> None:
    made = goods("llama", "fp8")

    def exclude(folder: Path) -> None:
        with config(folder) as found:
            found["quantization"]["exclude_modules"] = ["lm_head", "transformer.layers.1.mlp.proj"]

    def leave_plain(folder: Path) -> None:
        sabotage.layer_left_plain(folder)
        exclude(folder)

    found = look(made, spoilt(made, tmp_path / "named", leave_plain))
    assert verdicts(found)[NAMED] == "pass"
    assert value(found, "weight_rounding") > 5  # what was left plain is an FP8 weight in 16 bits
    found = look(made, spoilt(made, tmp_path / "only-named", exclude))
    assert "is stored as FP8 though exclude_modules names it" in note(found, NAMED)


def test_fewer_or_more_bits_than_the_name_says_are_found(goods: Goods) -> None:
    for precision, bits in (("fp8", 4.25), ("int4", 8.0), ("float16", 8.0)):
        found = look(goods("llama", precision), bits=bits)
        assert verdicts(found)[NAMED] == "fail"
        assert "bits a weight" in note(found, NAMED)


def test_an_8_bit_cache_of_biased_keys_is_a_warning(tmp_path: Path) -> None:
    biased = look(good(tmp_path / "2", "qwen2", "fp8", kv="int8"))
    assert verdicts(biased)[CACHE] == "warn"
    assert "biases and no norms" in note(biased, CACHE)


def test_large_keys_in_an_fp8_cache_are_a_warning(goods: Goods) -> None:
    made = goods("qwen3", "fp8", kv="fp8")
    kept = read_statistics(made.calibration)
    large = {name: kept.vector(name) for name in kept.names()}
    large["model.layers.2.self_attn.k_proj.cache_amax"] = np.array([300], np.float32)
    found = look(made, statistics=Statistics(kept.about, large))
    assert verdicts(found)[CACHE] == "warn"
    assert "up to 300 in 1 of 4 layers, first transformer.layers.2.attention" in note(found, CACHE)


def remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def remove_weights(folder: Path) -> None:
    (folder / "rank0.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "rank0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change(key: str, to: Any, within: str | None = None) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        with config(folder) as found:
            (found[within] if within else found)[key] = to

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        remove_config,
        remove_weights,
        cut_weights,
        change("rotary_base", None),
        change("hidden_size", "many"),
        change("quantization", "FP8"),
        change("mapping", 3),
        change("tp_size", 3, "mapping"),
        change("exclude_modules", 5, "quantization"),
        change("exclude_modules", [5], "quantization"),
    ],
)
def test_a_folder_that_cannot_be_read_fails_without_a_crash(
    goods: Goods, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    made = goods("llama", "fp8")
    found = look(made, spoilt(made, tmp_path, spoil))
    assert verdicts(found)["checkpoint can be read"] == "fail"
    assert note(found, "checkpoint can be read")


def test_weights_of_another_shape_are_named_and_the_rest_is_compared(goods: Goods, tmp_path: Path) -> None:
    def spoil(folder: Path) -> None:
        with tensors(folder) as held:
            held["transformer.layers.1.mlp.fc.weight"] = held["transformer.layers.1.mlp.fc.weight"][:-2]
            del held["transformer.layers.2.mlp.proj.weights_scaling_factor"]
            held["transformer.layers.0.extra"] = held["transformer.ln_f.weight"]

    made = goods("llama", "fp8")
    found = look(made, spoilt(made, tmp_path, spoil))
    said = note(found, TENSORS)
    assert "transformer.layers.1.mlp.fc.weight is float8_e4m3fn [254, 128]" in said
    assert "transformer.layers.2.mlp.proj.weight is FP8 and has no weights_scaling_factor" in said
    assert "transformer.layers.0.extra is nothing that the source has" in said
    assert len(found.layers) == 18


def test_an_unknown_algorithm_is_said_and_only_its_finiteness_is_judged(goods: Goods, tmp_path: Path) -> None:
    made = goods("llama", "float16")
    folder = spoilt(made, tmp_path, change("quant_algo", "W3A16_NEW", "quantization"))
    found = look(made, folder, algorithm="W3A16_NEW")
    assert verdicts(found)["weights compared"] == "warn"
    assert not found.measures and verdicts(found)[FINITE] == "pass"
    sabotage.nan_in_one(folder)
    assert verdicts(look(made, folder, algorithm="W3A16_NEW"))[FINITE] == "fail"


# --- the tokenizer ------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A source's folder and an engine's with the same tokenizer."""
    for name in ("source", "engine"):
        (tmp_path / name).mkdir()
        testing.write_tokenizer(tmp_path / name, 259)
    return tmp_path / "source", tmp_path / "engine"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_same_tokenizer_passes(folders: tuple[Path, Path]) -> None:
    assert tokenizer_check(*folders).verdict == "pass"
    real = smollm2.folder()
    assert tokenizer_check(real, real).verdict == "pass"


def test_a_tokenizer_with_two_letters_exchanged_is_found(folders: tuple[Path, Path], tmp_path: Path) -> None:
    sabotage.wrong_tokenizer(folders[1])
    found = tokenizer_check(*folders)
    assert found.verdict == "fail" and "otherwise" in found.note
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2.folder() / name, tmp_path / name)
    sabotage.wrong_tokenizer(tmp_path)
    assert tokenizer_check(smollm2.folder(), tmp_path).verdict == "fail"


def test_other_sizes_stops_and_templates_are_found(folders: tuple[Path, Path]) -> None:
    source, engine = folders
    edit(engine / "generation_config.json", eos_token_id=[7, 2])
    assert "it stops at [2, 7]" in tokenizer_check(source, engine).note
    edit(engine / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert "its chat template renders otherwise" in tokenizer_check(source, engine).note
    edit(engine / "tokenizer_config.json", chat_template=None)
    assert "its chat template renders otherwise" in tokenizer_check(source, engine).note
    testing.write_tokenizer(engine, 200)
    assert "it has 200 ids, the source's 259" in tokenizer_check(source, engine).note


def test_models_without_chat_templates_have_the_same(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        edit(folder / "tokenizer_config.json", chat_template=None)
    assert tokenizer_check(*folders).verdict == "pass"


def test_a_missing_tokenizer_is_the_engines_fault_only_if_the_source_has_one(folders: tuple[Path, Path]) -> None:
    source, engine = folders
    (engine / "tokenizer.json").write_text("{")
    assert tokenizer_check(source, engine).verdict == "fail"
    (engine / "tokenizer.json").unlink()
    missing = tokenizer_check(source, engine)
    assert missing.verdict == "fail" and "no tokenizer.json" in missing.note
    (source / "tokenizer.json").unlink()
    assert tokenizer_check(source, engine).verdict == "warn"


@pytest.mark.parametrize(
    ("precision", "options"), [("bfloat16", {"tp_size": 2}), ("fp8", {}), ("int4", {"pp_size": 2})]
)
def test_a_good_checkpoint_of_a_gemma_passes_every_check(goods: Goods, precision: str, options: dict[str, int]) -> None:
    found = look(goods("gemma", precision, **options))
    assert set(verdicts(found).values()) == {"pass"}, found.checks
    assert value(found, "weight_rounding") < 1.8


@pytest.mark.parametrize(
    ("arch", "key", "wrong", "says"),
    [
        ("gemma", "embedding_multiplier", 1.0, "embedding_scale is 1.0, the source's 11.31"),
        ("partial", "rotary_embedding_dim", 32, "rotated is 32, the source's 16"),
    ],
)
def test_what_differs_from_llama_must_not_get_lost(
    goods: Goods, tmp_path: Path, arch: str, key: str, wrong: float, says: str
) -> None:
    made = goods(arch, "float16")

    def say(folder: Path) -> None:
        with config(folder) as found:
            found[key] = wrong

    found = look(made, spoilt(made, tmp_path, say))
    assert verdicts(found)[SETTINGS] == "fail"
    assert says in note(found, SETTINGS)


def test_norms_that_lack_what_is_to_be_added_are_found(goods: Goods, tmp_path: Path) -> None:
    made = goods("gemma", "bfloat16")

    def take_away(folder: Path) -> None:
        with tensors(folder) as found:
            found["transformer.layers.1.input_layernorm.weight"] -= 1

    found = look(made, spoilt(made, tmp_path, take_away))
    (worst,) = [measure for measure in found.measures if measure.name == "plain_error"]
    assert worst.value > 0.9
    assert worst.note == "transformer.layers.1.input_layernorm.weight"
