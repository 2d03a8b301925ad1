"""Who can say what the unquantised source computes: what loads it, and whether that is independent of the family."""

from __future__ import annotations

import json

from .entries import Family, Reference
from .errors import RecipesError
from .hf_config import architecture_of
from .sources import Located
from .sources.texts import package_file


def loads(reference: Reference, located: Located | None) -> bool:
    """Whether it knows the source's class. Where that cannot be known, it is tried."""
    if not reference.loads or not located:
        return True
    try:
        named = package_file(reference.loads).read_text(encoding="utf-8")
        architecture = architecture_of(json.loads((located.folder / "config.json").read_text(encoding="utf-8")))
    except (RecipesError, OSError, ValueError, AttributeError, RecursionError):
        return True  # what is damaged is refused elsewhere
    return f'"{architecture}"' in named


def doubt(reference: Reference, family: Family) -> str:
    """Why it would not notice that the family describes a model wrongly; empty if it would, or the family vouches."""
    if not reference.by_description or reference.name in family.references:
        return ""
    return (
        f"{reference.name} runs the source as family {family.name} describes it, and so does the engine: what is wrong "
        "there is wrong in both. Where transformers is installed and knows the model it is asked instead"
    )
