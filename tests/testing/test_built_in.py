"""The built-in plugins keep what the conformance suite asks of every package, and enter by the same door."""

from __future__ import annotations

from engine_recipes import testing

CONFIGS = {
    "llama": [
        testing.tiny_config(attention_bias=True, mlp_bias=True),
        testing.tiny_config(tie_word_embeddings=True, rope_theta=500000.0, num_hidden_layers=3),
    ],
    "tinyllama": [testing.tiny_config()],
    "qwen": [testing.tiny_config("Qwen2ForCausalLM"), testing.tiny_config("Qwen3ForCausalLM", head_dim=64)],
}
LITTLE = {"calib.size": 2, "calib.seq_len": 32}


@testing.conformance(
    "engine-recipes",
    configs=CONFIGS,
    settings={"fp8": LITTLE, "int4-awq": {**LITTLE, "group_size": 64}},  # 128 cannot be split
    tolerance={"bf16": 0.02},  # its tiny sources have three bits more
    skip={
        "precision bf16: a killed *": "it is fp16's code",
        "precision int4-wo: a killed *": "it is int8-wo's code",
        "engine tensorrt-rtx: two builds *": "its library orders the outputs of an engine otherwise in other folders",
    },
)
def test_conformance(case: testing.Case) -> None:
    case()
