from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import different
import tiny
from engine_recipes import RequestError, from_hf
from engine_recipes.checkpoint import LLAMA_CONFIG, config_json, decoder_from_config, layout
from engine_recipes_models import llama, qwen

LLAMA3 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
    "rope_type": "llama3",
}


@pytest.mark.parametrize("arch", tiny.CONFIGS)
def test_what_was_written_is_read_back(arch: str) -> None:
    family = llama if arch == "llama" else qwen
    decoder = family.resolve_checkpoint(tiny.config(arch, rope_scaling=LLAMA3, tie_word_embeddings=True))
    config = config_json(decoder, "float16", 2, 2)
    names = [spec.name for spec in layout(decoder)[0]]
    for tensors in (None, names):
        back = decoder_from_config(config, tensors)
        assert back == replace(decoder, dtype="float16", config={})


@pytest.mark.parametrize("arch", tiny.DIFFERENT)
def test_what_differs_from_llama_is_read_back(arch: str) -> None:
    decoder = different.resolve_checkpoint(tiny.config(arch))
    config = config_json(decoder, "bfloat16", 2, 2)
    # norms are plain in a checkpoint, whatever the source's add
    assert decoder_from_config(config) == replace(decoder, config={}, norm_offset=0.0)


def test_gemma_is_written_as_tensorrt_llm_writes_it() -> None:
    decoder = different.resolve_checkpoint(tiny.config("gemma"))
    config = config_json(decoder, "bfloat16", tp_size=2)
    assert config["hidden_act"] == "gelu_pytorch_tanh"
    assert config["share_embedding_table"] is True
    assert config["inter_layernorms"] is False
    assert config["use_parallel_embedding"] is True  # its GemmaConfig insists on it, where ranks share a layer
    assert config_json(decoder, "bfloat16")["use_parallel_embedding"] is False
    assert config["embedding_multiplier"] == 8.0  # √64


def test_a_scaled_llama_says_so_in_tensorrt_llms_own_key() -> None:
    decoder = from_hf(tiny.config(), embedding_scale=12.0, config=LLAMA_CONFIG)
    assert config_json(decoder, "float16")["embedding_multiplier"] == 12.0
    assert config_json(replace(decoder, embedding_scale=1.0), "float16")["embedding_multiplier"] == 1.0


@pytest.mark.parametrize("said", [{"rotary_embedding_dim": 16}, {"rotary_pct": 0.5}])
def test_both_ways_to_say_how_much_of_a_head_is_rotated_are_read(said: dict[str, object]) -> None:
    config = config_json(from_hf(tiny.config("partial")), "float16")
    del config["rotary_embedding_dim"], config["rotary_pct"]
    assert decoder_from_config({**config, **said}).rotary_size == 16
    assert decoder_from_config(config).rotary_size == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_multiplier": -1}, "embedding_multiplier is -1"),
        ({"embedding_multiplier": "8"}, "embedding_multiplier is '8'"),
        ({"embedding_multiplier": "8" * 999}, r"embedding_multiplier is '8{12}\.\.\.8{13}'\n"),
        ({"inter_layernorms": True}, "norms behind the blocks"),
        ({"architecture": "Gemma2ForCausalLM"}, "norms behind the blocks"),
        ({"rotary_embedding_dim": 64}, "rotary_embedding_dim is 64, of heads of 32"),
        ({"rotary_embedding_dim": 15}, "rotary_embedding_dim is 15"),
        ({"rotary_embedding_dim": None, "rotary_pct": 3}, "rotary_pct is 3"),
    ],
)
def test_a_gemma_that_cannot_be_understood_is_refused(changes: dict[str, object], message: str) -> None:
    config = config_json(different.resolve_checkpoint(tiny.config("gemma")), "float16")
    with pytest.raises(RequestError, match=message) as caught:
        decoder_from_config({**config, **changes})
    assert caught.value.hint


def test_what_modelopt_writes_of_a_gemma_is_understood() -> None:
    decoder = different.resolve_checkpoint(tiny.config("gemma"))
    config = config_json(decoder, "bfloat16")
    for key in ("embedding_multiplier", "inter_layernorms", "tie_word_embeddings", "rotary_embedding_dim"):
        del config[key]
    assert decoder_from_config(config) == replace(decoder, config={}, norm_offset=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_multiplier": 0.5}, "attention_multiplier = 0.5"),
        ({"residual_multiplier": float("nan")}, "residual_multiplier = nan"),
        ({"output_multiplier_scale": [2.0] * 999}, "output_multiplier_scale = .{0,50}, which"),
        ({"residual_mlp": True}, "residual_mlp = True"),
        ({"qk_layernorm": True}, "qk_layernorm = True"),
    ],
)
def test_what_a_decoder_cannot_say_is_refused_and_not_left_out(changes: dict[str, object], message: str) -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16")
    assert decoder_from_config({**config, **dict.fromkeys(changes)})  # null is as if it were not there
    with pytest.raises(RequestError, match=message) as caught:
        decoder_from_config({**config, **changes})
    assert "are supported" in caught.value.hint


@pytest.mark.parametrize(
    "family",
    [
        {"hidden_size": 65},
        {"rotary_embedding_dim": 8},
        {"rotary_pct": 0.5},
        {"embedding_multiplier": 3.0},
        {"tie_word_embeddings": True},
        {"rotary_base": 1e6},
        {"quantization": {"quant_algo": "FP8"}},
    ],
)
def test_a_familys_keys_cannot_describe_another_model(family: dict[str, object]) -> None:
    (key,) = family
    with pytest.raises(RequestError, match=rf"Decoder\.config says {key} = ") as caught:
        config_json(from_hf(tiny.config(), config={**LLAMA_CONFIG, **family}), "float16")
    assert caught.value.hint


def test_a_familys_keys_may_repeat_the_decoder_and_set_what_describes_no_model() -> None:
    family = {"hidden_size": 64, "embedding_multiplier": 12.0, "rotary_pct": 1.0, "logits_dtype": "float16"}
    config = config_json(from_hf(tiny.config(), embedding_scale=12.0, config=family), "float16")
    assert config["embedding_multiplier"] == 12.0
    assert config["logits_dtype"] == "float16"


def test_rope_scaling_is_copied_whole() -> None:
    decoder = llama.resolve_checkpoint(tiny.config(rope_scaling=LLAMA3))
    assert config_json(decoder, "bfloat16")["rotary_scaling"] == LLAMA3


def test_rope_scaling_default_becomes_null() -> None:
    decoder = llama.resolve_checkpoint(tiny.config(rope_scaling={"rope_type": "default"}))
    assert config_json(decoder, "bfloat16")["rotary_scaling"] is None


def test_quantization_keys_are_added() -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16", quantization={"quant_algo": "FP8"})
    assert config["quantization"]["quant_algo"] == "FP8"
    assert config["quantization"]["group_size"] == 128


@pytest.mark.parametrize(
    "key",
    ["rotary_base", "hidden_act", "norm_epsilon", "position_embedding_type", "num_key_value_heads", "vocab_size"],
)
def test_what_tensorrt_llm_would_guess_is_refused(key: str) -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16")
    del config[key]
    with pytest.raises(RequestError, match=f"lacks {key}"):
        decoder_from_config(config)


def test_learned_positions_are_refused() -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16")
    with pytest.raises(RequestError, match="learned_absolute"):
        decoder_from_config({**config, "position_embedding_type": "learned_absolute"})


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_both_spellings_of_the_rope_type_are_read(key: str) -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16")
    decoder = decoder_from_config({**config, "rotary_scaling": {key: "linear", "factor": 2.0}})
    assert decoder.rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_tensors_decide_about_biases_that_the_config_leaves_out() -> None:
    decoder = qwen.resolve_checkpoint(tiny.config("qwen2"))
    config = config_json(decoder, "float16")
    del config["attn_bias"], config["qwen_type"]  # as ModelOpt exports it
    names = [spec.name for spec in layout(decoder)[0]]
    assert decoder_from_config(config, names).qkv_bias
    assert not decoder_from_config(config, [name for name in names if "bias" not in name]).qkv_bias


def test_a_config_that_contradicts_the_tensors_is_refused() -> None:
    decoder = qwen.resolve_checkpoint(tiny.config("qwen2"))
    names = [spec.name for spec in layout(decoder)[0]]
    with pytest.raises(RequestError, match=r"attn_bias False and the checkpoint has attention\.qkv\.bias"):
        decoder_from_config({**config_json(decoder, "float16"), "attn_bias": False}, names)


def test_wrong_types_are_refused(tmp_path: Path) -> None:
    config = config_json(llama.resolve_checkpoint(tiny.config()), "float16")
    with pytest.raises(RequestError, match="num_attention_heads is '4'"):
        decoder_from_config({**config, "num_attention_heads": "4"})
