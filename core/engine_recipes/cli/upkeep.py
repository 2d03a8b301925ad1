"""`engines`, `rm`, `gc`: what has been built, and getting rid of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from .. import gate
from ..api import Setup
from ..errors import MachineError, RequestError, did_you_mean
from ..space import human_bytes
from ..store import Store, size_of
from ..types import Report, Verdict
from .common import confirm, json_option, place_options, print_json, print_table, yes_option

_STATUS: dict[Verdict, str] = {
    "not run": "unverified",
    "fail": "rejected",
    "warn": "verified, warnings",
    "pass": "verified",
}


@click.command("engines")
@json_option
@place_options
def engines_command(as_json: bool, setup: Setup) -> None:
    """What has been built, with its verdict. A star marks what the plain name points to."""
    store = setup.store
    rows = [_row(store, folder, manifest) for folder, manifest in store.artifacts("engines")]
    if as_json:
        print_json({"schema": 1, "workspace": str(store.workspace), "engines": rows})
        return
    if not rows:
        click.echo(f"nothing built yet in {store.workspace}", err=True)
        return
    print_table(
        ("ENGINE", "RECIPE", "TARGET", "SIZE", "STATUS", "BUILT", "SET"),
        [
            (
                r["name"] + (" *" if r["published"] else ""),
                r["ref"],
                r["target"],
                human_bytes(r["bytes"]),
                r["status"],
                r["created"],
                " ".join(f"{key}={value}" for key, value in r["set"].items()),
            )
            for r in rows
        ],
    )
    click.echo(f"in {store.workspace / 'engines'}", err=True)


def _row(store: Store, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    report = gate.read(folder) or Report()
    return {
        "name": folder.name,
        "ref": manifest.get("ref", ""),
        "target": manifest.get("target", ""),
        "set": manifest.get("set", {}),
        "status": "accepted" if report.accepted else _STATUS[report.verdict],
        "verdict": report.verdict,
        "accepted": report.accepted or None,
        "published": store.is_published(folder),
        "bytes": size_of(folder),
        "created": manifest.get("created", ""),
        "path": str(folder),
    }


@click.command("rm")
@click.argument("name")
@yes_option
@place_options
def rm_command(name: str, yes: bool, setup: Setup) -> None:
    """Remove one engine, by its folder name as `recipes engines` shows it, or by the plain name."""
    store = setup.store
    folders = {folder.name: folder for folder, _ in store.artifacts("engines")}
    folder = folders.get(name) or folders.get((store.workspace / "engines" / name).resolve().name)
    if folder is None:
        raise RequestError(f"no engine named {name!r}", did_you_mean(name, folders))
    if not confirm(f"remove {folder.name} ({human_bytes(size_of(folder))})?", yes):
        return
    if store.is_locked("engines", folder.name):
        raise MachineError(f"{folder.name} is being built or judged", "wait for that, or stop it")
    gate.withdraw(store, folder)
    _remove(folder)
    click.echo(f"removed {folder}", err=True)


def _remove(folder: Path) -> None:
    """Rename first, so that a kill halfway leaves nothing that looks whole."""
    if folder.is_symlink():
        folder.unlink()
        return
    doomed = folder.with_name(f".tmp-{folder.name.removeprefix('.tmp-')}-{os.urandom(4).hex()}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        raise MachineError(
            f"{folder} cannot be removed: {error.strerror}", "look at its owner and permissions"
        ) from None


@click.command("gc")
@click.option("--dry-run", is_flag=True, help="only say what would go")
@json_option
@yes_option
@place_options
def gc_command(dry_run: bool, as_json: bool, yes: bool, setup: Setup) -> None:
    """Remove incomplete folders, and what no engine was built from: checkpoints, calibrations, baselines, sources."""
    doomed = unreferenced(setup)
    total = sum(size for _, size in doomed)
    if not as_json:
        for path, size in doomed:
            click.echo(f"{human_bytes(size):>9}  {path}")
    gone = bool(doomed) and not dry_run and confirm(f"remove {len(doomed)} folders, {human_bytes(total)}?", yes)
    if gone:
        for path, _ in doomed:
            _remove(path)
    if as_json:
        rows = [{"path": str(path), "bytes": size} for path, size in doomed]
        print_json({"schema": 1, "removed": gone, "bytes": total, "folders": rows})
    elif not doomed:
        click.echo("nothing to remove", err=True)


def unreferenced(setup: Setup) -> list[tuple[Path, int]]:
    """What can go: garbage; then what no engine, and no checkpoint that stays, has as an input."""
    store = setup.store
    doomed = store.garbage()
    if store.is_busy():  # a build may be about to use what no engine refers to yet
        click.echo("something is being built: what it may be about to use stays", err=True)
        return [(path, size_of(path) if not path.is_symlink() else 0) for path in doomed]
    wanted = _inputs([manifest for _, manifest in store.artifacts("engines")])
    wanted |= {key for folder, manifest in store.artifacts("sources") for key in _downloaded(folder, manifest)}
    for place in ("checkpoints", "calibrations", "sources"):
        doomed += [
            folder for folder, manifest in store.artifacts(place) if manifest.get("key", folder.name) not in wanted
        ]
    # an engine does not name the baseline it was judged by: one of its own source will serve the next as well
    doomed += [folder for folder, manifest in store.artifacts("baselines") if not _inputs([manifest]) & wanted]
    return [(path, size_of(path) if not path.is_symlink() else 0) for path in doomed]


def _inputs(manifests: list[dict[str, Any]]) -> set[str]:
    return {artifact["key"] for manifest in manifests for artifact in manifest.get("inputs", [])}


def _downloaded(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """A fetched checkpoint has no key. It stays: getting it back would cost the network."""
    return set() if "key" in manifest else {folder.name}
