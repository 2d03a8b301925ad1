"""Whether a package's modules can be imported: tried in a process of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from . import launch
from .entries import Owner
from .errors import RecipesError, StageFailed
from .registry import Registry
from .stages import provider
from .store import Store
from .types import Provider


def problems(registry: Registry, owner: Owner, store: Store) -> list[str]:
    """Import every module that a package names.

    Returns:
        For each that cannot be used the reason, with the traceback of the package's own code. One that hangs is
        interrupted, see `host.import_seconds`.
    """
    kinds: Mapping[str, Any] = {
        "family": registry.families,
        "calibration": registry.calibrations,
        "precision": registry.precisions,
        "engine": registry.engines,
        "reference": registry.references,
    }
    entries = [(kind, entry) for kind, names in kinds.items() for entry in names.entries.values()]
    providers = [provider(kind, entry) for kind, entry in entries if entry.owner == owner]
    found = _try(providers, [str(place) for place in store.places]) if providers else {}
    return [text for text in found.values() if text]


def _try(providers: list[Provider], places: list[str]) -> dict[str, str]:
    package = providers[0].package
    request = {"action": "import", "providers": [asdict(one) for one in providers], "protected": places}
    try:
        answer: dict[str, str] = launch.call(f"importing {package}", request, None, lambda _: None).value
    except RecipesError as error:  # one of them ended the process
        if len(providers) > 1:
            return {module: text for one in providers for module, text in _try([one], places).items()}
        output = error.output if isinstance(error, StageFailed) else ""
        return {providers[0].module: f"{error.message}\n{output}".rstrip()}
    return answer
