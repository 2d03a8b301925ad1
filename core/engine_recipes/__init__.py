"""engine-recipes: Hugging Face checkpoint in, persistent inference engine out.

What plugin authors and scripts import. Names are loaded when first used, so importing this costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (
        calibration as calibration,
        checkpoint as checkpoint,
        checks as checks,
        events as events,
        rope as rope,
        stepping as stepping,
        testing as testing,
    )
    from .api import Loaded as Loaded, build as build, load as load, plan as plan
    from .decoder import Decoder as Decoder, Json as Json
    from .errors import (
        Interrupted as Interrupted,
        MachineError as MachineError,
        RecipesError as RecipesError,
        Rejected as Rejected,
        RequestError as RequestError,
        StageFailed as StageFailed,
    )
    from .events import Event as Event
    from .hf_config import from_hf as from_hf
    from .hookspecs import hookimpl as hookimpl
    from .planning import Plan as Plan
    from .runner import (
        Build as Build,
        BuildStatus as BuildStatus,
        How as How,
        StageResult as StageResult,
        StageStatus as StageStatus,
    )
    from .sources.local import hub_cache as hub_cache
    from .sources.texts import read_texts as read_texts
    from .space import require_room as require_room
    from .store import read_manifest as read_manifest
    from .tokenizer import Tokenizer as Tokenizer
    from .types import (
        Artifact as Artifact,
        Check as Check,
        Findings as Findings,
        Measure as Measure,
        Ref as Ref,
        Report as Report,
        Runtime as Runtime,
        Sampling as Sampling,
        StageContext as StageContext,
        StageName as StageName,
        Value as Value,
        Verdict as Verdict,
    )

_HOME = {
    "Loaded": "api",
    "build": "api",
    "load": "api",
    "plan": "api",
    "Decoder": "decoder",
    "Json": "decoder",
    "Event": "events",
    "from_hf": "hf_config",
    "Interrupted": "errors",
    "MachineError": "errors",
    "RecipesError": "errors",
    "Rejected": "errors",
    "RequestError": "errors",
    "StageFailed": "errors",
    "hookimpl": "hookspecs",
    "Plan": "planning",
    "Build": "runner",
    "BuildStatus": "runner",
    "How": "runner",
    "StageResult": "runner",
    "StageStatus": "runner",
    "hub_cache": "sources.local",
    "read_texts": "sources.texts",
    "require_room": "space",
    "read_manifest": "store",
    "Tokenizer": "tokenizer",
    "Artifact": "types",
    "Check": "types",
    "Findings": "types",
    "Measure": "types",
    "Ref": "types",
    "Report": "types",
    "Runtime": "types",
    "Sampling": "types",
    "StageContext": "types",
    "StageName": "types",
    "Value": "types",
    "Verdict": "types",
}
_MODULES = ("calibration", "checkpoint", "checks", "events", "rope", "stepping", "testing")

__all__ = [*_HOME, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
