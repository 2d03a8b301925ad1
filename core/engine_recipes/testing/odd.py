"""A family that only the suite has: models that differ from Llama in what a Decoder can say and few models use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import hookimpl
from ..decoder import Decoder
from ..entries import Family, Owner
from ..hf_config import from_hf

ARCHITECTURE = "ConformanceForCausalLM"


def family(owner: Owner) -> Family:
    """Its entry, for the registry of a lab."""
    return Family(name="conformance", owner=owner, module=__name__, architectures=(ARCHITECTURE,))


@hookimpl
def resolve_checkpoint(config: Mapping[str, Any]) -> Decoder:
    """Describe one. It says of itself that it is a Llama: engines must go by what the description says beside that."""
    return from_hf(config, architecture="LlamaForCausalLM", embedding_scale=float(config.get("embedding_scale", 1.0)))
