"""What a package promises as a whole: a registry that can be read, modules that hold what it names, no costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from .. import combinations, stages
from ..entries import Engine, Family, Precision, StageEntry
from ..errors import did_you_mean
from .faults import Fault, expect
from .lab import Lab
from .processes import ask

#: The hooks that each kind of entry must have.
HOOKS = {
    "families": ("resolve_checkpoint",),
    "calibrations": ("calibrate",),
    "precisions": ("stage1",),
    "engines": ("stage2", "load_engine"),
    "references": ("load_source",),
}
_MOST_BYTES = 100_000  # of a fragment: parsing TOML takes about a millisecond for 10 kB


def its_registry_is_read_without_problems(lab: Lab, package: str) -> None:
    """What cannot be read is not there for users: nothing of it is listed, or the entry that is wrong is missing."""
    assert lab.owner
    problems = [problem.text for problem in lab.registry.problems if problem.owner == lab.owner]
    expect(not problems, "\n".join(problems))
    expect("api" in lab.fragment, f"{lab.owner.path} does not say which plugin API it is written for: add `api = 1`")
    for names in lab.registry.kinds:
        for name, error in names.unusable.items():
            expect(name not in lab.fragment.get(names.kind, {}), f"{error}")


def its_modules_have_the_hooks_that_they_need(lab: Lab, package: str) -> None:
    """A module that cannot be imported, or lacks its hook, fails every build that names it."""
    for (kind, name), answer in imported(lab).items():
        who = f"{kind}.{name}"
        expect(not answer["error"], f"{who}: {answer['error']}")
        lacks = [hook for hook in HOOKS[kind] if hook not in answer["hooks"]]
        expect(not lacks, f"{who}: its module has no `@hookimpl def {lacks[:1] and lacks[0]}`")


def importing_its_modules_loads_nothing_heavy(lab: Lab, package: str) -> None:
    """Every command that imports a plugin would wait seconds for libraries that it does not use."""
    for (kind, name), answer in imported(lab).items():
        heavy = ", ".join(answer["heavy"])
        expect(
            not heavy,
            f"{kind}.{name}: importing its module imports {heavy}. Import them inside the functions that need them"
            " (and under `if TYPE_CHECKING:` for annotations)",
        )


def listing_it_costs_one_small_file(lab: Lab, package: str) -> None:
    """`recipes list` must feel instant however many packages are installed: it imports none of them."""
    entries = _entries(lab)
    roots = {entry.module.partition(".")[0] for entry in entries.values()}
    if lab.owner:
        size = lab.owner.path.stat().st_size
        expect(size <= _MOST_BYTES, f"registry.toml has {size:,} bytes: move an engine's options to its `details`")
        roots.add(lab.owner.path.parent.name)
    roots.discard("engine_recipes")
    folder = str(lab.owner.path.parent.resolve()) if lab.owner and lab.owner.path.parent.name in roots else ""
    answer = ask(lab, "list_names", {"folders": [folder] if folder else [], "roots": sorted(roots)})
    expect(answer["code"] == 0, f"`recipes list` ends with exit code {answer['code']}")
    expect(not answer["imported"], f"`recipes list` imports {', '.join(answer['imported'])}")
    others = [path for path in answer["opened"] if not path.endswith("registry.toml")]
    expect(not others, f"`recipes list` reads {', '.join(others)}")
    expect(len(answer["opened"]) <= 1, f"`recipes list` reads its registry.toml {len(answer['opened'])} times")


def its_entries_say_what_users_need(lab: Lab, package: str) -> None:
    """`recipes show` and error messages are made from the entries: an option without help explains itself to nobody."""
    for (kind, name), entry in _entries(lab).items():
        if not isinstance(entry, StageEntry):
            continue
        options = (combinations.complete(entry) if isinstance(entry, Engine) else entry).options
        for option, allowed in options.items():
            expect(allowed.help, f"{kind}.{name}.options.{option} has no help: one line, what it does and its unit")
        expect(
            entry.install or not entry.requires,
            f"{kind}.{name} requires {', '.join(entry.requires)} and has no `install`: what to run when it is missing",
        )
        if isinstance(entry, Precision):
            for metric in (*entry.limits, *entry.small_limits):
                expect(metric in lab.registry.metrics.entries, f"{kind}.{name}: there is no metric {metric}")
            lab.registry.calibration_of(entry)


def _of_installed(promise: Callable[[Lab, str], None]) -> Callable[[Lab, str], None]:
    """The promise, which a package that is not there does not keep."""

    @functools.wraps(promise)
    def check(lab: Lab, package: str) -> None:
        names = [owner.package for owner in (*lab.registry.owners, *(p.owner for p in lab.registry.problems))]
        expect(
            lab.owner is not None,
            f"no package {package} is installed here that advertises a registry ({did_you_mean(package, names)}): run"
            " `pip install -e .` in its folder, and see that its pyproject.toml has"
            ' [project.entry-points."engine_recipes"] NAME = "TOP_LEVEL_PACKAGE"',
        )
        promise(lab, package)

    return check


PROMISES: Sequence[Callable[[Lab, str], None]] = [
    _of_installed(promise)
    for promise in (
        its_registry_is_read_without_problems,
        its_modules_have_the_hooks_that_they_need,
        importing_its_modules_loads_nothing_heavy,
        listing_it_costs_one_small_file,
        its_entries_say_what_users_need,
    )
]


def _entries(lab: Lab) -> dict[tuple[str, str], Family | StageEntry]:
    """What has a module: (kind, name) -> entry."""
    found = {}
    for kind, names in lab.names().items():
        if kind in HOOKS:
            entries = next(of.entries for of in lab.registry.kinds if of.kind == kind)
            found.update({(kind, name): entries[name] for name in names})
    return found


def imported(lab: Lab) -> dict[tuple[str, str], dict[str, Any]]:
    """What importing each module in a fresh process came to."""
    if "imported" not in lab.memory:
        entries = _entries(lab)
        providers = [asdict(stages.provider(_KINDS[kind], entry)) for (kind, _), entry in entries.items()]
        lab.memory["imported"] = dict(zip(entries, _import(lab, providers), strict=True))
    found: dict[tuple[str, str], dict[str, Any]] = lab.memory["imported"]
    return found


def _import(lab: Lab, providers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    try:
        return list(ask(lab, "import_modules", {"providers": providers}, limit=60))
    except Fault as fault:  # one of them ended the process
        if len(providers) > 1:
            return [_import(lab, [one])[0] for one in providers]
        error = f"{fault}\nImporting a module must take no time and start nothing"
        return [{"error": error, "heavy": [], "hooks": []}]


_KINDS = {
    "families": "family",
    "calibrations": "calibration",
    "precisions": "precision",
    "engines": "engine",
    "references": "reference",
}
