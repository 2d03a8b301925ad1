from __future__ import annotations

from typing import Any

import tiny
from engine_recipes_models import llama, tinyllama

#: The 1.1B model's own numbers.
TINYLLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def test_tinyllama_is_a_llama() -> None:
    config = tiny.config(**TINYLLAMA)
    decoder = tinyllama.resolve_checkpoint(config)
    assert decoder == llama.resolve_checkpoint(config)
    assert decoder.parameters == 1_100_048_384
    assert decoder.head_size == 64


def test_the_hook_is_found_in_this_module_too() -> None:
    import pluggy

    from engine_recipes import hookspecs

    manager = pluggy.PluginManager(hookspecs.NAME)
    manager.add_hookspecs(hookspecs)
    manager.register(tinyllama)
    manager.check_pending()
    (decoder,) = manager.hook.resolve_checkpoint(context=None, config=tiny.config())
    assert decoder.architecture == "LlamaForCausalLM"
