"""Judging what lies in a folder already: an engine, also one that was carried here, or a TensorRT-LLM checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import portability, refs
from .api import Setup
from .availability import runs
from .entries import Precision
from .errors import MachineError, Rejected, RequestError, StageFailed
from .planning import Plan
from .registry import Registry
from .sources.folder import digest_of
from .store import MANIFEST, PLACES, is_whole, read_manifest
from .types import TRTLLM_CHECKPOINT, Artifact, Ref, StageName

CONFIG, RANK0 = "config.json", "rank0.safetensors"


def plan_for(setup: Setup, text: str, source: str | None, choices: Mapping[str, Any]) -> Plan:
    """The plan that judges an engine, given as a reference or a folder, or a checkpoint in a folder.

    Args:
        text: a reference whose engine is built, or a folder.
        source: what the folder claims to be, `MODEL[:PRECISION]`; needed where no manifest says it.
        choices: `engine`, `target` and `settings`, as for `Setup.plan`.

    Raises:
        RequestError: the folder holds neither, or nothing says what it was made from.
        MachineError: the reference is not built, or something that judging needs is missing.
        Rejected: the checkpoint is malformed.
    """
    folder = Path(os.path.expanduser(text))
    is_checkpoint = (folder / RANK0).is_file() and (folder / CONFIG).is_file()
    if (folder / MANIFEST).is_file() and read_manifest(folder) is None and not is_checkpoint:
        raise RequestError(f"{folder / MANIFEST} is damaged", "build or copy the folder again")
    if (read_manifest(folder) or {}).get("stage") == "stage2":
        if choices.get("engine") or choices.get("target"):
            raise RequestError(
                f"{text} is an engine already: its manifest says for what", "leave --engine and --target out"
            )
        if source and setup.store.holds(folder.resolve()):
            raise RequestError(f"this workspace knows what {folder.name} was made from", "leave --source out")
        return _plan_engine(setup, folder.resolve(), source, choices["settings"])
    if is_checkpoint:
        return _plan_checkpoint(setup, folder.resolve(), source, choices)
    is_model = (folder / CONFIG).is_file() and any(folder.glob("*.safetensors"))
    if folder.is_dir() and (refs.is_folder(text) or "/" in text) and not is_model:
        raise RequestError(
            f"{text} holds no engine of ours and no TensorRT-LLM checkpoint",
            f"an engine has {MANIFEST}, a checkpoint {CONFIG} and {RANK0}: copy the whole folder",
        )
    if source:
        raise RequestError("--source says what a folder was made from, and this is a reference", "leave it out")
    plan = setup.plan(text, **choices)
    return _plan_engine(setup, setup.engine(plan), str(plan.ref), choices["settings"])


def check_provider(registry: Registry, manifest: Mapping[str, Any], folder: str) -> None:
    """That the package is here whose engine made a folder.

    Raises:
        MachineError: it is not.
    """
    made = manifest.get("provider")
    package = made.get("package") if isinstance(made, dict) else None
    engine = registry.engines.entries.get(str(made.get("name"))) if isinstance(made, dict) else None
    if isinstance(package, str) and package.isprintable() and engine is None:
        raise MachineError(
            f"{folder} was built by {package}, which is not installed", "install it (RECIPES_PLUGINS=0 leaves it out)"
        )


def _plan_engine(setup: Setup, folder: Path, source: str | None, settings: Mapping[str, str] | None) -> Plan:
    manifest = read_manifest(folder) or {}
    try:
        if not is_whole(folder, manifest):
            raise RequestError(f"{folder} is damaged: files are missing or cut short", "build or copy the engine again")
        made_as, target = refs.parse(manifest["ref"]), str(manifest["target"])
        claimed = setup.registry.expand(refs.parse(source)) if source else made_as
        ref = Ref(claimed.model, claimed.precision or made_as.precision, made_as.engine)
        check_provider(setup.registry, manifest, folder.name)
        given = {key: _spell(value) for key, value in manifest["set"].items()}
        ready: dict[StageName, Artifact] = {"stage2": Artifact(str(manifest["kind"]), folder, str(manifest["key"]))}
        ready |= _inputs(setup, ref, manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RequestError(f"{folder / MANIFEST} is damaged", "build or copy the engine again") from None
    engine = setup.registry.engines[str(ref.engine)]
    foreign = portability.check(manifest, setup.facts, engine, setup.registry)
    if foreign and not portability.runs_here(manifest, setup.facts):  # without its GPU it may still be simulated
        raise foreign
    return setup.plan(str(ref), target=target, settings={**given, **(settings or {})}, ready=ready)


def _inputs(setup: Setup, ref: Ref, manifest: Mapping[str, Any]) -> dict[StageName, Artifact]:
    """What the engine was made from, as far as it is still there."""
    precision = setup.registry.precisions[ref.precision or setup.registry.defaults.precision]
    calibration = setup.registry.calibration_of(precision)
    stages: dict[str, StageName] = {precision.gives: "stage1"}
    if calibration:
        stages[calibration.gives] = "calibrate"
    found: dict[StageName, Artifact] = {}
    for given in manifest.get("inputs", []):
        path = Path(given["path"])
        if given["kind"] in stages and read_manifest(path):
            found[stages[given["kind"]]] = Artifact(given["kind"], path, given["key"])
    return found


def _plan_checkpoint(setup: Setup, folder: Path, source: str | None, choices: Mapping[str, Any]) -> Plan:
    from .checkpoint.source import read_json

    manifest = read_manifest(folder) or {}
    claimed = source or manifest.get("ref")
    if not claimed:
        raise RequestError(
            f"nothing in {folder} says which model it was made from", "name it: --source MODEL[:PRECISION]"
        )
    ref = setup.registry.expand(refs.parse(claimed))
    _check(folder, contents=False)
    config = read_json(folder / CONFIG)
    algorithm = (config.get("quantization") or {}).get("quant_algo") or ""
    precision = setup.registry.precisions[ref.precision] if ref.precision else _precision(setup, algorithm)
    if not _is_run(setup, precision):
        _check(folder)
        raise RequestError(
            f"{folder.name} is well-formed, and no engine here runs {precision.algorithm}: it was not judged further",
            "install a package with an engine for it",
        )
    files = sorted([folder / CONFIG, *folder.glob("rank*.safetensors")])
    # a manifest that came along says what the files were, not what they are
    ours = folder.parent == setup.store.workspace / PLACES["stage1"] and is_whole(folder, manifest)
    key = str(manifest["key"]) if ours else digest_of(files)
    ready: dict[StageName, Artifact] = {"stage1": Artifact(TRTLLM_CHECKPOINT, folder, key)}
    return setup.plan(str(Ref(ref.model, precision.name, ref.engine)), ready=ready, **choices)


def _check(folder: Path, *, contents: bool = True) -> None:
    """Reject a checkpoint that is malformed. `contents`: its weights are read as well."""
    from .checkpoint import verify

    try:
        verify(folder, contents=contents)
    except StageFailed as error:
        raise Rejected(error.message, error.hint) from None


def _is_run(setup: Setup, precision: Precision) -> bool:
    """Whether an engine that is installed runs such checkpoints anywhere."""
    engines = [e for e in setup.registry.engines.entries.values() if precision.gives in e.takes]
    return any(runs(engine, precision, target) for engine in engines for target in engine.targets)


def _precision(setup: Setup, algorithm: str) -> Precision:
    """The first precision whose checkpoints are of this algorithm; of unquantised ones the default, if it is one."""
    entries = setup.registry.precisions.entries
    default = entries.get(setup.registry.defaults.precision)
    found = [entry for entry in (default, *entries.values()) if entry and entry.algorithm == algorithm]
    if not found:
        raise RequestError(f"no precision here makes {algorithm} checkpoints", "name one: --source MODEL:PRECISION")
    return found[0]


def _spell(value: Any) -> str:
    """An option's value as `--set` has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
