"""For the tests of plugins: tiny checkpoints made on the spot, and a suite that checks what every plugin promises.

    from engine_recipes import testing

    @testing.conformance("engine-recipes-acme", configs={"acme": [testing.tiny_config("AcmeForCausalLM")]})
    def test_conformance(case: testing.Case) -> None:
        case()

Every promise is one test, `family acme: unshard equals source`. Needs pytest and what `engine-recipes[cpu]` installs;
what needs transformers is skipped without it.
"""

from __future__ import annotations

from .suite import Case, cases, conformance
from .tiny import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_config, write_checkpoint, write_tokenizer

__all__ = [
    "CHAT_TEMPLATE",
    "SPECIAL_TOKENS",
    "Case",
    "cases",
    "conformance",
    "tiny_config",
    "write_checkpoint",
    "write_tokenizer",
]
