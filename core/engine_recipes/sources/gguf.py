"""GGUF to a Hugging Face folder: dequantises the weights once, to float16, and translates what describes them.

Format and key names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only architectures whose tensors we
know by name; anything else in the file is refused rather than left out.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import events
from ..errors import RequestError
from . import gguf_tokenizer, layout

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

Metadata = Mapping[str, Any]

#: general.architecture -> (Hugging Face class, model_type, q/k rows are permuted, q/k/v have biases)
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama", True, False),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", False, True),
}
_TABLES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
#: float32 elements that are dequantised at a time: 32 MB.
_PIECE = 8 << 20


def gguf_to_hf(gguf: Path, out: Path) -> None:
    """Write config.json, model.safetensors (float16), tokenizer and templates into `out`, an empty folder.

    The same file gives the same bytes. One piece of one tensor is in memory at a time.

    Raises:
        RequestError: no GGUF file, damaged, or an architecture, tensor, quantisation or tokenizer we do not know.
    """
    events.progress(f"reading {gguf.name}", 0, 0, "B")
    reader, metadata = _read(gguf)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors)
    names = _names(metadata, tensors, config)
    gguf_tokenizer.write(metadata, out)
    _write_json(out / layout.CONFIG, config)
    ids: dict[str, Any] = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    _write_json(out / "generation_config.json", {"_from_model_config": True, **ids})
    _write_weights(out / layout.SINGLE, tensors, names, config, ARCHITECTURES[_architecture(metadata)][2])


def _read(path: Path) -> tuple[Any, Metadata]:
    """The reader, which maps the file, and its metadata as plain values."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, struct.error) as error:
        raise RequestError(f"{path.name} is no GGUF file, or damaged ({error})", "get the file again") from None
    if reader.byte_order != "I":
        raise RequestError(f"{path.name} has the other byte order", "convert it with gguf-py's gguf-convert-endian")
    return reader, metadata


def _architecture(metadata: Metadata) -> str:
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise RequestError(f"GGUF architecture {name!r} cannot be converted", f"known: {', '.join(ARCHITECTURES)}")
    return str(name)


def _config(metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers writes it for this architecture."""
    architecture = _architecture(metadata)
    hf_class, model_type, _, _ = ARCHITECTURES[architecture]

    def number(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, (int, float)) or value <= 0:
            raise RequestError(f"the GGUF file says {architecture}.{key} = {value!r}", "a number above 0 is needed")
        return _shortest(value) if isinstance(value, float) else value

    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_size = number("attention.key_length", hidden // heads)
    _refuse_specialities(metadata, architecture, head_size, tensors)
    ids: dict[str, Any] = {
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _end_ids(metadata),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    return {
        "architectures": [hf_class],
        "model_type": model_type,
        **{key: value for key, value in ids.items() if value is not None},
        "head_dim": head_size,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": number("block_count"),
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": number("rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float16",
        "vocab_size": _shape(tensors, "token_embd.weight")[0],
    }


def _refuse_specialities(metadata: Metadata, architecture: str, head_size: int, tensors: Mapping[str, Any]) -> None:
    """What changes the arithmetic and is not translated."""
    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        raise RequestError(
            f"the GGUF file scales its rope ({scaling if scaling != 'none' else 'rope_freqs'})",
            "use the original safetensors of this model",
        )
    if metadata.get(f"{architecture}.expert_count", 0):
        raise RequestError("the GGUF file has experts", "mixtures of experts are not converted")
    rotated = metadata.get(f"{architecture}.rope.dimension_count", head_size)
    values = metadata.get(f"{architecture}.attention.value_length", head_size)
    if rotated != head_size or values != head_size:
        raise RequestError(
            f"heads of {head_size} with {rotated} rotated and {values} value elements cannot be converted",
            "use the original safetensors of this model",
        )


def _end_ids(metadata: Metadata) -> int | list[int] | None:
    """End of text and, where it differs, end of turn: generation stops at either."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    known = list(dict.fromkeys(i for i in ids if i is not None))
    return known if len(known) > 1 else known[0] if known else None


def _shortest(value: float) -> float:
    """GGUF keeps float32; print what was meant: 1e-05, not 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """Outermost dimension first, as in numpy; GGUF counts the other way round."""
    if name not in tensors:
        raise RequestError(f"the GGUF file has no tensor {name}", "get the file again")
    return tuple(int(n) for n in reversed(tensors[name].shape))


def _names(metadata: Metadata, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    """GGUF name -> Hugging Face name, for exactly the tensors this model has, each with the shape it must have."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    rows = {"attn_q": heads * size, "attn_k": kv_heads * size, "attn_v": kv_heads * size}
    linear = {name: (n, hidden) for name, n in rows.items()}
    linear |= {"attn_output": (hidden, heads * size), "ffn_down": (hidden, inner)}
    linear |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden)}
    table = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": table, "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["output.weight"] = table
    names = {name: _TABLES[name] for name in shapes}
    biased = rows if ARCHITECTURES[_architecture(metadata)][3] else {}
    for layer in range(config["num_hidden_layers"]):
        for name, hf_name in _BLOCK.items():
            shapes[f"blk.{layer}.{name}.weight"] = linear.get(name, (hidden,))
            names[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{hf_name}.weight"
        for name, n in biased.items():
            shapes[f"blk.{layer}.{name}.bias"] = (n,)
            names[f"blk.{layer}.{name}.bias"] = f"model.layers.{layer}.{_BLOCK[name]}.bias"
    for name, shape in shapes.items():
        if _shape(tensors, name) != shape:
            raise RequestError(
                f"GGUF tensor {name} is {list(_shape(tensors, name))}, its metadata says {list(shape)}",
                "the file is damaged or of a variant that cannot be converted",
            )
    if unknown := sorted(set(tensors) - set(names)):
        raise RequestError(f"GGUF tensor {unknown[0]} is not known", "this variant cannot be converted")
    return names


def _write_weights(
    path: Path, tensors: Mapping[str, Any], names: Mapping[str, str], config: Mapping[str, Any], permuted: bool
) -> None:
    from ..checkpoint import safetensors

    shapes = {hf_name: ("float16", _shape(tensors, name)) for name, hf_name in names.items()}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if permuted else {}

    def pieces() -> Iterator[Iterator[Array]]:
        for name in names:
            part = name.split(".")[-2]
            yield _dequantised(tensors[name], heads.get(part))

    total = sum(2 * int(tensors[name].n_elements) for name in names)
    for written in safetensors.write(path, shapes, pieces()):
        events.progress(f"writing {path.name}", written, total, "B")


def _dequantised(tensor: Any, heads: int | None) -> Iterator[Array]:
    """The tensor in float16, some rows at a time. `heads`: undo llama.cpp's order of the rows of that many heads."""
    import numpy as np
    from gguf.quants import dequantize

    data = tensor.data  # [rows, bytes of a row] if quantised
    rows = int(tensor.shape[-1])
    order = np.arange(rows) if heads is None else _unpermuted(rows, heads)
    step = max(1, _PIECE * rows // int(tensor.n_elements))
    for start in range(0, rows, step):
        try:
            values = dequantize(data[order[start : start + step]], tensor.tensor_type)
        except NotImplementedError:
            raise RequestError(
                f"GGUF tensor {tensor.name} is {tensor.tensor_type.name}, which gguf cannot dequantise",
                "pip install -U gguf, or use another quantisation of the model",
            ) from None
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(values, dtype=np.float16)
        if not np.isfinite(half).all():
            raise RequestError(
                f"GGUF tensor {tensor.name} has values that float16 cannot hold",
                "use the original safetensors of this model",
            )
        yield half


def _unpermuted(rows: int, heads: int) -> Array:
    """Which row of the GGUF tensor is which of ours.

    llama.cpp rotates neighbouring pairs, so its converter interleaves the two halves of each head of q and k
    (LlamaModel.permute in convert_hf_to_gguf.py).
    """
    import numpy as np

    order: Array = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(rows)
    return order


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
