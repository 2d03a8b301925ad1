"""What a registry has entries of: the fields of each kind, as TOML gives them. Data alone, nothing is read here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .errors import RequestError
from .refs import NAME
from .requirements import is_name, is_range, is_requirement
from .types import BASELINE, CALIBRATION, HF_CHECKPOINT, TRTLLM_CHECKPOINT, Value

#: Models of fewer parameters lose more when they are quantised, and have limits of their own.
SMALL = 1_000_000_000

#: What is another stage's in `--set`: no option begins with it.
_PREFIXES = ("gate.", "build.", "calib.")
#: Options that plans count with, whoever has them.
_NUMBERS = ("tp_size", "pp_size", "max_seq_len", "max_batch_size")


@dataclass(frozen=True)
class Owner:
    """Who a name belongs to: the package (or file) that its fragment lies in."""

    package: str
    version: str = ""
    path: Path = Path()

    def __str__(self) -> str:
        return f"{self.package} {self.version}".strip()


@dataclass(frozen=True)
class Option:
    """One setting of a stage: its default says its type.

    Attributes:
        default: what it is unless it is set.
        choices: all that it may be.
        min: smallest number.
        max: largest number.
        help: one line for `recipes show`.
        data: the value names data (`FILE.txt`, `hf:DATASET`): what counts in the key is its content, not its name.
        keyed: `false` for a setting that says how a thing is done and not what it is; it is in no key.
        unset: what an option that is left empty amounts to: the tool's own default, for `refuses` to look at.
        versions: of the tool that have it, as a version range; compared with the option `version`.
        kind: of an option that may stay empty, what it is otherwise: an engine's own words; but of `folders`, joined by
            commas, what counts in the key is their contents.
    """

    default: Value
    choices: tuple[Value, ...] = ()
    min: float | None = None
    max: float | None = None
    help: str = ""
    data: bool = False
    keyed: bool = True
    unset: Value = ""
    versions: str = ""
    kind: str = ""

    @classmethod
    def from_value(cls, value: Any) -> dict[str, Any]:
        """`tp_size = 1` is short for `tp_size = { default = 1 }`."""
        return {"default": value}

    def problems(self) -> list[str]:
        """See `structure`."""
        found = [f"choices: {choice!r} is of another type than the default" for choice in self._misfits()]
        if self.min is not None and self.max is not None and self.min > self.max:
            found.append(f"min: {self.min:g} is above the max, {self.max:g}")
        if not found and self.default != "" and self.unfit(self.default):
            found.append(f"default: {self.default!r} is nothing that it may be set to")
        return found + _no_range("versions", self.versions)

    def unfit(self, value: Value) -> str:
        """Why it may not be this, which has the right type: `must be at least 1`; empty if it may."""
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(map(str, self.choices))}"
        if isinstance(value, (str, bool)):
            return ""
        if self.min is not None and value < self.min:
            return f"must be at least {self.min:g}"
        return f"must be at most {self.max:g}" if self.max is not None and value > self.max else ""

    def _misfits(self) -> list[Value]:
        kinds = {type(self.default), int} if isinstance(self.default, float) else {type(self.default)}
        return [choice for choice in self.choices if type(choice) not in kinds]


@dataclass(frozen=True)
class Limit:
    """Where a metric warns and fails for one precision; what is left out is the metric's own.

    Attributes:
        warn: beyond it the verdict is `warn`.
        fail: beyond it the engine is rejected.
    """

    warn: float | None = None
    fail: float | None = None


@dataclass(frozen=True)
class Needs:
    """Hardware that a precision pays on. Empty: any.

    Attributes:
        compute: compute capability of the GPU, as a version range: `>=8.9`.
    """

    compute: str = ""

    def problems(self) -> list[str]:
        """See `structure`."""
        return _no_range("compute", self.compute)


@dataclass(frozen=True)
class Costs:
    """What a stage takes at its peak, for a model of so many parameters: the base, and bytes for each of them.

    An engine's are for each parameter of a 16-bit checkpoint; of one with smaller weights it takes as much less.

    Attributes:
        memory_base: bytes of RAM, whatever the model.
        memory: bytes of RAM for each parameter.
        disk: bytes on disk for each parameter.
        gpu_memory: bytes of GPU memory for each parameter, where a GPU is used.
    """

    memory_base: int = 0
    memory: float = 0.0
    disk: float = 0.0
    gpu_memory: float = 0.0


@dataclass(frozen=True)
class Refusal:
    """A combination that cannot work, refused before any work.

    Attributes:
        when: all of these hold. The key is `target`, `compute`, `precision`, `algorithm`, or an option as in `--set`;
            the value is `a|b`, shell patterns of which one must fit, or a version range, `>=8.9,<10`; with `!` before
            it, all that does not fit.
        why: one line, what is wrong.
        instead: one line, what to do about it.
    """

    when: Mapping[str, str]
    why: str
    instead: str

    def problems(self) -> list[str]:
        """See `structure`."""
        patterns = {key: pattern.removeprefix("!") for key, pattern in self.when.items()}
        ranges = {key: pattern for key, pattern in patterns.items() if pattern.startswith(("<", ">", "=="))}
        return [problem for key, text in ranges.items() for problem in _no_range(f"when.{key}", text)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """What all kinds of entry share.

    Attributes:
        settings: options that this entry sets for every build it takes part in, as in `--set`.
        origins: field -> owner, for fields that another fragment than the owner's has set.
    """

    settings: Mapping[str, Value] = field(default_factory=dict)
    name: str = field(default="", metadata={"toml": False})
    owner: Owner = field(default=Owner(""), metadata={"toml": False})
    origins: Mapping[str, Owner] = field(default_factory=dict, metadata={"toml": False})

    def problems(self) -> list[str]:
        """What is wrong with it beyond the types of its fields, each beginning with a field's name."""
        return []


@dataclass(frozen=True, kw_only=True, eq=False)
class Family(Entry):
    """Models that share a description.

    Attributes:
        module: the Python module with its hooks.
        architectures: the class names of `config.json` it knows.
        references: what can run their unquantised source, in order of preference; nothing: the defaults. Name
            `onnxruntime` when the description has been compared with the model's own code, see `by_description`.
    """

    module: str
    architectures: tuple[str, ...]
    references: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Model(Entry):
    """One model.

    Attributes:
        family: the name of its family.
        source: the places its checkpoint may come from, in order of preference.
        parameters: how many, for estimates.
        license: of the weights, as an SPDX name where there is one.
    """

    family: str
    source: tuple[str, ...]
    parameters: int = 0
    license: str = ""

    def problems(self) -> list[str]:
        """See `Entry.problems`."""
        found = [] if self.source else ["source: names none"]
        found += ["parameters: below 0"] if self.parameters < 0 else []
        return found + [f"source: {text}" for text in map(_no_source, self.source) if text]


@dataclass(frozen=True, kw_only=True, eq=False)
class StageEntry(Entry):
    """A calibration, a precision or an engine: what it needs, what it takes and gives, and its options.

    Attributes:
        module: the Python module with its hooks.
        takes: kinds of artifact that it can work on.
        gives: the kind of artifact that it writes.
        options: what `--set` can change, by name.
        requires: distributions, `onnx>=1.17`; alternatives are joined by `|`.
        install: what to run when one is missing.
        costs: what the stage takes at its peak.
    """

    module: str
    takes: tuple[str, ...]
    gives: str
    requires: tuple[str, ...] = ()
    install: str = ""
    options: Mapping[str, Option] = field(default_factory=dict)
    costs: Costs = Costs()

    def problems(self) -> list[str]:
        """See `Entry.problems`."""
        found = ["costs: no cost is below 0"] if min(vars(self.costs).values()) < 0 else []
        found += _no_requirements("requires", self.requires)
        for name, option in self.options.items():
            if not NAME.fullmatch(name) or name.startswith(_PREFIXES):
                found.append(
                    f"options.\"{name}\": a name is lower-case letters, digits, '.', '_' and '-', "
                    f"and none begins with {' or '.join(_PREFIXES)}"
                )
            elif name in _NUMBERS and type(option.default) is not int:
                found.append(f"options.{name}: must be a whole number, since plans count with it")
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration(StageEntry):
    """What is measured on a model before stage 1. Precisions that name the same one share its result.

    Attributes:
        shares: options of the precision that it gets as well, such as `device`. Its own are `calib.…` in `--set`.
    """

    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = CALIBRATION
    shares: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Reference(StageEntry):
    """What runs the unquantised source, for builds to be compared with.

    Attributes:
        loads: `package:MODULE/PATH` of the file that names, in double quotes, each architecture that it loads; empty:
            all.
        by_description: it computes what the family says that the model is, as engines do, and so would agree with them
            if that were wrong. Builds that it judges get a warning unless the family names it in `references`.
    """

    loads: str = ""
    by_description: bool = False
    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = BASELINE


@dataclass(frozen=True, kw_only=True, eq=False)
class Metric(Entry):
    """A number that validation measures, and where it warns and fails unless a precision says otherwise.

    Attributes:
        worse: which way is worse, `above` or `below` the limits.
        help: one line on what it is.
        warn: the limit for a warning.
        fail: the limit for a rejection.
    """

    worse: Literal["above", "below"]
    help: str
    warn: float | None = None
    fail: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Precision(StageEntry):
    """What stage 1 does.

    Attributes:
        limits: by metric, where validation warns and fails.
        small_limits: the same for models of fewer than a billion parameters, which lose more; over `limits`.
        bits: per weight of the linear layers, for size estimates.
        needs: hardware that it pays on.
        algorithm: the `quant_algo` of its checkpoints; nothing if they are not quantised.
        calibration: the name of what is measured first; nothing if the weights are all it needs.
    """

    takes: tuple[str, ...] = (HF_CHECKPOINT,)
    gives: str = TRTLLM_CHECKPOINT
    bits: float = 16
    needs: Needs = Needs()
    algorithm: str = ""
    calibration: str = ""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    small_limits: Mapping[str, Limit] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Engine(StageEntry):
    """What stage 2 compiles to.

    Attributes:
        takes: checkpoint kinds it compiles.
        targets: hardware it builds for: `cpu`, `sm89`, or `sm*`.
        target_requires: more distributions, by target.
        algorithms: by target, the `quant_algo` values it can run there; a target that is not named runs any.
        hardware: facts that go into the key: `target`, `gpu`, `driver`.
        combines: one engine may be for several targets: `sm86+sm89`.
        needs_gpu: it compiles on the GPU that the engine is for, so this machine must have it.
        details: `package:NAME/FILE.toml`, more of `options` and `refuses`; read when a plan needs them.
        programs: what must be on the PATH, or beside `python`; by the value of the option `runtime`, if it has one.
        tools: programs that stage 2 calls itself, on the PATH: `g++`, or `$CXX|g++`, what the environment variable
            names, else g++.
        python: the interpreter of another environment that holds the engine's library; its option `python`.
        refuses: combinations that cannot work.
        binds: distributions that must have the same version where the engine runs as where it was built.
        min_driver: the oldest NVIDIA driver that runs it.
        runtime: what a loaded engine takes.
    """

    targets: tuple[str, ...]
    target_requires: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    algorithms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hardware: tuple[str, ...] = ("target",)
    combines: bool = False
    needs_gpu: bool = False
    details: str = ""
    programs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tools: tuple[str, ...] = ()
    python: str = ""
    refuses: tuple[Refusal, ...] = ()
    binds: tuple[str, ...] = ()
    min_driver: str = ""
    runtime: Costs = Costs()

    def problems(self) -> list[str]:
        """See `Entry.problems`."""
        found = super().problems()
        found += [] if self.targets else ["targets: names none"]
        for target, requirements in self.target_requires.items():
            found += _no_requirements(f"target_requires.{target}", requirements)
        found += [f"binds: {name!r} is no distribution's name" for name in self.binds if not is_name(name)]
        if self.min_driver and not re.fullmatch(r"\d+(\.\d+)*", self.min_driver, re.ASCII):
            found.append(f"min_driver: {self.min_driver!r} is no version")
        return found + (["runtime: no cost is below 0"] if min(vars(self.runtime).values()) < 0 else [])


@dataclass(frozen=True)
class Defaults:
    """What is chosen when the request leaves it open.

    Attributes:
        precision: the name of one.
        engines: in order of preference; the first that can be built here is taken.
        references: in order of preference.
    """

    precision: str = "fp16"
    engines: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gate:
    """How builds are judged: options of the validation itself, `gate.…` in `--set`."""

    options: Mapping[str, Option] = field(default_factory=dict)


def _no_range(field_name: str, text: str) -> list[str]:
    return [f"{field_name}: {text!r} is no version range, such as >=1.2,<2"] if text and not is_range(text) else []


def _no_requirements(field_name: str, texts: Iterable[str]) -> list[str]:
    return [
        f"{field_name}: {text!r} is no requirement, such as onnx>=1.17" for text in texts if not is_requirement(text)
    ]


def _no_source(spec: str) -> str:
    from .sources.spec import parse

    try:
        parse(spec)
    except RequestError as error:
        return str(error).replace("\n", "; ")
    return ""
