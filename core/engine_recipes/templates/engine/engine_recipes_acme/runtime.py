"""A decoder in numpy, float32, top to bottom. Shapes: B sequences, S new tokens each, T in the cache with them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, RequestError
from engine_recipes.stepping import CHUNK, Run, Stepper

from .engine import DECODER, WEIGHTS

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]
    Integers = np.ndarray[Any, np.dtype[np.int64]]


class NumpyRuntime(Stepper):
    """A loaded engine. `Stepper` has `generate`, `logits` and the rest; it wants caches to feed.

    Raises:
        RequestError: the folder holds no such engine.
    """

    def __init__(self, folder: Path) -> None:
        import numpy as np

        if not (folder / WEIGHTS).is_file() or not (folder / DECODER).is_file():
            raise RequestError(
                f"{folder} holds no acme engine",
                "build it with `recipes build MODEL@acme`",
            )
        self.decoder = Decoder.read(folder / DECODER)
        with np.load(folder / WEIGHTS, allow_pickle=False) as file:
            weights: dict[str, Floats] = dict(file)
        super().__init__(weights, len(weights["cos"]), self.decoder.vocab_size)

    def start(self, length: int, batch: int) -> NumpyRun:
        return NumpyRun(self.decoder, self.session, length, batch)


class NumpyRun(Run):
    """Sequences of one length and their keys and values."""

    def __init__(self, decoder: Decoder, weights: dict[str, Floats], length: int, batch: int) -> None:
        import numpy as np

        super().__init__(batch, decoder.vocab_size, max(1, CHUNK // batch))
        self.decoder, self.weights = decoder, weights
        shape = (decoder.layers, batch, decoder.kv_heads, length, decoder.head_size)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.used = 0  # tokens in the cache

    def feed(self, ids: Integers, out: Floats) -> None:
        """Run int64 [B, S] at once; `out`, float32 [B, L, vocabulary], gets the logits of the last L tokens."""
        d, w = self.decoder, self.weights
        table = w["transformer.vocab_embedding.weight"]
        x = table[ids] * d.embedding_scale  # [B, S, hidden]
        for layer in range(d.layers):
            at = f"transformer.layers.{layer}."
            h = self.norm(x, at + "input_layernorm")
            x = x + self.attention(h, layer, at + "attention.")
            h = self.norm(x, at + "post_layernorm")
            x = x + self.mlp(h, at + "mlp.")
        h = self.norm(x[:, -out.shape[1] :], "transformer.ln_f")  # [B, L, hidden]
        head = table if d.tied else w["lm_head.weight"]
        out[:] = h @ head[: d.vocab_size].T  # some checkpoints pad the head
        self.used += ids.shape[1]

    def attention(self, h: Floats, layer: int, at: str) -> Floats:
        """Causal attention over the cache, in which heads / kv_heads query heads share keys. [B, S, hidden] -> same"""
        import numpy as np

        d = self.decoder
        batch, new, _ = h.shape
        qkv = self.linear(h, at + "qkv").reshape(batch, new, -1, d.head_size)
        q, k, v = np.split(qkv, [d.heads, d.heads + d.kv_heads], axis=2)  # [B, S, (kv_)heads, head_size]
        if d.qk_norm:
            q, k = self.norm(q, at + "q_layernorm"), self.norm(k, at + "k_layernorm")
        used, total = self.used, self.used + new
        self.keys[layer, :, :, used:total] = self.rotated(k).swapaxes(1, 2)
        self.values[layer, :, :, used:total] = v.swapaxes(1, 2)
        keys, values = self.keys[layer, :, :, None, :total], self.values[layer, :, :, None, :total]

        q = self.rotated(q).swapaxes(1, 2).reshape(batch, d.kv_heads, -1, new, d.head_size)  # [B, kv, group, S, size]
        scores = q @ keys.swapaxes(-1, -2) / np.float32(math.sqrt(d.head_size))  # [B, kv, group, S, T]
        scores[..., np.arange(total) > np.arange(used, total)[:, None]] = -np.inf  # [S, T]: what comes later
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ values  # [B, kv, group, S, size]
        mixed = mixed.reshape(batch, d.heads, new, d.head_size).swapaxes(1, 2).reshape(batch, new, -1)
        return self.linear(mixed, at + "dense")

    def rotated(self, x: Floats) -> Floats:
        """Rope: the first elements of each head, as pairs (i, i + half), turned by their position. As `x`."""
        cos, sin = (self.weights[name][self.used : self.used + x.shape[1], None] for name in ("cos", "sin"))
        half = cos.shape[-1]  # [S, 1, half]
        result: Floats = x.copy()
        result[..., :half] = x[..., :half] * cos - x[..., half : 2 * half] * sin
        result[..., half : 2 * half] = x[..., half : 2 * half] * cos + x[..., :half] * sin
        return result

    def mlp(self, h: Floats, at: str) -> Floats:
        """TensorRT-LLM's `fc` is what the activation is for (gate_proj in Hugging Face's names), `gate` the other."""
        import numpy as np

        x = self.linear(h, at + "fc")  # [B, S, intermediate]
        if self.decoder.activation == "silu":
            x = x / 2 * (1 + np.tanh(x / 2))  # x · sigmoid(x), without an overflow
        else:
            x = x / 2 * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)))
        return self.linear(x * self.linear(h, at + "gate"), at + "proj")

    def norm(self, x: Floats, name: str) -> Floats:
        """RMS norm over the last axis."""
        import numpy as np

        mean = np.mean(x * x, axis=-1, keepdims=True)
        result: Floats = x / np.sqrt(mean + np.float32(self.decoder.norm_epsilon)) * self.weights[name + ".weight"]
        return result

    def linear(self, x: Floats, name: str) -> Floats:
        """x · weightᵀ + bias, where there is a bias. [..., in] -> [..., out]"""
        result: Floats = x @ self.weights[name + ".weight"].T
        bias = self.weights.get(name + ".bias")
        return result if bias is None else result + bias
