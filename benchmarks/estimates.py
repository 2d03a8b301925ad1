"""What `estimates` says a stage takes against what it took: memory at the peak, and bytes on disk.

    recipes build smollm2-135m:fp8@onnxruntime && python benchmarks/estimates.py [WORKSPACE]

Reads the manifests of everything that was built in a workspace. Ratio: estimate / measured, so above 1 the estimate is
on the safe side. The estimate is the one that is made before anything has been resolved: from the registry's number of
parameters, without the decoder; `disk*` is the same with the decoder.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_recipes import Decoder, refs
from engine_recipes.estimates import Needs, estimate
from engine_recipes.registry import Registry, load
from engine_recipes.space import human_bytes
from engine_recipes.store import default_workspace, read_manifest, size_of
from engine_recipes.types import DECODER


@dataclass(frozen=True)
class Stage:
    """One artifact of a workspace: what it took, and what was estimated without and with the decoder. Bytes."""

    name: str
    parameters: int
    memory: int
    disk: int
    rough: Needs
    exact: Needs


def stages(workspace: Path, registry: Registry) -> Iterator[Stage]:
    """Everything that was built and whose model is known."""
    for place in ("calibrations", "checkpoints", "engines"):
        for folder in sorted((workspace / place).glob("*/")):
            manifest = read_manifest(folder)
            if manifest and not folder.is_symlink():
                yield from _stage(folder, manifest, registry)


def _stage(folder: Path, manifest: dict[str, Any], registry: Registry) -> Iterator[Stage]:
    decoder = _decoder(manifest)
    if decoder is None:
        return
    ref = refs.parse(manifest["ref"])
    precision, engine = registry.precisions[ref.precision or ""], registry.engines[ref.engine or ""]
    calibration = registry.calibration_of(precision)
    model = registry.models.entries.get(ref.model)
    parameters = model.parameters if model else decoder.parameters
    name = manifest["stage"]
    what = {"calibrate": precision.calibration, "stage1": precision.name, "stage2": f"{precision.name}@{engine.name}"}
    yield Stage(
        f"{name} {what[name]}",
        parameters,
        manifest["peak_rss_bytes"],
        size_of(folder),
        estimate(parameters, precision, engine, calibration)[name],
        estimate(parameters, precision, engine, calibration, decoder)[name],
    )


def _decoder(manifest: dict[str, Any]) -> Decoder | None:
    """The model, from what the resolve stage left."""
    for given in manifest["inputs"]:
        if (Path(given["path"]) / DECODER).is_file():
            return Decoder.read(Path(given["path"]) / DECODER)
    return None


def main() -> None:
    """Print one line a kind of stage and model: medians of what was measured, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, nargs="?", default=default_workspace())
    workspace = parser.parse_args().workspace
    found = defaultdict(list)
    for stage in stages(workspace, load()):
        found[stage.name, stage.parameters].append(stage)
    if not found:
        parser.error(f"nothing has been built in {workspace}")
    row = "{:<28} {:>10} {:>6} {:>9} {:>6} {:>9} {:>6} {:>6}".format
    print(row("stage", "parameters", "builds", "memory", "ratio", "disk", "ratio", "disk*"))
    for (name, parameters), group in sorted(found.items()):
        memory = human_bytes(statistics.median(stage.memory for stage in group))
        disk = human_bytes(statistics.median(stage.disk for stage in group))
        ratios = _ratio(group, "memory"), _ratio(group, "disk"), _ratio(group, "disk", exact=True)
        print(row(name, f"{parameters / 1e9:.2f}B", len(group), memory, ratios[0], disk, *ratios[1:]))


def _ratio(group: list[Stage], what: str, exact: bool = False) -> str:
    needs = [stage.exact if exact else stage.rough for stage in group]
    ratios = [getattr(n, what) / max(getattr(stage, what), 1) for n, stage in zip(needs, group, strict=True)]
    return f"{statistics.median(ratios):.2f}"


if __name__ == "__main__":
    main()
