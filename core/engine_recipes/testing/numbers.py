"""What a model's logits should be, and how far others are from them."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import stages
from ..entries import Family, Precision, Reference
from ..host import Host
from ..types import HF_CHECKPOINT, Artifact, Runtime, StageContext
from .building import Recipe
from .faults import Skip, expect
from .lab import Lab
from .processes import ask

if TYPE_CHECKING:
    import numpy as np

    Floats = np.ndarray[Any, np.dtype[np.float32]]

#: Largest relative error where a precision's tests name no other. 16 bits only round. On a random model of two layers,
#: where nothing averages out, measured: 8-bit weights 0.015, 4-bit weights 0.24; logits of another model are 1.4 away.
PLAIN, EIGHT_BITS, FEWER_BITS = 0.002, 0.1, 0.5
#: More than 16 bits of any kind change such logits: bfloat16 in every step, 0.01.
ROUNDS = 0.05


#: Tokens that engines are compared on: more than the chunks, windows and tables that are cut too short in small steps.
LONG = 200


def sample(vocab_size: int, count: int = 24) -> list[int]:
    """Token ids to compare on: no two neighbours alike."""
    return [(37 * i * i + 11 * i + 3) % vocab_size for i in range(count)]


def apart(found: Floats, base: Floats) -> float:
    """Root mean square of the difference, relative to how far the base's logits spread."""
    import numpy as np

    if found.shape != base.shape:
        return float("inf")
    difference = found.astype(np.float64) - base
    error = float(np.sqrt(np.mean(difference**2)) / np.std(base))
    return error if np.isfinite(error) else float("inf")


def room(runtime: Runtime, unsaid: int = 256) -> int:
    """Most tokens of a prompt and its answer; where the engine does not say it, `unsaid`: what tiny models take."""
    return int(getattr(runtime, "max_seq_len", unsaid))


def in_room(runtime: Runtime, vocab_size: int, base: Floats) -> tuple[list[int], Floats]:
    """The tokens of `sample` that the runtime has room for, and the base's logits of them."""
    ids = sample(vocab_size, len(base))[: room(runtime, 24)]
    return ids, base[: len(ids)]


def tolerance(lab: Lab, precision: Precision) -> float:
    """How far an engine of this precision may be from the source on a tiny model."""
    if precision.name in lab.tolerance:
        return lab.tolerance[precision.name]
    if not precision.algorithm:
        return PLAIN
    return EIGHT_BITS if 8 <= precision.bits < 16 else FEWER_BITS  # 16: the engine rounds, nobody knows to how many


def allow(lab: Lab, recipe: Recipe, off: float) -> str:
    """What an author may write whose engine rounds more than is usual; empty if `off` is more than rounding."""
    precision = lab.registry.precisions[str(recipe.precision)]
    if off > (ROUNDS if precision.bits >= 16 or not precision.algorithm else FEWER_BITS):
        return ""
    return f' (if that is how it rounds: conformance(…, tolerance={{"{precision.name}": {2 * off:.1g}}}))'


def tensors_of_transformers(lab: Lab, folder: Path, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """What transformers' own class stores for this config, name -> shape.

    Raises:
        Skip: it is not installed, or does not know the model.
    """
    return {name: tuple(shape) for name, shape in _transformers(lab, folder, vocab_size)["shapes"].items()}


def logits_of_transformers(lab: Lab, folder: Path, vocab_size: int, count: int = 24) -> Floats:
    """Its logits of the folder's weights, for `sample(vocab_size, count)`.

    Raises:
        Skip: as for `tensors_of_transformers`.
        Fault: it does not load these weights.
    """
    import numpy as np

    told = _transformers(lab, folder, vocab_size)
    expect("unlike" not in told, f"transformers does not load a checkpoint that is made so: {told.get('unlike')}")
    logits: Floats = np.load(lab.place("transformers") / f"{folder.name}.npy")
    return logits[:count]


def _transformers(lab: Lab, folder: Path, vocab_size: int) -> dict[str, Any]:
    if not (find_spec("transformers") and find_spec("torch")):
        raise Skip("transformers is not installed: agreement was not checked")
    known = lab.memory.setdefault("transformers", {})
    if folder.name not in known:
        folders = {folder: vocab_size, **lab.all_models()}  # importing transformers takes longer than all of them
        ids = {path.name: sample(size, _length(lab, path)) for path, size in folders.items()}
        request = {"folders": [str(path) for path in folders], "ids": ids, "out": str(lab.place("transformers"))}
        known.update(ask(lab, "transformers_says", request))
    told: dict[str, Any] = known[folder.name]
    if "unknown" in told:
        raise Skip(f"transformers does not know this model: {told['unknown']}")
    return told


def _length(lab: Lab, folder: Path) -> int:
    """How many tokens a tiny model is run on: LONG, or as many as it is meant for."""
    positions = lab.config(folder).get("max_position_embeddings")
    return min(LONG, positions) if isinstance(positions, int) else 24


def of_source(lab: Lab, folder: Path, family: Family, vocab_size: int, count: int = 24) -> Floats:
    """Logits of the unquantised source on `sample`: by transformers, else by the first reference that can run it."""
    known: dict[Path, Floats] = lab.memory.setdefault("source", {})
    if folder not in known:
        known[folder] = _of_source(lab, folder, family, vocab_size)
    return known[folder][:count]


def _of_source(lab: Lab, folder: Path, family: Family, vocab_size: int) -> Floats:
    try:
        return logits_of_transformers(lab, folder, vocab_size, LONG)
    except Skip as reason:
        skip = reason
    for name in family.references or lab.registry.defaults.references:
        reference = lab.registry.references.entries.get(name)
        if reference is None or name == "transformers" or lab.setup.facts.missing(reference.requires):
            continue
        logits = logits_of_reference(lab, reference, folder, family, sample(vocab_size, _length(lab, folder)))
        if logits is not None:
            return logits
    raise skip


def logits_of_reference(lab: Lab, reference: Reference, folder: Path, family: Family, ids: list[int]) -> Floats | None:
    """A reference's logits of the source; None if it hides them."""
    resolved = lab.build(Recipe(str(folder), family.name), "resolve").path("resolve")
    assert resolved is not None
    who = stages.provider("reference", reference)
    out = Path(tempfile.mkdtemp(dir=lab.folder))  # a fresh one, as every stage gets
    context = StageContext(str(folder), "baseline", {}, (Artifact(HF_CHECKPOINT, resolved, ""),), out)
    runtime = Host([who]).load_source(who, context)
    try:
        logits: Floats | None = runtime.logits(ids)
    finally:
        runtime.close()
    return logits
