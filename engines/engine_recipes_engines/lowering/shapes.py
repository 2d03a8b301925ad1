"""Whether the tensors of a checkpoint are as large as its config.json says, before anything is made of them."""

from __future__ import annotations

from engine_recipes import Decoder, RequestError
from engine_recipes.checkpoint import Checkpoint

from .weights import EMBEDDING, HEAD

#: Weights in a group of W4A16_AWQ, where config.json does not say it; and what TensorRT-LLM pads its vocabulary to.
_GROUP, _PADDED_TO = 128, 64
_AGAIN = "copy or build the checkpoint again"


def check_shapes(weights: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors and config.json disagree.

    Raises:
        RequestError: a tensor has another shape than it should, or is missing.
    """
    decoder = weights.decoder
    linear, norms = _linear(decoder), _norms(decoder)
    for layer in range(decoder.layers):
        at = f"transformer.layers.{layer}."
        for name, (rows, columns) in linear.items():
            _check_linear(weights, at + name, rows, columns)
        for name, size in norms.items():
            _check(weights, f"{at}{name}.weight", (size,))
    _check(weights, "transformer.ln_f.weight", (decoder.hidden_size,))
    _check_vocabulary(weights)


def _linear(d: Decoder) -> dict[str, tuple[int, int]]:
    """Module of a layer -> outputs, inputs."""
    queries, width, inner = d.heads * d.head_size, d.hidden_size, d.intermediate_size
    return {
        "attention.qkv": (queries + 2 * d.kv_heads * d.head_size, width),
        "attention.dense": (width, queries),
        "mlp.fc": (inner, width),
        "mlp.gate": (inner, width),
        "mlp.proj": (width, inner),
    }


def _norms(d: Decoder) -> dict[str, int]:
    heads = {f"attention.{part}_layernorm": d.head_size for part in "qk"} if d.qk_norm else {}
    return {"input_layernorm": d.hidden_size, "post_layernorm": d.hidden_size, **heads}


def _check_linear(weights: Checkpoint, module: str, rows: int, columns: int) -> None:
    if weights.is_quantized(module) and weights.quantization["quant_algo"] == "W4A16_AWQ":
        groups = columns // weights.quantization.get("group_size", _GROUP)
        _check(weights, f"{module}.weight", (rows // 2, columns))  # two rows in a byte
        _check(weights, f"{module}.weights_scaling_factor", (rows, groups))
        _check(weights, f"{module}.prequant_scaling_factor", (columns,), optional=True)
    else:
        _check(weights, f"{module}.weight", (rows, columns))
    _check(weights, f"{module}.bias", (rows,), optional=True)


def _check_vocabulary(weights: Checkpoint) -> None:
    """A head may be padded, and with AWQ vocab_size counts its padding, which the embedding has not."""
    size, width = weights.decoder.vocab_size, weights.decoder.hidden_size
    has_head = f"{HEAD}.weight" in weights.names()
    padding = _PADDED_TO - 1 if has_head and weights.quantization["quant_algo"] == "W4A16_AWQ" else 0
    for name, least in ((EMBEDDING, size - padding), *([(HEAD, size)] if has_head else [])):
        shape = weights.info(f"{name}.weight")[1]
        rows = shape[0] if shape else 0
        _check(weights, f"{name}.weight", (max(rows, least), width))


def _check(weights: Checkpoint, name: str, expected: tuple[int, ...], optional: bool = False) -> None:
    if optional and name not in weights.names():
        return
    shape = weights.info(name)[1]
    if shape != expected:
        raise RequestError(f"{name} is {list(shape)}, config.json says {list(expected)}", _AGAIN)
