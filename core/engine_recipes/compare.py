"""Builds side by side: what manifests, verdicts and benches say, by the source that engines were made from."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import bench, gate, refs
from .api import Setup
from .errors import RequestError
from .store import Store, read_json, read_manifest, size_of
from .types import HF_CHECKPOINT, Ref, Report

#: Settings without which two speeds cannot be compared.
_COMPARABLE = ("batch", "prompt_tokens", "new_tokens", "threads")


@dataclass(frozen=True)
class Source:
    """The unquantised checkpoint that engines were made from.

    Attributes:
        bytes: its files on disk; None if they are not on this machine any more.
        dtype: of its weights, as its configuration says.
        reference: what ran it for the gate, and its perplexity there; empty and None if nothing did.
    """

    key: str
    spec: str
    revision: str | None = None
    bytes: int | None = None
    dtype: str = ""
    reference: str = ""
    perplexity: float | None = None


@dataclass(frozen=True)
class Built:
    """One engine.

    Attributes:
        stages: stage -> seconds, as its manifest and those of its inputs say.
        benches: every measurement of its speed, newest last.
        bench: the one that is compared.
    """

    folder: Path
    manifest: Mapping[str, Any]
    ref: Ref
    report: Report
    published: bool
    bytes: int
    stages: Mapping[str, float]
    benches: Sequence[Mapping[str, Any]]
    bench: Mapping[str, Any] | None = None

    @property
    def target(self) -> str:
        """`cpu`, `sm89` …"""
        return str(self.manifest.get("target") or "")

    @property
    def given(self) -> str:
        """What `--set` gave, in words."""
        return " ".join(f"{key}={value}" for key, value in self.manifest.get("set", {}).items())

    @property
    def recipe(self) -> str:
        """`fp8@onnxruntime`: what differs between engines of one model."""
        return f"{self.ref.precision}@{self.ref.engine}" if self.ref.precision else self.folder.name

    @property
    def verdict(self) -> str:
        """The gate's word; `accepted` for a failure that somebody let pass."""
        return "accepted" if self.report.verdict == "fail" and self.report.accepted else self.report.verdict

    @property
    def seconds(self) -> float | None:
        """Of all stages that left a manifest."""
        return sum(self.stages.values()) if self.stages else None

    def metric(self, name: str) -> float | None:
        """A number of the gate, `mean_kl`; None if it was not measured, NaN if it was and is no finite number."""
        if name not in self.report.metrics:
            return None
        value = _number(self.report.metrics[name])
        return math.nan if value is None else value

    def speed(self, name: str, which: str = "median") -> float | None:
        """A number of the bench, `decode_tokens_per_second`: its `median`, `min`, `max` or `iqr`."""
        spread = (self.bench or {}).get("metrics", {}).get(name)
        return _number(spread.get(which)) if isinstance(spread, Mapping) else None


@dataclass(frozen=True)
class Group:
    """Engines of one source, largest first, and what must be said about comparing them."""

    model: str
    source: Source
    engines: tuple[Built, ...]
    notes: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the compared speeds were measured with; nothing if none was."""
        return next((_settings(engine.bench) for engine in self.engines if engine.bench), {})

    def as_json(self) -> dict[str, Any]:
        """One model of `compare --json`."""
        engines = [_engine_json(engine, self.source) for engine in self.engines]
        return {"model": self.model, "source": vars(self.source), "engines": engines, "notes": list(self.notes)}


def collect(setup: Setup, texts: Sequence[str]) -> list[Group]:
    """Engines to compare, by their source.

    Args:
        texts: references, or engine folders' names as `recipes engines` shows them. Without any: of each plain name
            the newest build and the one that it points to.

    Raises:
        RequestError: unknown name.
        MachineError: a reference that is not built.
    """
    store = setup.store
    there = dict(store.artifacts("engines"))
    folders = [_find(setup, there, text) for text in texts] if texts else _newest(store, there)
    found = [_built(store, folder, read_manifest(folder) or {}) for folder in dict.fromkeys(folders)]
    groups: dict[str, list[Built]] = {}
    for engine in sorted(found, key=lambda engine: (-engine.bytes, engine.folder.name)):
        groups.setdefault(_source_key(engine.manifest), []).append(engine)
    made = [_group(store, key, engines) for key, engines in groups.items()]
    return sorted(made, key=lambda group: (group.model, group.source.key))


def _find(setup: Setup, there: Mapping[Path, Any], text: str) -> Path:
    known = next((folder for folder in there if folder.name == text), None)
    return known or setup.engine(setup.plan(text))


def _newest(store: Store, there: Mapping[Path, Any]) -> list[Path]:
    newest = {store.plain(folder): folder for folder in there}
    return [folder for folder in there if folder in newest.values() or store.is_published(folder)]


def _built(store: Store, folder: Path, manifest: Mapping[str, Any]) -> Built:
    report = gate.read(folder) or Report()
    judging = {"validate": report.seconds} if report.seconds else {}
    return Built(
        folder=folder,
        manifest=manifest,
        ref=_ref(str(manifest.get("ref"))),
        report=report,
        published=store.is_published(folder),
        bytes=size_of(folder),
        stages={**_stages(manifest), **judging},
        benches=bench.read(folder),
    )


def _ref(text: str) -> Ref:
    try:
        return refs.parse(text)
    except RequestError:
        return Ref(text)


def _stages(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Stage -> seconds in the order they ran. An input that was made for another engine took as long for this one."""
    inputs = reversed(manifest.get("inputs", []))
    manifests = [*(read_manifest(Path(artifact["path"])) or {} for artifact in inputs), manifest]
    return {m["stage"]: float(m["seconds"]) for m in manifests if "stage" in m and "seconds" in m}


def _source_key(manifest: Mapping[str, Any]) -> str:
    keys = (str(artifact["key"]) for artifact in manifest.get("inputs", []) if artifact["kind"] == HF_CHECKPOINT)
    return next(keys, "")


def _group(store: Store, key: str, engines: Sequence[Built]) -> Group:
    model = engines[0].ref.model
    name = Path(model).name if refs.is_folder(model) else model
    compared, notes = _comparable(engines)
    return Group(name, _source(store, key, engines[0].manifest), compared, notes)


def _source(store: Store, key: str, manifest: Mapping[str, Any]) -> Source:
    """The source as the resolve stage found it, and as the gate knows it."""
    artifact = next((a for a in manifest.get("inputs", []) if a["key"] == key), None)
    located = read_json(Path(artifact["path"]) / "source.json") if artifact else {}
    said = manifest.get("source")
    said = said if isinstance(said, dict) else {}
    folder = Path(located.get("folder") or "/nowhere")
    config = read_json(folder / "config.json")
    reference, perplexity = _baseline(store, key)
    return Source(
        key=key,
        spec=str(said.get("spec", "")),
        revision=said.get("revision"),
        bytes=_bytes(folder),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or ""),
        reference=reference,
        perplexity=perplexity,
    )


def _bytes(folder: Path) -> int | None:
    """Bytes of the files that matter, through the links of a download cache."""
    from .sources.folder import relevant

    try:
        return sum((folder / name).stat().st_size for name in relevant(folder))
    except (OSError, RequestError):
        return None


def _baseline(store: Store, key: str) -> tuple[str, float | None]:
    """What ran a source for its newest baseline, and the perplexity there; empty and None if there is none."""
    for folder, manifest in reversed(store.artifacts("baselines")):
        if any(artifact.get("key") == key for artifact in manifest.get("inputs", [])):
            return str(manifest.get("provider", {}).get("name", "")), _perplexity(read_json(folder / "baseline.json"))
    return "", None


def _perplexity(facts: Mapping[str, Any]) -> float | None:
    """exp of the mean negative log-likelihood, over every token that has one before it."""
    try:
        scored = sum(len(text["ids"]) - 1 for text in facts["texts"])
        value = math.exp(-sum(text["log_likelihood"] for text in facts["texts"]) / scored)
    except (KeyError, TypeError, ArithmeticError):
        return None
    return value if math.isfinite(value) else None


def _comparable(engines: Sequence[Built]) -> tuple[tuple[Built, ...], tuple[str, ...]]:
    """Engines with the bench of the settings that most of them share, and what is left out by that."""
    counts = Counter(settings for engine in engines for settings in {_key(result) for result in engine.benches})
    newest = {_key(result): str(result.get("created")) for engine in engines for result in engine.benches}
    chosen = max(counts, key=lambda settings: (counts[settings], newest[settings]), default="")
    made = tuple(
        replace(engine, bench=next((b for b in reversed(engine.benches) if _key(b) == chosen), None))
        for engine in engines
    )
    notes = [
        f"{engine.recipe} was timed with other settings ({_in_words(_settings(engine.benches[-1]))}): not compared"
        for engine in made
        if engine.benches and not engine.bench
    ]
    if len({_machine(engine.bench) for engine in made if engine.bench}) > 1:
        notes.append("speeds were measured on different machines")
    return made, tuple(notes)


def _settings(result: Mapping[str, Any] | None) -> dict[str, Any]:
    settings = (result or {}).get("settings", {})
    return {name: settings[name] for name in _COMPARABLE if settings.get(name) is not None}


def _key(result: Mapping[str, Any]) -> str:
    return json.dumps(_settings(result), sort_keys=True)


def _in_words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items())


def _machine(result: Mapping[str, Any] | None) -> str:
    machine = (result or {}).get("machine", {})
    return ", ".join(map(str, filter(None, [machine.get("cpu"), *machine.get("gpus", [])])))


def _engine_json(engine: Built, source: Source) -> dict[str, Any]:
    validation = engine.report.as_json()
    return {
        "name": engine.folder.name,
        "path": str(engine.folder),
        "ref": str(engine.ref),
        "precision": engine.ref.precision,
        "engine": engine.ref.engine,
        "target": engine.target,
        "set": engine.manifest.get("set", {}),
        "created": engine.manifest.get("created", ""),
        "published": engine.published,
        "bytes": engine.bytes,
        "times_source": engine.bytes / source.bytes if source.bytes else None,
        "stages": dict(engine.stages),
        "seconds": engine.seconds,
        "bench": engine.bench,
        **validation,
    }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def machines(groups: Iterable[Group]) -> list[str]:
    """The processors that speeds were measured on; the systems engines were built on if none was."""
    engines = [engine for group in groups for engine in group.engines]
    benched = [_machine(engine.bench) for engine in engines if engine.bench]
    built = [str(engine.manifest.get("machine", {}).get("system", "")) for engine in engines]
    return sorted({name for name in benched if name} or {name for name in built if name})
