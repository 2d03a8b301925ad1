from __future__ import annotations

import pytest

import different
import tiny
from engine_recipes import Decoder, RequestError, from_hf
from engine_recipes.checkpoint import Piece, TensorSpec, check_split, layout, source_shapes, stage_layers


def decoder(**changes: object) -> Decoder:
    return from_hf(tiny.config("llama", **changes))


def by_name(ranks: list[list[TensorSpec]], rank: int) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in ranks[rank]}


def test_the_first_stages_get_the_layers_that_are_left_over() -> None:
    assert [list(stage) for stage in stage_layers(5, 3)] == [[0, 1], [2, 3], [4]]
    assert [len(stage) for stage in stage_layers(22, 4)] == [6, 6, 5, 5]


def test_every_source_row_and_column_is_used_exactly_once() -> None:
    d = decoder(vocab_size=301, num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    once_on_every_rank = ("norm", "embed_tokens", "o_proj.bias", "down_proj.bias")
    for tp_size, pp_size in ((1, 1), (2, 1), (1, 3), (2, 2)):
        used = dict.fromkeys(source_shapes(d), 0)
        for rank in layout(d, tp_size, pp_size):
            for piece in (piece for spec in rank for piece in spec.pieces):
                size = 1
                for length in piece.shape:
                    size *= length
                used[piece.name] += size
        for name, shape in source_shapes(d).items():
            size = shape[0] * (shape[1] if len(shape) > 1 else 1)
            copies = tp_size if any(part in name for part in once_on_every_rank) else 1
            assert used[name] == size * copies, (name, tp_size, pp_size)


def test_fewer_key_value_heads_than_ranks_are_repeated() -> None:
    ranks = layout(decoder(num_attention_heads=4, num_key_value_heads=2, hidden_size=64), tp_size=4)
    name = "transformer.layers.0.attention.qkv.weight"
    k_rows = [by_name(ranks, rank)[name].pieces[1].rows for rank in range(4)]
    assert k_rows == [(0, 16), (0, 16), (16, 32), (16, 32)]


def test_the_head_is_padded_and_the_embedding_is_not() -> None:
    ranks = layout(decoder(vocab_size=301), tp_size=2)
    last = by_name(ranks, 1)
    assert last["lm_head.weight"].shape == (151, 64)
    assert last["lm_head.weight"].pad_rows == 1
    assert last["transformer.vocab_embedding.weight"].shape == (301, 64)


def test_a_family_may_want_its_embedding_split() -> None:
    d = different.resolve_checkpoint(tiny.config("gemma"))
    name = "transformer.vocab_embedding.weight"
    assert [by_name(layout(d, tp_size=2), rank)[name].shape for rank in (0, 1)] == [(128, 64)] * 2
    assert by_name(layout(d), 0)[name].shape == (256, 64)
    assert by_name(layout(d, 2, parallel_embedding=False), 1)[name].shape == (256, 64)


def test_norms_and_nothing_else_get_the_offset() -> None:
    d = from_hf(tiny.config("qwen3"), qk_norm=True, norm_offset=1.0)
    for spec in (spec for rank in layout(d, 2, 3) for spec in rank):
        assert spec.offset == ("norm" in spec.name or "ln_f" in spec.name), spec.name


def test_more_ranks_than_words() -> None:
    ranks = layout(decoder(vocab_size=2, num_attention_heads=4, num_key_value_heads=4), tp_size=4)
    heads = [by_name(ranks, rank)["lm_head.weight"] for rank in range(4)]
    assert [(head.shape, head.pad_rows) for head in heads] == [
        ((1, 64), 0),
        ((1, 64), 0),
        ((1, 64), 1),
        ((1, 64), 1),
    ]


def test_a_parallel_embedding_is_split_like_the_head() -> None:
    ranks = layout(decoder(vocab_size=301), tp_size=2, parallel_embedding=True)
    assert by_name(ranks, 1)["transformer.vocab_embedding.weight"].shape == (151, 64)


def test_a_tied_head_comes_from_the_embedding() -> None:
    d = decoder(tie_word_embeddings=True)
    assert "lm_head.weight" not in source_shapes(d)
    (rank,) = layout(d)
    assert rank[-1].pieces == (Piece("model.embed_tokens.weight", (0, 256), (0, 64)),)


def test_tensorrt_llm_calls_the_gate_fc() -> None:
    (rank,) = layout(decoder())
    specs = {spec.name: spec.pieces[0].name for spec in rank}
    assert specs["transformer.layers.0.mlp.fc.weight"] == "model.layers.0.mlp.gate_proj.weight"
    assert specs["transformer.layers.0.mlp.gate.weight"] == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changes", "tp_size", "pp_size", "message", "hint"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536},
            2,
            1,
            "num_attention_heads 9 cannot be split over tp_size 2",
            "tp_size 1 or 3 would work",
        ),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96, "intermediate_size": 192},
            2,
            1,
            "num_key_value_heads 3 cannot be split over tp_size 2",
            "tp_size 1, 3 or 6 would work",
        ),
        ({"intermediate_size": 177}, 2, 1, "intermediate_size 177 cannot be split over tp_size 2", "tp_size 1 would"),
        ({}, 1, 4, "3 layers cannot be split over pp_size 4", "pp_size up to 3 would work"),
        ({}, 0, 1, "tp_size is 0", "1 means not split"),
    ],
)
def test_impossible_splits_name_the_numbers_and_what_would_work(
    changes: dict[str, int], tp_size: int, pp_size: int, message: str, hint: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_split(decoder(**changes), tp_size, pp_size)
    assert message in caught.value.message
    assert hint in caught.value.hint
