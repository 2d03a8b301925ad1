"""The data that crosses boundaries: between core and plugins, and between processes.

Plain frozen dataclasses with names, numbers and paths; no live objects, so that a stage can run in another
process, another environment or on another machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast, get_args

from .errors import RequestError

if TYPE_CHECKING:
    import numpy as np

#: What an option may be: of these types in TOML, in `--set` and in a hook's `context.options`.
Value = str | int | float | bool
#: The stages of a build, in order.
StageName = Literal["resolve", "calibrate", "stage1", "stage2", "baseline", "validate"]
#: What a check, and a whole report, comes to.
Verdict = Literal["pass", "warn", "fail", "not run"]

#: Artifact kinds that core and the built-in plugins use. A plugin may add its own.
HF_CHECKPOINT = "hf-checkpoint"
TRTLLM_CHECKPOINT = "trtllm-checkpoint"
CALIBRATION = "calibration"
BASELINE = "baseline"
#: What the model is, in the folder that the resolve stage leaves.
DECODER = "decoder.json"


@dataclass(frozen=True)
class Ref:
    """`MODEL[:PRECISION][@ENGINE]`, as written. A part that was left out is None."""

    model: str
    precision: str | None = None
    engine: str | None = None

    def __str__(self) -> str:
        precision = f":{self.precision}" if self.precision else ""
        engine = f"@{self.engine}" if self.engine else ""
        return f"{self.model}{precision}{engine}"


@dataclass(frozen=True)
class Provider:
    """Who runs a hook: a registry entry and the package it belongs to."""

    kind: Literal["family", "calibration", "precision", "engine", "reference"]
    name: str
    module: str
    package: str
    version: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name} ({self.package} {self.version})"


@dataclass(frozen=True)
class Artifact:
    """What a stage left behind: a complete, verified folder.

    Attributes:
        kind: what it is, matched against `takes` (`hf-checkpoint`, `trtllm-checkpoint`, `onnx-engine` …).
        path: the folder. Read-only for everyone but the stage that wrote it.
        key: sha256 of everything that determined its content, 64 hex digits.
    """

    kind: str
    path: Path
    key: str


@dataclass(frozen=True)
class StageContext:
    """All that a hook gets.

    Attributes:
        ref: the complete reference, `model:precision@engine`.
        stage: which stage is running.
        options: every option the stage knows, defaults filled in. Keys as in `--set`, without the prefix
            (`build.` for stage 2).
        inputs: what earlier stages left, nearest first: stage 1 gets (source,), or (calibration, source) if its
            precision names a calibration; stage 2 the checkpoint and those; validate the engine and those, and last
            the baseline, if there is one.
        out: an empty folder; write here and nowhere else. It is published by one rename when the hook returns.
        target: what the engine is for: `cpu`, `sm89`, or `sm86+sm89` for an engine that combines them.
        ranks: over how many GPUs the checkpoint is split: `tp_size` times `pp_size`.
        cache: a folder of this engine's own in the workspace, which outlives builds: for what makes the next one
            faster. It may not exist yet, and other builds use it at the same time.
    """

    ref: str
    stage: StageName
    options: Mapping[str, Value]
    inputs: tuple[Artifact, ...]
    out: Path
    target: str = "cpu"
    cache: Path = Path()
    ranks: int = 1

    def input(self, kind: str) -> Artifact:
        """The nearest input of that kind. Raises RequestError if there is none."""
        for artifact in self.inputs:
            if artifact.kind == kind:
                return artifact
        have = ", ".join(a.kind for a in self.inputs) or "nothing"
        raise RequestError(f"{self.stage} needs a {kind} and was given {have}", "check `takes` and `gives`")

    def as_json(self) -> dict[str, Any]:
        """As plain JSON, for another process."""
        inputs = [{**vars(artifact), "path": str(artifact.path)} for artifact in self.inputs]
        places = {"out": str(self.out), "cache": str(self.cache)}
        return {**vars(self), "options": dict(self.options), "inputs": inputs, **places}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StageContext:
        """The reverse of `as_json`."""
        inputs = tuple(Artifact(a["kind"], Path(a["path"]), a["key"]) for a in data["inputs"])
        places = {"out": Path(data["out"]), "cache": Path(data["cache"])}
        return cls(**{**data, "inputs": inputs, **places})


@dataclass(frozen=True)
class Check:
    """One thing that was judged: what was measured, where the limit lies, and why it matters."""

    name: str
    verdict: Verdict
    value: float | None = None
    limit: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Measure:
    """A number about an engine that has no verdict yet: limits of the registry judge it.

    Attributes:
        name: a metric of the registry, `mean_kl`.
        base: the same number of the unquantised source, where it has one: an engine is not blamed for what its
            source does as well.
        note: what was measured, and where it was worst.
    """

    name: str
    value: float
    base: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Findings:
    """What looking at an engine found.

    Attributes:
        measures: numbers for limits to judge.
        checks: what has its verdict already.
        samples: prompts and what was said: `prompt`, `text`, and `source`, the unquantised model's text.
        layers: linear layer, as TensorRT-LLM names it (`transformer.layers.0.mlp.proj`) -> relative error of its
            weights.
        seconds: that looking took.
    """

    measures: tuple[Measure, ...] = ()
    checks: tuple[Check, ...] = ()
    samples: tuple[Mapping[str, str], ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.measures + other.measures,
            self.checks + other.checks,
            self.samples + other.samples,
            {**self.layers, **other.layers},
            self.seconds + other.seconds,
        )

    def as_json(self) -> dict[str, Any]:
        """As plain JSON. Numbers that JSON lacks travel as words: `nan`, `inf`."""
        return {
            "measures": [_spelled(vars(measure)) for measure in self.measures],
            "checks": [_spelled(vars(check)) for check in self.checks],
            "samples": [dict(sample) for sample in self.samples],
            "layers": _spelled(self.layers),
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Findings:
        """The reverse of `as_json`.

        Raises:
            KeyError, TypeError, ValueError, ArithmeticError, AttributeError: something is missing, or has not its type.
        """
        seconds = _read_number(data.get("seconds", 0))
        if not math.isfinite(seconds):
            raise ValueError("seconds are finite")
        return cls(
            tuple(_read_measure(**measure) for measure in data["measures"]),
            tuple(_read_check(**check) for check in data["checks"]),
            tuple({_read_text(k): _read_text(v) for k, v in sample.items()} for sample in data["samples"]),
            {_read_text(name): _read_number(value) for name, value in data["layers"].items()},
            seconds,
        )


def _spelled(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}


def _read_measure(name: Any, value: Any, base: Any = None, note: Any = "") -> Measure:
    return Measure(
        _read_text(name), _read_number(value), None if base is None else _read_number(base), _read_text(note)
    )


def _read_check(name: Any, verdict: Any, value: Any = None, limit: Any = None, note: Any = "") -> Check:
    value, limit = (None if number is None else _read_number(number) for number in (value, limit))
    return Check(_read_text(name), read_verdict(verdict), value, limit, _read_text(note))


def read_verdict(value: Any) -> Verdict:
    """A verdict from JSON. Raises ValueError if it is none."""
    if value not in get_args(Verdict):
        raise ValueError(f"{value!r} is no verdict")
    return cast("Verdict", value)


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _read_number(value: Any) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _number(value: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Report:
    """The judgement of one engine.

    Attributes:
        verdict: of all checks together.
        metrics: a metric of the registry, `mean_kl` -> its number.
        checks: everything that was judged, with its limit.
        samples, layers, seconds: as in `Findings`.
        accepted: why the engine is used although it failed; empty: it is not, or it did not fail.
    """

    verdict: Verdict = "not run"
    metrics: Mapping[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    samples: tuple[Mapping[str, str], ...] = ()
    layers: Mapping[str, float] = field(default_factory=dict)
    accepted: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> frozenset[str]:
        """Names of the checks that failed."""
        return frozenset(check.name for check in self.checks if check.verdict == "fail")

    @property
    def is_good(self) -> bool:
        """Whether the engine may have its plain name."""
        return self.verdict in ("pass", "warn") or bool(self.accepted)

    def as_json(self) -> dict[str, Any]:
        """The `validation` object of `build --json`."""
        return {
            "verdict": self.verdict,
            "metrics": {name: _number(value) for name, value in self.metrics.items()},
            "checks": [
                {**vars(check), "value": _number(check.value), "limit": _number(check.limit)} for check in self.checks
            ],
            "samples": [dict(sample) for sample in self.samples],
            "accepted": self.accepted or None,
        }


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it before sampling.
        seed: of the sampler; unused when greedy.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


class Runtime(Protocol):
    """A loaded engine. Works on token ids; text is the tokenizer's business.

    Several generations may be open at once, of one engine or of several: each has a cache of its own and says what it
    says alone. They come from one thread at a time. `engine_recipes.stepping.Stepper` keeps that.

    It may have an attribute `max_seq_len`, most tokens of a prompt and its answer, and `generate_batch`, see
    `Stepper.generate_batch`.
    """

    def generate(self, prompt: Sequence[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield new token ids, one by one. Ends after `max_tokens`, or before the first id in `stop`."""
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        """Next-token logits for every position, float32 [len(ids), vocabulary]; None if the engine hides them.

        The array is the caller's: nothing that runs later changes it.
        """
        ...

    def close(self) -> None:
        """Give back memory and devices. Safe to call twice."""
        ...
