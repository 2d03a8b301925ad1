"""Where the cases of one package work: a workspace of its own, tiny models, and builds that they share."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import shutil
import site
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import runner
from ..api import Setup
from ..decoder import Decoder
from ..entries import Family, Owner
from ..errors import RecipesError
from ..events import Event
from ..host import Host
from ..planning import Plan
from ..registry import Registry
from ..requirements import canonical
from ..runner import Build, How
from ..stages import provider
from ..types import StageContext, StageName, Value
from . import odd
from .building import Recipe, build, ignore, load, plan
from .faults import Fault, Skip
from .tiny import tiny_config, write_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from ..api import Loaded

#: Tiny models that precisions and engines are tried on, as a family that is installed describes them. Two say a second
#: thing: heads that share no key/value head, or all the same one.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "plain": tiny_config(),
    "biased": tiny_config("Qwen2ForCausalLM", num_key_value_heads=4),
    "normed": tiny_config("Qwen3ForCausalLM"),
    "tied": tiny_config(tie_word_embeddings=True, torch_dtype="bfloat16"),
}
#: Models of which an engine must compute or refuse what they say. The rope is scaled where few tokens show it.
ODD: Mapping[str, Mapping[str, Any]] = {
    "with heads wider than hidden_size / heads": tiny_config(head_dim=64),
    "with llama3's rope_scaling": tiny_config(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    ),
    "with 251 words": tiny_config(vocab_size=251),
    "with biases in all linear layers, and one key/value head": tiny_config(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1
    ),
    "with embedding_scale 8": tiny_config(odd.ARCHITECTURE, embedding_scale=8.0),
    "with the activation gelu_pytorch_tanh": tiny_config(odd.ARCHITECTURE, hidden_act="gelu_pytorch_tanh"),
    "with rotary_size 16 of 32": tiny_config(odd.ARCHITECTURE, partial_rotary_factor=0.5),
}
#: Marks every process that a case starts, in its environment: what pytest's own process starts else is not a plugin's.
MARK = "ENGINE_RECIPES_CONFORMANCE"


@functools.cache
def session() -> Path:
    """A folder for all labs of this process; removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="engine-recipes-conformance-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class Lab:
    """See `conformance` for the arguments.

    Attributes:
        folder: of this lab: `workspace`, `models`, an empty folder to stand in, and one for temporary files.
    """

    def __init__(
        self,
        package: str,
        configs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
        settings: Mapping[str, Mapping[str, Value]] | None = None,
        tolerance: Mapping[str, float] | None = None,
    ) -> None:
        self.package = package
        self.configs, self.settings, self.tolerance = configs or {}, settings or {}, tolerance or {}
        self.memory: dict[Any, Any] = {}  # what cases share
        self.warnings: list[str] = []  # of all builds

    @cached_property
    def folder(self) -> Path:
        """Made when first needed."""
        return Path(tempfile.mkdtemp(dir=session()))

    def place(self, name: str) -> Path:
        """A folder of that name in the lab."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def world(self) -> Iterator[None]:
        """Nobody's own registry, settings or current folder take part; warnings of libraries do not matter."""
        kept, before = dict(os.environ), Path.cwd()
        for name in [name for name in os.environ if name.startswith("RECIPES_")]:
            del os.environ[name]
        os.environ["PYTHONUSERBASE"] = site.getuserbase()  # packages may lie there; the home is another one
        os.environ.update(XDG_CONFIG_HOME=str(self.place("config")), TMPDIR=str(self.place("temporary")))
        os.environ.update(HOME=str(self.place("home")), XDG_CACHE_HOME=str(self.place("home/.cache")))
        os.environ.update(HF_HUB_OFFLINE="1", RECIPES_IMPORT_SECONDS="10")
        os.chdir(self.place("here"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            os.chdir(before)
            os.environ.clear()
            os.environ.update(kept)

    # --- names --------------------------------------------------------------------------------------------------

    @cached_property
    def setup(self) -> Setup:
        """The registry of what is installed and of the suite's own family, this machine, and the lab's workspace."""
        setup = Setup(self.folder / "workspace")
        families, owner = setup.registry.families, setup.registry.owners[0]
        own = odd.family(owner)
        known = replace(families, entries={**families.entries, own.name: own})
        setup.__dict__["registry"] = replace(setup.registry, families=known)
        return setup

    @property
    def registry(self) -> Registry:
        """All names."""
        return self.setup.registry

    @cached_property
    def owner(self) -> Owner | None:
        """The package; None if it is not installed or does not say where its registry is."""
        owners = [*self.registry.owners, *(problem.owner for problem in self.registry.problems)]
        wanted = canonical(self.package)
        return next((owner for owner in owners if canonical(owner.package) == wanted), None)

    @cached_property
    def fragment(self) -> Mapping[str, Any]:
        """The package's registry file; empty if it cannot be read."""
        try:
            return tomllib.loads(self.owner.path.read_text(encoding="utf-8")) if self.owner else {}
        except (OSError, ValueError):
            return {}

    def names(self) -> dict[str, list[str]]:
        """Kind -> names of the package that can be used; what cannot is a case of the package itself."""
        tables = {kind: table for kind, table in self.fragment.items() if isinstance(table, Mapping)}
        usable: dict[str, Sequence[str]] = {"aliases": list(self.registry.aliases)}
        for names in self.registry.kinds:
            usable[names.kind] = [name for name, entry in names.entries.items() if entry.owner == self.owner]
        return {kind: [name for name in tables[kind] if name in usable.get(kind, ())] for kind in tables}

    def is_sound(self) -> bool:
        """Whether the package is there, and all that it says can be used."""
        wrong = [problem for problem in self.registry.problems if problem.owner == self.owner]
        return bool(self.owner and self.fragment and not wrong)

    def given(self, name: str) -> dict[str, str]:
        """The settings for an entry's builds, as `--set` has them."""
        values = self.settings.get(name, {})
        return {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}

    # --- models -------------------------------------------------------------------------------------------------

    def family(self, name: str) -> tuple[Family, Sequence[Mapping[str, Any]]]:
        """A family of the package and the configs for it."""
        if not self.configs.get(name):
            raise Fault(
                f'no config to try it with: give conformance(…, configs={{"{name}": [CONFIG]}}), CONFIG being the'
                " config.json of a tiny model; engine_recipes.testing.tiny_config makes one of a Llama-like model"
            )
        return self.registry.families[name], self.configs[name]

    def describe(self, family: Family, config: Mapping[str, Any]) -> Decoder:
        """What the family says the config is."""
        who = provider("family", family)
        context = StageContext("./model", "resolve", {}, (), self.place("described"))
        return Host([who]).resolve_checkpoint(who, context, config)

    def model(self, family: Family, config: Mapping[str, Any]) -> Path:
        """A tiny checkpoint with this config."""
        text = json.dumps([family.name, config], sort_keys=True)
        folder = self.folder / "models" / f"tiny-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
        if not folder.exists():
            write_checkpoint(folder, config, self.describe(family, config))
        return folder

    def vocabulary(self, folder: Path) -> int:
        """How many words a tiny checkpoint has."""
        return int(self.config(folder)["vocab_size"])

    def config(self, folder: Path) -> dict[str, Any]:
        """The `config.json` of a tiny checkpoint."""
        found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return found

    def models(self) -> dict[str, tuple[Path, Family]]:
        """Tiny models that families installed here describe: what they are -> folder and family."""
        found = self._described(MODELS)
        if not found:
            raise Skip("no installed family knows one of the tiny models")
        return found

    def odd_models(self) -> dict[str, tuple[Path, Family]]:
        """Tiny models that say what few say."""
        return self._described(ODD)

    def _described(self, configs: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Path, Family]]:
        """Those of the models whose architecture a family knows."""
        found = {}
        for what, config in configs.items():
            with suppress(RecipesError):
                family = self.registry.family_of(config["architectures"][0])
                found[what] = (self.model(family, config), family)
        return found

    def all_models(self) -> dict[Path, int]:
        """Every tiny checkpoint that cases of this package may want, and its vocabulary's size."""
        names, found = self.names(), []
        for name in names.get("families", ()):
            found += [(self.registry.families[name], config) for config in self.configs.get(name, ())]
        if names.get("precisions") or names.get("engines") or names.get("references"):
            found += [(family, MODELS[what]) for what, (_, family) in self.models().items()]
        if names.get("engines"):
            found += [(family, ODD[what]) for what, (_, family) in self.odd_models().items()]
        sizes = {}
        for family, config in found:
            with suppress(Exception):  # its own case says what is wrong with it
                sizes[self.model(family, config)] = int(config["vocab_size"])
        return sizes

    # --- builds -------------------------------------------------------------------------------------------------

    def plan(self, recipe: Recipe, workspace: Path | None = None) -> Plan:
        """What building it would do."""
        setup = self.setup if workspace is None else replace(self.setup, workspace=workspace)
        return plan(recipe, setup, self.setup)

    def build(
        self, recipe: Recipe, until: StageName = "stage2", *, workspace: Path | None = None, accept: str = ""
    ) -> Build:
        """Build it, in the lab's workspace unless another is given. Raises the RecipesError of a build that fails."""
        setup = self.setup if workspace is None else replace(self.setup, workspace=workspace)
        with self.marked():
            return build(recipe, setup, until, self.setup, accept, self._listen)

    @contextmanager
    def marked(self) -> Iterator[None]:
        """What is started meanwhile is known as this lab's, see `processes.left_over`."""
        os.environ[MARK] = str(self.folder)
        try:
            yield
        finally:
            del os.environ[MARK]

    def _listen(self, event: Event) -> None:
        if event["event"] == "warn":
            self.warnings.append(event["text"])

    def attempt(self, recipe: Recipe, workspace: Path) -> Build:
        """Build the engine in another workspace; `error` says why it failed, the last of `stages` where."""
        setup = replace(self.setup, workspace=workspace)
        with self.marked():
            return runner.run(plan(recipe, setup, self.setup), setup.store, How(until="stage2"), ignore)

    def load(self, recipe: Recipe) -> Loaded:
        """The built engine, loaded as `recipes run` does."""

        folder = self.build(recipe).path("stage2")
        assert folder is not None
        return load(self.plan(recipe), folder)

    def runnable(self, recipe: Recipe) -> Recipe:
        """The same on an engine that this machine builds and runs: the recipe's, else the first there is.

        Raises:
            Skip: there is none.
        """
        names = [n for n in self.registry.defaults.engines if n in self.registry.engines.entries]
        names += [n for n in self.registry.engines.entries if n not in names]
        why = "no engine is installed"
        for name in [recipe.engine] if recipe.engine else names:
            for target in dict.fromkeys((recipe.target, "cpu", None)):
                tried = replace(recipe, engine=name, target=target, settings={**self.given(name), **recipe.settings})
                try:
                    planned = self.plan(tried)
                except RecipesError as error:
                    why = error.message
                    continue
                why = planned.blocked.message if planned.blocked else planned.cannot_run
                if not why:
                    return tried
        raise Skip(f"nothing here runs it: {why}")
