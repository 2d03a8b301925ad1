from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from engine_recipes import Ref, RequestError
from engine_recipes.refs import label, parse

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,12}", fullmatch=True)


@given(names, st.none() | names, st.none() | names)
def test_a_reference_reads_back_as_it_was_printed(model: str, precision: str | None, engine: str | None) -> None:
    ref = Ref(model, precision, engine)
    assert parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qwen2.5-7b", Ref("qwen2.5-7b")),
        ("qwen2.5-7b:fp8@tensorrt-llm", Ref("qwen2.5-7b", "fp8", "tensorrt-llm")),
        ("./my-finetune:fp8", Ref("./my-finetune", "fp8")),
        ("/data/a b@onnxruntime", Ref("/data/a b", None, "onnxruntime")),
        ("Qwen/Qwen2.5-0.5B-Instruct:int4-awq", Ref("Qwen/Qwen2.5-0.5B-Instruct", "int4-awq")),
    ],
)
def test_models_may_be_names_folders_or_hub_ids(text: str, expected: Ref) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["", ":fp8", "@x", "model:", "model@", "model:FP8", "Model", "a b", "a/b/c"])
def test_nonsense_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(RequestError, match=r"MODEL\[:PRECISION\]\[@ENGINE\]|did you mean"):
        parse(text)


def test_a_path_may_hold_the_signs() -> None:
    assert parse("./a:b@C d:fp16") == Ref("./a:b@C d", "fp16")
    assert parse("./a@B") == Ref("./a@B")


@pytest.mark.parametrize(
    ("text", "hint"),
    [("smollm2:FP16", "did you mean smollm2:fp16?"), ("SmolLM2", "did you mean smollm2?"), ("x ", "did you mean x?")],
)
def test_names_are_lower_case_and_the_hint_says_so(text: str, hint: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(text)
    assert caught.value.hint == hint


def test_labels_are_fit_for_folder_names(own_world: object) -> None:
    assert label("Qwen/Qwen2.5-0.5B-Instruct") == "qwen--qwen2.5-0.5b-instruct"
    assert label("./My Finetune/") == "my-finetune"
    assert label("qwen2.5-7b") == "qwen2.5-7b"
