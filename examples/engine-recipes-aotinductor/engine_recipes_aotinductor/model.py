"""The decoder in plain PyTorch, top to bottom. Its modules have the names of a TensorRT-LLM checkpoint's tensors.

Shapes: B sequences, S new tokens each, T tokens in the cache with them, L tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch  # noqa: TID253 (this module is imported by stage 2 alone)
import torch.nn.functional as F  # noqa: TID253
from torch import Tensor, nn  # noqa: TID253
from torch.nn.utils import skip_init  # noqa: TID253

from engine_recipes import Decoder, rope


class Attention(nn.Module):
    """Causal attention of grouped queries, with rope and a cache."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        queries, keys = d.heads * d.head_size, d.kv_heads * d.head_size
        self.heads, self.kv_heads, self.head_size = d.heads, d.kv_heads, d.head_size
        self.qkv = empty(nn.Linear, d.hidden_size, queries + 2 * keys, bias=d.qkv_bias)
        self.dense = empty(nn.Linear, queries, d.hidden_size, bias=d.dense_bias)
        norms = [nn.RMSNorm(d.head_size, d.norm_epsilon) if d.qk_norm else nn.Identity() for _ in "qk"]
        self.q_layernorm, self.k_layernorm = norms

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor
    ) -> Tensor:
        """[B, S, hidden_size] -> the same. Writes new keys and values, [T, B, kv_heads, head_size], in place."""
        groups = [self.heads, self.kv_heads, self.kv_heads]
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_size)).split(groups, 2)  # [B, S, heads, head_size]
        q, k = rotate(self.q_layernorm(q), *angles), rotate(self.k_layernorm(k), *angles)
        keys.index_put_((positions,), k.transpose(0, 1))
        values.index_put_((positions,), v.transpose(0, 1))
        context = F.scaled_dot_product_attention(  # [B, heads, S, head_size]
            q.transpose(1, 2), keys.permute(1, 2, 0, 3), values.permute(1, 2, 0, 3), mask, enable_gqa=True
        )
        found: Tensor = self.dense(context.transpose(1, 2).flatten(2))
        return found


class Mlp(nn.Module):
    """Gated. TensorRT-LLM's `fc` is the half that is activated, its `gate` the other."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.fc = empty(nn.Linear, d.hidden_size, d.intermediate_size, bias=d.mlp_bias)
        self.gate = empty(nn.Linear, d.hidden_size, d.intermediate_size, bias=d.mlp_bias)
        self.proj = empty(nn.Linear, d.intermediate_size, d.hidden_size, bias=d.mlp_bias)
        self.activation = ACTIVATIONS[d.activation]()

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden_size] -> the same."""
        found: Tensor = self.proj(self.activation(self.fc(x)) * self.gate(x))
        return found


class Layer(nn.Module):
    """One block."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(d.hidden_size, d.norm_epsilon)
        self.attention = Attention(d)
        self.post_layernorm = nn.RMSNorm(d.hidden_size, d.norm_epsilon)
        self.mlp = Mlp(d)

    def forward(self, x: Tensor, *attention: Any) -> Tensor:
        """[B, S, hidden_size] -> the same. `attention`: what Attention takes beside `x`."""
        x = x + self.attention(self.input_layernorm(x), *attention)
        x = x + self.mlp(self.post_layernorm(x))
        return x


class Transformer(nn.Module):
    """All but the head."""

    def __init__(self, d: Decoder) -> None:
        super().__init__()
        self.vocab_embedding = empty(nn.Embedding, d.vocab_size, d.hidden_size)
        self.layers = nn.ModuleList(Layer(d) for _ in range(d.layers))
        self.ln_f = nn.RMSNorm(d.hidden_size, d.norm_epsilon)


class Model(nn.Module):
    """The whole decoder, in float32. A head that is the embedding table is no module of its own.

    Args:
        d: what it is.
        positions: longest sequence, in tokens.
        tied: the head is the embedding table.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, d: Decoder, positions: int, tied: bool) -> None:
        super().__init__()
        self.scale = d.embedding_scale
        self.transformer = Transformer(d)
        self.lm_head = None if tied else empty(nn.Linear, d.hidden_size, d.vocab_size, bias=False)
        for name, table in zip(("cos", "sin"), rope.tables(d, positions), strict=True):
            self.register_buffer(name, torch.from_numpy(table))  # [positions, rotated / 2]

    def forward(self, ids: Tensor, positions: Tensor, last: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Next-token logits, float32 [B, L, vocab_size].

        Args:
            ids: int64 [B, S].
            positions: of these tokens, int64 [S], the same in every sequence.
            last: which of them logits are wanted for, int64 [L], from 0 to S - 1.
            cache: keys and values of each layer, float32 [T, B, kv_heads, head_size], written in place. The sequence
                comes first, so that the part of a longer buffer that is filled is contiguous.
        """
        angles = self.cos[positions][:, None], self.sin[positions][:, None]  # [S, 1, rotated / 2]
        mask = torch.arange(cache[0][0].shape[0]) <= positions[:, None]  # [S, T], True where it may look
        x = self.transformer.vocab_embedding(ids) * self.scale  # [B, S, hidden_size]
        for layer, (keys, values) in zip(self.transformer.layers, cache, strict=True):
            x = layer(x, keys, values, positions, angles, mask)
        head = self.lm_head or self.transformer.vocab_embedding
        return F.linear(self.transformer.ln_f(x).index_select(1, last), head.weight)


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def empty(kind: Callable[..., AnyModule], *sizes: int, **more: bool) -> AnyModule:
    """A module whose weights are not filled, so that they take no memory: they come when the engine is loaded."""
    made: AnyModule = skip_init(kind, *sizes, **more)  # type: ignore[no-untyped-call]
    return made


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rope over the first elements of each head, the others pass. [B, S, heads, head_size]; [S, 1, rotated / 2]"""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def _tanh_gelu() -> nn.Module:
    return nn.GELU(approximate="tanh")


ACTIVATIONS = {"silu": nn.SiLU, "gelu_pytorch_tanh": _tanh_gelu}
