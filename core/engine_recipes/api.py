"""What commands and scripts call: plan, build, load. Puts registry, facts, sources and store together."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import availability, facts as machine, refs, registry, sources
from .entries import Model
from .errors import MachineError, RequestError
from .events import Event
from .facts import Facts
from .registry import Registry
from .sources import Located
from .store import Store, default_workspace, read_manifest
from .types import DECODER, Artifact, Provider, Ref, Runtime, StageName

if TYPE_CHECKING:
    from .decoder import Decoder
    from .planning import Plan
    from .runner import Build, How
    from .tokenizer import Tokenizer


def _ignore(event: Event) -> None:
    """Listens to nothing."""


@dataclass(frozen=True)
class Setup:
    """A registry, a machine and a workspace: everything a command works on. Reads each of them when first used.

    Attributes:
        workspace: where builds are kept.
        project: a registry file; None is `./registry.toml`, if there is one.
        remember: whether digests of local folders may be written to the workspace.
    """

    workspace: Path
    project: Path | None = None
    remember: bool = True

    @cached_property
    def registry(self) -> Registry:
        """All names."""
        return registry.load(self.project)

    @cached_property
    def facts(self) -> Facts:
        """This machine, with the versions of all that any entry requires."""
        wanted = [r for entry in self.registry.stage_entries for r in entry.requires]
        wanted += [r for e in self.registry.engines.entries.values() for rs in e.target_requires.values() for r in rs]
        engines = self.registry.engines.entries.values()
        programs = {name for engine in engines for names in engine.programs.values() for name in names}
        programs |= {availability.tool_name(tool) for engine in engines for tool in engine.tools}
        return machine.read(wanted, programs)

    @cached_property
    def store(self) -> Store:
        """The workspace."""
        return Store(self.workspace)

    def locate(self, model: Model) -> Located | None:
        """The model's checkpoint, if it is on this machine."""
        located = sources.locate(model.source, self.store.workspace)
        return replace(located, remember=self.remember) if located else None

    def model(self, ref: Ref) -> Model:
        """The entry for a reference; made on the spot for a folder or a Hub id, its family found by architecture.

        Raises:
            RequestError: unknown name, no such folder, no family for it.
            MachineError: a Hub id that is not on this machine.
        """
        if not (refs.is_folder(ref.model) or refs.is_hub_id(ref.model)):
            return self.registry.models[ref.model]
        from .hf_config import architecture_of  # listing needs none of it

        folder = refs.is_folder(ref.model)
        path = Path(os.path.expanduser(ref.model))
        spec = f"file:{path.absolute()}" if folder else f"hf:{ref.model}"
        located = sources.locate([spec], self.store.workspace)
        if located is None and folder:
            what = "is a file, not a folder" if path.is_file() else "does not exist"
            raise RequestError(f"{ref.model} {what}", "give a folder with config.json and *.safetensors")
        if located is None:
            here = f", or write ./{ref.model} for the folder here" if Path(ref.model).is_dir() else ""
            raise MachineError(f"{ref.model} is not on this machine", f"run `recipes fetch {ref.model}`{here}")
        family = self.registry.family_of(architecture_of(_config(located.folder)))
        return Model(name=ref.model, owner=family.owner, family=family.name, source=(spec,))

    def plan(
        self,
        text: str,
        *,
        engine: str | None = None,
        target: str | None = None,
        settings: Mapping[str, str] | None = None,
        ready: Mapping[StageName, Artifact] | None = None,
    ) -> Plan:
        """The plan for a reference as written. `ready` is what is used as it is, see `planning.make`."""
        ref = self.registry.expand(refs.parse(text))
        if engine:
            if ref.engine not in (None, engine):
                raise RequestError(f"{text} names engine {ref.engine}, --engine says {engine}", "name one of them")
            ref = Ref(ref.model, ref.precision, engine)
        model = self.model(ref)
        from . import planning

        return planning.make(
            ref, self.registry, self.facts, model, self.locate(model), target=target, settings=settings, ready=ready
        )

    def fetch(self, model: Model, confirm: Callable[[str, int | None], bool]) -> Located:
        """Get a model's checkpoint from the first source that has it."""
        return sources.fetch(model.source, self.store.workspace, confirm=confirm)

    def engine(self, plan: Plan) -> Path:
        """The built engine for a plan: this very recipe's, else the newest that passed under the plain name.

        Raises:
            MachineError: there is none; the hint is the command that builds it.
        """
        slot = plan.stage("stage2").slot
        folder = self.store.get(slot) if slot else None
        if folder is None:
            label = f"{refs.label(plan.model.name)}-{plan.precision.name}-{plan.engine.name}-{plan.target}"
            plain = self.store.workspace / "engines" / label
            manifest = read_manifest(plain) if slot is None else None
            folder = plain.resolve() if manifest and manifest.get("ref") == str(plan.ref) else None
        if folder is None:
            damaged = slot is not None and self.store.path(slot).exists()
            state = f"was built and is damaged: {self.store.path(slot)}" if slot and damaged else "is not built"
            raise MachineError(f"{plan.ref} for {plan.target} {state}", f"run `recipes build {plan.arguments}`")
        return folder

    def usable(self, plan: Plan) -> Path:
        """The built engine for a plan, if what runs it is here as well.

        Raises:
            MachineError: there is none, or this machine has not the packages, the versions or the GPU that it needs.
        """
        from . import portability

        folder = self.engine(plan)
        missing = self.facts.missing(availability.requirements(plan.engine, plan.target))
        if missing:
            raise MachineError(f"{plan.engine.name} needs {self.facts.described(missing)}", plan.engine.install)
        foreign = portability.check(read_manifest(folder) or {}, self.facts, plan.engine, self.registry)
        if foreign:
            raise foreign
        return folder

    def missing(self, plan: Plan, until: StageName = "validate") -> list[StageName]:
        """The stages of a plan that have to run, up to one of them."""
        from . import runner, stages

        names = stages.STAGES[: stages.STAGES.index(until) + 1]
        engine = runner.status(plan, plan.stage("stage2"), self.store)
        return [s.name for s in plan.stages if s.name in names and not runner.status(plan, s, self.store, engine)]

    def short(self, plan: Plan, until: StageName = "validate") -> MachineError | None:
        """What stages that have to run need and this machine has not, by estimate; None if all fits."""
        from . import estimates

        missing = self.missing(plan, until)
        needs = estimates.estimate(
            plan.parameters,
            plan.precision,
            plan.engine,
            plan.calibration,
            self.decoder(plan),
            plan.ranks,
            bool(self.facts.gpus),
            plan.excluded,
        )
        needs = {name: need for name, need in needs.items() if name in missing}
        return estimates.short(str(plan.ref), needs, self.facts, self.store.workspace)

    def decoder(self, plan: Plan) -> Decoder | None:
        """What the model is, if that was found out before."""
        from .decoder import Decoder

        slot = plan.stage("resolve").slot
        folder = self.store.get(slot) if slot else None
        return Decoder.read(folder / DECODER) if folder else None


def open_setup(workspace: str | Path | None = None, project: str | Path | None = None) -> Setup:
    """Everything a command works on.

    Args:
        workspace: default `RECIPES_WORKSPACE`, else the user data directory.
        project: a registry file; default `./registry.toml`, if there is one.
    """
    return Setup(Path(workspace) if workspace else default_workspace(), Path(project) if project else None)


def plan(ref: str, *, workspace: str | Path | None = None, **choices: Any) -> Plan:
    """What `build` would do for a reference.

    Args:
        ref: `MODEL[:PRECISION][@ENGINE]`.
        workspace: default `RECIPES_WORKSPACE`, else the user data directory.
        choices: `engine`, `target`, `settings` (option -> text, as in `--set`).

    Raises:
        RecipesError: see the exit codes; `plan.blocked` holds what only this machine lacks.
    """
    return open_setup(workspace).plan(ref, **choices)


def build(
    ref: str,
    *,
    workspace: str | Path | None = None,
    how: How | None = None,
    listen: Callable[[Event], None] = _ignore,
    **choices: Any,
) -> Build:
    """Build one engine and judge it; what is there already is reused.

    Args:
        ref: `MODEL[:PRECISION][@ENGINE]`.
        workspace: default `RECIPES_WORKSPACE`, else the user data directory.
        how: where to stop, whether to validate, whether to build again.
        listen: gets progress events.
        choices: as for `plan`.

    Raises:
        RecipesError: it does not fit on this machine (see `How.force`), a stage failed, or the gate rejected the
            engine.
    """
    from . import runner

    setup, how = open_setup(workspace), how or runner.How()
    chosen = setup.plan(ref, **choices)
    too_small = None if how.force or chosen.unavailable else setup.short(chosen, how.until)
    if too_small:
        raise too_small
    result = runner.run(chosen, setup.store, how, listen)
    if result.error:
        raise result.error
    return result


@dataclass(frozen=True)
class Loaded:
    """An engine ready to generate. `runtime` works on ids, `tokenizer` turns them into text and back.

    Attributes:
        folder: of the engine.
        manifest: what its `manifest.json` says: the reference, options, versions and inputs that it was built with.
    """

    folder: Path
    runtime: Runtime
    tokenizer: Tokenizer
    manifest: Mapping[str, Any]


def load(ref: str | Plan, *, workspace: str | Path | None = None, **choices: Any) -> Loaded:
    """Load a built engine.

    Raises:
        MachineError: it is not built, or its engine's packages are missing.
        StageFailed: the engine cannot load it.
    """
    setup = open_setup(workspace)
    return load_plan(setup, setup.plan(ref, **choices) if isinstance(ref, str) else ref)


def load_plan(setup: Setup, chosen: Plan, options: Mapping[str, Any] | None = None) -> Loaded:
    """Load the engine of a plan. Its own errors are StageFailed, also later, when it generates."""
    from .guard import Guarded

    stage = chosen.stage("stage2")
    if chosen.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = chosen.gpus  # nothing of CUDA has been loaded in this process yet
    loaded = load_folder(setup.usable(chosen), stage.provider, {**stage.options, **(options or {})})
    return replace(loaded, runtime=Guarded(loaded.runtime, stage.provider))


def load_folder(folder: Path, provider: Provider, options: Mapping[str, Any] | None = None) -> Loaded:
    """Load an engine folder with the engine that made it. The runtime is the engine's own, and so are its errors."""
    from .guard import blamed
    from .host import Host
    from .tokenizer import Tokenizer

    with blamed(provider, f"{provider} cannot load {folder.name}", "build it again with --force"):
        runtime = Host([provider]).load_engine(provider, folder, dict(options or {}))
    return Loaded(folder, runtime, Tokenizer.load(folder), read_manifest(folder) or {})


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RequestError(
            f"{folder / 'config.json'} cannot be read: {reason}", "a checkpoint folder in Hugging Face layout is needed"
        ) from None
    if not isinstance(config, dict):
        raise RequestError(f"{folder / 'config.json'} holds no object", "download or copy the model again")
    return config


__all__: Sequence[str] = ("Loaded", "Setup", "build", "load", "load_folder", "load_plan", "open_setup", "plan")
