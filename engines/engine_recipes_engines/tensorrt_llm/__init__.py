"""TensorRT-LLM's own engines, up to 1.2.1: compiles the checkpoint with the user's `trtllm-build`.

TensorRT-LLM cannot share our environment. It is taken from one that the user names, or from a container, and nothing
of it is imported here. Options: `options.toml`; how to use it: `docs/reference/tensorrt-llm.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_recipes import Decoder, RequestError, StageContext, hookimpl

if TYPE_CHECKING:
    from .runtime import TensorRTLLMRuntime

#: Of the masked attention kernels: MMHA_SUPPORTED_HEAD_SIZES in TensorRT-LLM's decoderMaskedMultiheadAttention.cu.
HEAD_SIZES = (32, 48, 64, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256)
#: Architectures of its class that multiplies the embedding's rows by `embedding_multiplier`: models/llama/model.py.
SCALED = ("LlamaForCausalLM", "MistralForCausalLM")
#: That of its class that multiplies them by √hidden_size, whatever config.json says: models/gemma/model.py.
GEMMA = "GemmaForCausalLM"


@hookimpl
def check_decoder(context: StageContext, decoder: Decoder) -> None:
    """Refuse what TensorRT-LLM refuses, and an environment that has it not, before the model is calibrated."""
    from .environment import Environment

    if decoder.head_size not in HEAD_SIZES:
        raise RequestError(
            f"TensorRT-LLM has no attention kernel for heads of {decoder.head_size}",
            f"it has {', '.join(map(str, HEAD_SIZES))}: choose another engine",
        )
    _check_class(decoder)
    if context.options.get("runtime"):
        Environment.of(context.options).require()  # now, and not after a calibration
    longest = int(context.options.get("max_seq_len") or decoder.max_positions)
    if longest > decoder.max_positions and not decoder.rope_scaling:
        raise RequestError(
            f"build.max_seq_len = {longest}: this model is made for {decoder.max_positions}",
            f"set build.max_seq_len={decoder.max_positions} or less",
        )


def _check_class(decoder: Decoder) -> None:
    """Refuse what TensorRT-LLM's model class would compute differently, without a word.

    All of them read `hidden_act`. None that has room for these weights reads how much of a head is rotated: those that
    read `rotary_pct` keep fc and gate as one matrix (Phi3) or have no gate (GPT).
    """
    name, scale = decoder.architecture, decoder.embedding_scale
    if decoder.rotary_size:
        raise RequestError(
            f"TensorRT-LLM's {name} rotates whole heads, this model {decoder.rotated} of {decoder.head_size} elements",
            "choose another engine",
        )
    theirs = scale if name in SCALED else math.sqrt(decoder.hidden_size) if name == GEMMA else 1.0
    if not math.isclose(scale, theirs, rel_tol=1e-6):
        raise RequestError(
            f"TensorRT-LLM's {name} multiplies the embedding's rows by {theirs:g}, this model by {scale:g}",
            "choose another engine",
        )


@hookimpl
def command(context: StageContext) -> list[str]:
    """What stage 2 runs, word by word."""
    from . import arguments

    return arguments.command(context)


@hookimpl
def stage2(context: StageContext) -> Mapping[str, Any]:
    """Write `config.json`, `rank<r>.engine` and `trtllm-build.log`."""
    from .building import build

    return {"versions": build(context)}


@hookimpl
def load_engine(folder: Path, options: Mapping[str, Any]) -> TensorRTLLMRuntime:
    """Load what `stage2` wrote, in the environment that the options name."""
    from .runtime import TensorRTLLMRuntime

    return TensorRTLLMRuntime(folder, options)
