"""`list`, `show`, `plugins`: what exists. Imports no plugin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import click

from .. import availability
from ..api import Setup
from ..entries import Engine, Model, Precision
from ..errors import RequestError, did_you_mean
from ..registry import Registry
from ..space import human_bytes
from ..types import StageName
from . import style
from .common import complete_ref, json_option, place_options, print_json, print_table, recipe_options

if TYPE_CHECKING:
    from ..decoder import Decoder
    from ..estimates import Needs
    from ..planning import Plan


#: Tokens in the cache for which memory is estimated where nothing else is said.
_TOKENS = 4096


@click.command("list")
@click.option("--model", help="only models whose name holds this")
@click.option("--ready", is_flag=True, help="only what can be built here and now")
@json_option
@place_options
def list_command(model: str | None, ready: bool, as_json: bool, setup: Setup) -> None:
    """Every model × precision × engine, whether it can be built here, and if not, why."""
    known = setup.registry.models.entries
    if model and not any(model in name for name in known):
        raise RequestError(f"no model's name holds {model!r}", did_you_mean(model, known))
    rows = [
        row
        for row in recipes(setup)
        if (not model or model in row["model"]) and (not ready or row["status"] == "ready")
    ]
    warn_of_problems(setup)
    if as_json:
        print_json({"schema": 1, "recipes": rows})
        return
    print_table(
        ("RECIPE", "TARGET", "STATUS", "OWNER", "WHY"),
        [
            (row["ref"], row["target"], "built" if row["built"] else row["status"], row["owner"], row["reason"])
            for row in rows
        ],
    )


def recipes(setup: Setup) -> Iterator[dict[str, Any]]:
    """One row a combination; the status is computed from this machine and from what the pair supports."""
    built = {(manifest.get("ref"), manifest.get("target")) for _, manifest in setup.store.artifacts("engines")}
    pairs = list(_pairs(setup))
    for model in setup.registry.models.entries.values():
        absent = _absent(setup, model)
        for precision, engine, target, status, reason in pairs:
            if model.family not in setup.registry.families.entries:
                status, reason = "unsupported", f"no family named {model.family!r}"
            elif status == "ready" and absent:
                status, reason = "missing", absent
            ref = f"{model.name}:{precision.name}@{engine.name}"
            yield {
                "ref": ref,
                "model": model.name,
                "family": model.family,
                "precision": precision.name,
                "engine": engine.name,
                "target": target,
                "owner": _owners(model.owner.package, precision.owner.package, engine.owner.package),
                "status": status,
                "reason": reason,
                "source": model.source[0],
                "built": (ref, target) in built,
            }


def _absent(setup: Setup, model: Model) -> str:
    """Why there is no checkpoint of this model here; empty if there is one."""
    try:
        return "" if setup.locate(model) else "checkpoint not fetched"
    except RequestError as error:
        return error.message


def _pairs(setup: Setup) -> Iterator[tuple[Precision, Engine, str, str, str]]:
    """Precision, engine, target, status, reason: what holds for every model."""
    for precision in setup.registry.precisions.entries.values():
        try:
            calibration = setup.registry.calibration_of(precision)
        except RequestError as error:
            yield from (
                (
                    precision,
                    engine,
                    availability.default_target(precision, engine, setup.facts),
                    "unsupported",
                    error.message,
                )
                for engine in setup.registry.engines.entries.values()
            )
            continue
        for engine in setup.registry.engines.entries.values():
            target = availability.example_target(precision, engine, setup.facts)
            reason = _why_not(setup.registry, precision, engine, target)
            lacking = availability.lacking(calibration, precision, engine, target, setup.facts)
            if reason:
                yield precision, engine, target, "unsupported", reason
            elif lacking:
                yield precision, engine, target, "missing", next(iter(lacking.values())).message
            else:
                default = availability.default_target(precision, engine, setup.facts)
                yield precision, engine, target, "ready", "" if target == default else f"with --target {target}"


def _why_not(registry: Registry, precision: Precision, engine: Engine, target: str) -> str:
    """Why a pair does not work, and the nearest that does, in a few words."""
    reason, _ = availability.unsupported(precision, engine, target)
    near = availability.alternatives(registry, precision, engine, target) if reason else []
    return f"{reason}: {' or '.join(near)}" if near else reason


def warn_of_problems(setup: Setup) -> None:
    """Say what is wrong with installed packages; it stops nobody else's builds."""
    for problem in setup.registry.problems:
        click.echo(f"{style('warning:', fg='yellow')} {problem.owner}: {problem.text}", err=True)
    said = "\n".join(problem.text for problem in setup.registry.problems)
    for names in setup.registry.kinds:
        for error in names.unusable.values():
            if error.message not in said:
                click.echo(f"{style('warning:', fg='yellow')} {error.message}", err=True)


@cache
def _owners(*packages: str) -> str:
    """The packages involved, ours named only if nobody else is."""
    names = dict.fromkeys(packages)
    others = [name for name in names if name != "engine-recipes"]
    return ", ".join(others or names)


@click.command("show")
@click.argument("ref", shell_complete=complete_ref)
@json_option
@recipe_options
def show_command(ref: str, as_json: bool, setup: Setup, choices: dict[str, Any]) -> None:
    """One recipe: source and revision, every setting and where it came from, what it needs, sizes expected."""
    plan = replace(setup, remember=False).plan(ref, **choices)
    data = describe(setup, plan)
    if as_json:
        print_json({"schema": 1, **data})
        return
    click.echo(style(data["ref"], bold=True) + f" for {data['target']}")
    source = data["source"]
    for name, value in (
        ("family", f"{data['family']}  (from {data['owners']['family']})"),
        ("license", data["license"] or "not stated"),
        ("source", " or ".join(source["specs"])),
        ("revision", source["revision"] or "-"),
        ("on disk", source["folder"] or "not fetched"),
        ("needs", ", ".join(data["requires"]) or "nothing more"),
        ("missing", ", ".join(data["missing"]) or "nothing"),
        ("sizes", ", ".join(f"{k} about {human_bytes(v)}" for k, v in data["sizes"].items()) or "not known"),
        ("memory", ", ".join(f"{k} about {human_bytes(v)}" for k, v in data["memory"].items()) or "not known"),
        ("running", _running(data["running"])),
    ):
        click.echo(f"  {name:<9} {value}")
    click.echo("  settings")
    unset = [row["key"] for row in data["settings"] if row["value"] == ""]
    for row in (row for row in data["settings"] if row["value"] != ""):
        click.echo(f"    {row['key']} = {row['value']}  ({row['origin']})  {row['help']}")
    if unset:
        click.echo(f"    and {len(unset)} that are not set: {', '.join(unset)}")


def describe(setup: Setup, plan: Plan) -> dict[str, Any]:
    """What `show` prints."""
    from .. import estimates

    measures = plan.calibration.requires if plan.calibration else ()
    engine = availability.requirements(plan.engine, plan.target)
    decoder = setup.decoder(plan)
    needs = estimates.estimate(
        plan.parameters, plan.precision, plan.engine, plan.calibration, decoder, plan.ranks, excluded=plan.excluded
    )
    requires = list(dict.fromkeys([*measures, *plan.precision.requires, *engine]))
    settings = [
        {"key": s.key, "value": s.value, "origin": s.origin, "help": s.help}
        for s in plan.settings.values()
        if s.value not in (math.inf, -math.inf)  # no limit
    ]
    return {
        "ref": str(plan.ref),
        "target": plan.target,
        "family": plan.family.name,
        "license": plan.model.license,
        "parameters": plan.model.parameters,
        "owners": {
            kind: str(entry.owner)
            for kind, entry in (
                ("model", plan.model),
                ("family", plan.family),
                *([("calibration", plan.calibration)] if plan.calibration else []),
                ("precision", plan.precision),
                ("engine", plan.engine),
            )
        },
        "source": {
            "specs": list(plan.model.source),
            "used": str(plan.located.source) if plan.located else None,
            "revision": plan.located.revision if plan.located else None,
            "folder": str(plan.located.folder) if plan.located else None,
        },
        "requires": requires,
        "missing": setup.facts.missing(requires),
        "sizes": sizes(needs, plan, decoder),
        "memory": {name: need.memory for name, need in needs.items() if need.memory},
        "running": running(plan, decoder),
        "settings": settings,
    }


def sizes(needs: Mapping[StageName, Needs], plan: Plan, decoder: Decoder | None) -> dict[str, int]:
    """Bytes to expect on disk; empty if the number of parameters is not known."""
    if not needs:
        return {}
    from .. import estimates

    engine = round(estimates.weight_bytes(plan.parameters, plan.precision, decoder, plan.excluded))
    return {"source": plan.parameters * 2, "checkpoint": needs["stage1"].disk, plan.engine.name: engine}


def running(plan: Plan, decoder: Decoder | None) -> dict[str, int]:
    """What the loaded engine takes, in bytes, with a full KV cache of so many tokens; empty if it is not known."""
    from .. import estimates

    options = plan.stage("stage2").options
    length = int(options.get("max_seq_len") or min(decoder.max_positions if decoder else _TOKENS, _TOKENS))
    tokens = length * int(options.get("max_batch_size") or 1)
    narrow = plan.settings.get("kv_cache")
    kv_bytes = 1 if narrow and narrow.value != "none" and plan.engine.needs_gpu else 2
    ranks = plan.ranks if plan.engine.needs_gpu else 1
    need = estimates.runtime(
        plan.parameters,
        plan.precision,
        plan.engine,
        tokens=tokens,
        decoder=decoder,
        kv_bytes=kv_bytes,
        ranks=ranks,
        excluded=plan.excluded,
    )
    found = {"memory": need.memory, "gpu_memory": need.gpu_memory}
    return {**{name: size for name, size in found.items() if size}, "tokens": tokens} if plan.parameters else {}


def _running(data: Mapping[str, int]) -> str:
    words = {"memory": "of memory", "gpu_memory": "of GPU memory"}
    sizes = ", ".join(f"about {human_bytes(data[name])} {text}" for name, text in words.items() if name in data)
    return f"{sizes}, with {data['tokens']:,} tokens in the cache" if data else "not known"
