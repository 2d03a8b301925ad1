"""What a family promises: that it describes its models rightly, refuses others, and that engines agree with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import stages
from ..checkpoint import check_split, convert, layout, source_shapes
from ..checkpoint.safetensors import SafeFile
from ..checkpoint.source import SourceCheckpoint
from ..decoder import Decoder
from ..entries import Family
from ..errors import RequestError
from ..hf_config import architecture_of
from .building import Recipe
from .faults import Fault, Skip, expect
from .folders import keeps_to_its_folder
from .lab import Lab
from .numbers import LONG, apart, in_room, logits_of_transformers, tensors_of_transformers
from .processes import ask
from .unsaid import leaves_out_no_key_of_its_configs

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

_SHOWN = 5
_LARGEST_ERROR = 1e-3


def describes_its_configs(lab: Lab, name: str) -> None:
    """A description that changes from time to time would be another model each time: nothing would ever be reused."""
    for family, config in _configs(lab, name):
        before = dict(config)
        first, again = lab.describe(family, config), lab.describe(family, config)
        expect(first == again, f"describing the same config twice gives two descriptions:\n{first}\n{again}")
        expect(before == config, "resolve_checkpoint changes the config that it is given: copy it first")
        path = lab.place("described") / "decoder.json"
        first.write(path)
        expect(Decoder.read(path) == first, "the description is another one after it was written as JSON and read")


def knows_its_architectures(lab: Lab, name: str) -> None:
    """Checkpoints find their family by the architecture; one that takes others describes them wrongly."""
    for family, config in _configs(lab, name):
        architecture = architecture_of(config)
        listed = ", ".join(family.architectures)
        expect(
            architecture in family.architectures,
            f"families.{name}.architectures lists {listed}, and not {architecture} of its config",
        )
        strange = {**config, "architectures": ["NobodysForCausalLM"]}
        folder = lab.model(family, config)
        other = folder.with_name(f"{folder.name}-strange")
        _copy(folder, other, strange)
        try:
            lab.build(Recipe(str(other), name), "resolve")
        except RequestError:
            continue
        raise Fault(f"a checkpoint of NobodysForCausalLM is taken for one of {listed}")


def holds_the_tensors_of_transformers(lab: Lab, name: str) -> None:
    """Core demands exactly the tensors that the description implies: with others no real checkpoint can be read."""
    for family, config in _configs(lab, name):
        decoder, folder = lab.describe(family, config), lab.model(family, config)
        theirs = tensors_of_transformers(lab, folder, decoder.vocab_size)
        ours = source_shapes(decoder)
        missing = [f"{tensor} {list(shape)}" for tensor, shape in theirs.items() if tensor not in ours]
        unknown = [f"{tensor} {list(shape)}" for tensor, shape in ours.items() if tensor not in theirs]
        other = [
            f"{tensor} is {list(ours[tensor])}, transformers has {list(theirs[tensor])}"
            for tensor in ours
            if tensor in theirs and ours[tensor] != theirs[tensor]
        ]
        lines = [f"not described: {_some(missing)}"] * bool(missing)
        lines += [f"described, and not in transformers: {_some(unknown)}"] * bool(unknown)
        expect(not (lines or other), "\n".join([*lines, *other[:_SHOWN]]))


def keeps_to_its_folder_when_it_describes(lab: Lab, name: str) -> None:
    """Describing only answers: files that it leaves anywhere are nobody's, and never removed."""
    family, configs = lab.family(name)
    keeps_to_its_folder(lab, Recipe(str(lab.model(family, configs[0])), name), "resolve")


def answers_a_strange_config_with_an_error(lab: Lab, name: str) -> None:
    """A config.json may be damaged or of a newer kind: users must read what is wrong with it, and no traceback."""
    for family, config in _configs(lab, name):
        request = {
            "provider": asdict(stages.provider("family", family)),
            "config": dict(config),
            "out": str(lab.place("described")),
        }
        faults = ask(lab, "strange_configs", request, limit=60)
        expect(
            not faults,
            f"{_some(faults)}\nRaise RequestError(what is wrong, what to do), or let from_hf read the key",
        )


def unshard_equals_source(lab: Lab, name: str) -> None:
    """Every weight must reach the ranks it belongs to, once and unchanged, however the model is split."""
    splits = 0
    for family, config in _configs(lab, name):
        decoder, folder = lab.describe(family, config), lab.model(family, config)
        for tp_size, pp_size in ((1, 1), (2, 1), (1, 2), (2, 2)):
            try:
                check_split(decoder, tp_size, pp_size)
            except RequestError:
                continue
            splits += 1
            out = lab.place(f"split/{name}-{folder.name}-{tp_size}-{pp_size}")
            for old in out.iterdir():
                old.unlink()
            with SourceCheckpoint(folder, decoder) as source:
                convert(source, out, "float16", tp_size, pp_size)
                _compare(source, decoder, out, tp_size, pp_size)
    expect(splits > 1, "none of its tiny models can be split: give one with 2 or more heads, kv_heads and layers")


def builds_and_reuses_what_it_built(lab: Lab, name: str) -> None:
    """The whole way, as a user goes it: describe, convert, compile, judge; and the second time nothing is done."""
    for family, config in _configs(lab, name):
        recipe = _recipe(lab, family, config)
        build = lab.build(recipe, "validate", accept="its weights are random")
        expect(build.plan.family.name == name, f"{build.plan.family} was used")
        broken = [check for check in build.report.checks if check.verdict == "fail" and check.value is None]
        expect(not broken, "\n".join(f"{check.name}: {check.note}" for check in broken))
        again = lab.build(recipe, "validate", accept="its weights are random")
        ran = [stage.name for stage in again.stages if stage.status == "run"]
        expect(not ran, f"the same build runs {', '.join(ran)} again")


def agrees_with_transformers(lab: Lab, name: str) -> None:
    """Names and shapes can be right and the model another one: rope, norms, activation, scaling, order of heads."""
    for family, config in _configs(lab, name):
        decoder, folder = lab.describe(family, config), lab.model(family, config)
        theirs = logits_of_transformers(lab, folder, decoder.vocab_size, LONG)
        runtime = lab.load(_recipe(lab, family, config)).runtime
        ids, theirs = in_room(runtime, decoder.vocab_size, theirs)
        ours = runtime.logits(ids)
        runtime.close()
        if ours is None:
            raise Skip("the engine that runs here gives no logits")
        error = apart(ours, theirs)
        expect(
            error <= _LARGEST_ERROR,
            f"logits are {error:.2g} of their spread away from transformers', at most {_LARGEST_ERROR:g} is rounding:"
            " see what the class in transformers does and the description does not say",
        )


PROMISES: Sequence[Callable[[Lab, str], None]] = (
    describes_its_configs,
    knows_its_architectures,
    keeps_to_its_folder_when_it_describes,
    answers_a_strange_config_with_an_error,
    holds_the_tensors_of_transformers,
    unshard_equals_source,
    builds_and_reuses_what_it_built,
    agrees_with_transformers,
    leaves_out_no_key_of_its_configs,
)


def _configs(lab: Lab, name: str) -> Iterator[tuple[Family, Mapping[str, Any]]]:
    family, configs = lab.family(name)
    for number, config in enumerate(configs):
        try:
            yield family, config
        except Fault as fault:
            raise Fault(f"config {number}: {fault}") from None


def _recipe(lab: Lab, family: Family, config: Mapping[str, Any]) -> Recipe:
    settings = {**lab.given(family.name), "gate.reference": "none"}
    return lab.runnable(Recipe(str(lab.model(family, config)), family.name, settings=settings))


def _copy(folder: Path, other: Path, config: Mapping[str, Any]) -> None:
    """The folder with another config.json."""
    import json
    import shutil

    shutil.copytree(folder, other, dirs_exist_ok=True)
    (other / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")


def _some(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return "; ".join(words[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _compare(source: SourceCheckpoint, decoder: Decoder, folder: Path, tp_size: int, pp_size: int) -> None:
    """Follow every piece of the source to the rank that holds it, bit for bit; every value must be held somewhere."""
    import numpy as np

    split = f"tp_size {tp_size}, pp_size {pp_size}"
    held = {tensor: np.zeros(shape, bool) for tensor, shape in source_shapes(decoder).items()}
    for rank, specs in enumerate(layout(decoder, tp_size, pp_size)):
        with SafeFile(folder / f"rank{rank}.safetensors") as file:
            for spec in specs:
                position = 0
                for piece in spec.pieces:
                    place = (slice(*piece.rows), *([slice(*piece.columns)] if piece.columns else []))
                    part = file.array(spec.name)[position : position + piece.shape[0]]
                    stored = _stored(source.array(piece.name)[place], spec.offset)
                    expect(
                        part.shape == stored.shape and part.tobytes() == stored.tobytes(),
                        f"{split}: {spec.name} of rank {rank} does not hold {piece.name}, rows {piece.rows}",
                    )
                    held[piece.name][place] = True
                    position += piece.shape[0]
    lost = [tensor for tensor, mask in held.items() if not mask.all()]
    expect(not lost, f"{split}: no rank holds all of {_some(lost)}")


def _stored(array: Array, offset: float) -> Array:
    """What a checkpoint has for these values of the source."""
    import numpy as np

    stored = (array.astype(np.float32) + np.float32(offset)).astype(np.float16)
    return stored if offset else array
