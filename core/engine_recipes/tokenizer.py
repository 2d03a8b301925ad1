"""Text to token ids and back, and chat templates, from the files beside an engine. Runs no code from a checkpoint.

Reads `tokenizer.json` with the `tokenizers` library, and renders chat templates as transformers does
(`utils/chat_template_utils.py`): in jinja2's immutable sandbox, with the same filters, functions and variables.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import MachineError, RequestError

if TYPE_CHECKING:
    import jinja2

#: What is copied beside an engine. Never the model's own config.json: engines have one of their own.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
_REPLACEMENT = "\ufffd"


def copy_tokenizer(source_folder: Path, engine_folder: Path) -> list[Path]:
    """Copy the tokenizer's files that exist. Returns the copies; none means there is no tokenizer."""
    found = [source_folder / name for name in TOKENIZER_FILES if (source_folder / name).is_file()]
    return [Path(shutil.copyfile(path, engine_folder / path.name)) for path in found]


class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        special: the special tokens' texts by role, `{"eos_token": "<|im_end|>", …}`, as templates see them.
        stop_ids: ids that end an answer: `eos_token_id` of generation_config.json and the tokenizer's eos token.
        size: the largest id + 1. A model's vocabulary may be larger, padded to a round number.
    """

    def __init__(self, backend: Any, config: Mapping[str, Any], generation: Mapping[str, Any], template: str) -> None:
        self._backend = backend
        self._template = template
        self.special = {key: text for key, value in config.items() if (text := _special(key, value)) is not None}
        self.stop_ids = frozenset(_stop_ids(backend, self.special, generation))
        self.size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read a folder's tokenizer.

        Raises:
            RequestError: `tokenizer.json` is missing, or a file is damaged.
            MachineError: the `tokenizers` package is not installed.
        """
        try:
            import tokenizers
        except ImportError:
            raise MachineError(
                "reading a tokenizer needs the tokenizers package", "pip install 'engine-recipes[cpu]'"
            ) from None
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise RequestError(
                f"{folder} has no tokenizer.json",
                "write one with AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise RequestError(f"{path} is damaged: {error}", "copy it again from the model") from error
        backend.no_truncation()  # what a training script left behind must not cut or pad prompts
        backend.no_padding()
        config = {**_read(folder / "tokenizer_config.json"), **_read(folder / "special_tokens_map.json")}
        return cls(backend, config, _read(folder / "generation_config.json"), _template(folder, config))

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as the model was trained to read it; encode the result with `special=False`.

        Args:
            messages: `[{"role": "user", "content": "Hello"}]`.
            add_generation_prompt: end with what opens the model's answer.

        Raises:
            RequestError: there is no template, or it refuses these messages.
        """
        import jinja2

        if not self._template:
            raise RequestError("this model has no chat template", "use --raw to give it the prompt as it is")
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special,
            )
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the chat template refuses this conversation: {error}",
                "change the messages, or use --raw to give the prompt as it is",
            ) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self._template)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`. `special` adds what the model expects around a plain text, such as its bos token.

        The texts of special tokens inside `text` become those tokens either way.
        """
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens. Bytes that are no character become U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Decode ids as they come. Yields whole characters only; joined, they are `decode` of all ids.

        A character may be spread over several ids: it is held back until its last byte is there. If the ids end
        before that, it is left out.
        """
        # Some decoders treat the first token differently (a leading space is dropped), and a text is not the sum of
        # its tokens' texts. So decode from the last cut on, twice, and yield the difference.
        held: list[int] = []  # since the cut before the last one
        known = 0  # how many of them were yielded
        for token in ids:
            held.append(token)
            before, after = self.decode(held[:known]), self.decode(held)
            if len(after) > len(before) and not after.endswith(_REPLACEMENT):
                yield after[len(before) :]
                held, known = held[known:], len(held) - known
        before, after = self.decode(held[:known]), self.decode(held)
        rest = after[len(before) :].rstrip(_REPLACEMENT)
        if rest:
            yield rest


def _stop_ids(backend: Any, special: Mapping[str, str], generation: Mapping[str, Any]) -> Iterator[int]:
    given = generation.get("eos_token_id")
    yield from given if isinstance(given, list) else [] if given is None else [given]
    end = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    if end is not None:
        yield end


def _special(key: str, value: Any) -> str | None:
    if isinstance(value, dict):  # an AddedToken
        value = value.get("content")
    return value if key.endswith("_token") and isinstance(value, str) else None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path} is damaged: {error}", "copy it again from the model") from None
    if not isinstance(found, dict):
        raise RequestError(f"{path} is not a JSON object", "copy it again from the model")
    return found


def _template(folder: Path, config: Mapping[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found if isinstance(found, str) else ""


def _environment() -> jinja2.Environment:
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it only shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own way to say it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # jinja2's own filter escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
