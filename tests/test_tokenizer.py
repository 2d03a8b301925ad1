from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import smollm2
from engine_recipes import RequestError, testing
from engine_recipes.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What's 1 + 1? <b>“Grüße”</b> 🦜"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And\n\n\t2 + 2?"},
]
TEXTS = (
    "Hello, world!",
    "  two spaces, a\ttab and\n\na blank line ",
    "Ünïcödé – 東京 – 🦜🏳️‍🌈",
    "<|im_start|>user\nspecial tokens in the text<|im_end|>",
    "12345 + 67890 = 80235",
    "",
)
EMOJI = "a 🦜 b 👩‍👩‍👧 é 東京"


@pytest.fixture(scope="module")
def theirs() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2.folder())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("engine")
    copied = copy_tokenizer(smollm2.folder(), folder)
    assert {path.name for path in copied} >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    return Tokenizer.load(folder)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("special", [True, False])
def test_ids_are_those_of_transformers(ours: Tokenizer, theirs: Any, text: str, special: bool) -> None:
    ids = ours.encode(text, special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("first", [0, 1])
def test_chats_are_those_of_transformers(ours: Tokenizer, theirs: Any, prompt: bool, first: int) -> None:
    expected = theirs.apply_chat_template(CHAT[first:], tokenize=False, add_generation_prompt=prompt)
    assert ours.chat(CHAT[first:], prompt) == expected


def test_smollm2_knows_its_end(ours: Tokenizer, theirs: Any) -> None:
    assert theirs.eos_token_id in ours.stop_ids
    assert ours.special["eos_token"] == "<|im_end|>"
    assert ours.size == len(theirs)


@pytest.mark.parametrize("text", [EMOJI, *TEXTS])
def test_a_stream_is_the_text_in_whole_characters(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text, special=False)
    pieces = list(ours.stream(iter(ids)))
    assert "".join(pieces) == ours.decode(ids)
    assert all(pieces) and not any("\ufffd" in piece for piece in pieces)
    if text == EMOJI:
        assert any("\ufffd" in ours.decode([token]) for token in ids)  # some characters are split over tokens


def test_a_stream_that_ends_inside_a_character_leaves_it_out(ours: Tokenizer) -> None:
    ids = ours.encode("ab 🦜", special=False)
    assert "".join(ours.stream(iter(ids[:-1]))) == "ab "


def test_a_stream_does_not_wait_for_what_it_does_not_need(ours: Tokenizer) -> None:
    ids = ours.encode("one two three four", special=False)
    assert list(ours.stream(iter(ids))) == ["one", " two", " three", " four"]


def write(folder: Path, template: str = "", **config: Any) -> Tokenizer:
    testing.write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    given = {k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}
    path.write_text(json.dumps({**given, **config}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s>Hi & <b>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi & <b>"}'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("x{% generation %}{{ messages[0].role }}{% endgeneration %}y", "xusery"),
        ("  {% if true %}\nkept\n  {% endif %}\n", "kept\n"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ eos_token.content }}|{{ missing }}", "|"),
    ],
)
def test_templates_have_what_transformers_gives_them(tmp_path: Path, template: str, text: str) -> None:
    tokenizer = write(tmp_path, template, bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>")
    assert tokenizer.chat([{"role": "user", "content": "Hi & <b>"}]) == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ missing.attribute }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_two_lines(tmp_path: Path, template: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses") as caught:
        write(tmp_path, template).chat(CHAT)
    assert "--raw" in caught.value.hint


def test_a_template_may_be_in_the_config(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert write(tmp_path, chat_template="inline").chat(CHAT) == "inline"
    assert write(tmp_path, chat_template=named).chat(CHAT) == "yes"
    assert write(tmp_path, "file", chat_template="inline").chat(CHAT) == "file"


def test_without_a_template_raw_is_proposed(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        write(tmp_path).chat(CHAT)
    assert str(caught.value).splitlines() == [
        "this model has no chat template",
        "use --raw to give it the prompt as it is",
    ]


@pytest.mark.parametrize(("given", "ids"), [(None, {2}), (5, {2, 5}), ([5, 6], {2, 5, 6})])
def test_stop_ids_join_generation_config_and_tokenizer(tmp_path: Path, given: Any, ids: set[int]) -> None:
    write(tmp_path, eos_token="</s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": given}))
    assert Tokenizer.load(tmp_path).stop_ids == ids


def test_truncation_and_padding_of_a_training_script_are_off(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    assert len(Tokenizer.load(tmp_path).encode("a long text", special=False)) > 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "damaged"),
        ("tokenizer_config.json", "{", "damaged"),
        ("generation_config.json", "[]", "not a JSON object"),
    ],
)
def test_damaged_files_are_two_lines(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.hint


def test_the_models_config_is_never_copied(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name in (*TOKENIZER_FILES, "config.json", "model.safetensors"):
        (source / name).write_text("{}")
    assert sorted(path.name for path in copy_tokenizer(source, out)) == sorted(TOKENIZER_FILES)
    assert sorted(path.name for path in out.iterdir()) == sorted(TOKENIZER_FILES)
