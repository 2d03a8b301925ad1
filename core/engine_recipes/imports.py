"""Whether installed packages' modules can be imported: each package is tried in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from . import facts, launch
from .entries import Owner
from .errors import RecipesError, StageFailed
from .registry import Registry
from .stages import provider
from .store import Store
from .types import Provider


def problems(registry: Registry, store: Store) -> dict[Owner, dict[str, str]]:
    """Import every module that other packages than ours name.

    Returns:
        Owner -> module -> why it cannot be used, with the traceback of its own code; packages and modules without a
        problem are left out. One that hangs is interrupted, see `host.import_seconds`.
    """
    providers, places = _providers(registry), [str(place) for place in store.places]
    with ThreadPoolExecutor(facts.cpus()) as pool:
        found = dict(zip(providers, pool.map(lambda one: _try(one, places), providers.values()), strict=True))
    return {owner: broken for owner, broken in found.items() if broken}


def _providers(registry: Registry) -> Mapping[Owner, list[Provider]]:
    kinds: Mapping[str, Any] = {
        "family": registry.families,
        "calibration": registry.calibrations,
        "precision": registry.precisions,
        "engine": registry.engines,
        "reference": registry.references,
    }
    found: dict[Owner, list[Provider]] = {}
    for kind, names in kinds.items():
        for entry in names.entries.values():
            if entry.owner is not registry.owners[0]:
                found.setdefault(entry.owner, []).append(provider(kind, entry))
    return found


def _try(providers: list[Provider], places: list[str]) -> dict[str, str]:
    package = providers[0].package
    request = {"action": "import", "providers": [asdict(one) for one in providers], "protected": places}
    try:
        answer: dict[str, str] = launch.call(f"importing {package}", request, None, lambda _: None).value
    except RecipesError as error:  # it died of it, all of them may have
        output = error.output if isinstance(error, StageFailed) else ""
        return {providers[0].module: f"{error.message}\n{output}".rstrip()}
    return {module: problem for module, problem in answer.items() if problem}
