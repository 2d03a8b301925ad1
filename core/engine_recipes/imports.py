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
    found = _try(providers, [str(place) for place in store.kept]) if providers else {}
    return [text for text in found.values() if text]


def survives(provider: Provider, what: str, store: Store, gpus: str = "") -> None:
    """That importing a module does not end the process that does. Why it cannot be imported is said by who imports it.

    Args:
        what: what it is imported for, for the message.
        gpus: as in `launch.call`.

    Raises:
        StageFailed: it does.
    """
    launch.call(what, _request([provider], [str(place) for place in store.kept]), None, lambda _: None, gpus)


def _request(providers: list[Provider], places: list[str]) -> dict[str, Any]:
    return {"action": "import", "providers": [asdict(one) for one in providers], "protected": places}


def _try(providers: list[Provider], places: list[str]) -> dict[str, str]:
    package = providers[0].package
    try:
        request = _request(providers, places)
        answer: dict[str, str] = launch.call(f"importing {package}", request, None, lambda _: None).value
    except RecipesError as error:  # one of them ended the process
        if len(providers) > 1:
            return {module: text for one in providers for module, text in _try([one], places).items()}
        output = error.output if isinstance(error, StageFailed) else ""
        return {providers[0].module: f"{error.message}\n{output}".rstrip()}
    return answer
