"""What to try after a quantised engine was rejected: what costs little goes first, and a bound ends it.

Excluding layers mends weights that the format rounds too coarsely, as 4 bits do in some layers much more than in
others. FP8's relative weight errors are nearly equal everywhere, so there the order says little: what helps, if it
does, is that inputs of these layers are not rounded any more. Neither mends a wrong setting, a broken engine or a bad
calibration, which no limit on rounding should let pass.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping

from engine_recipes import Report, StageContext, checkpoint

from .quantised import patterns

Offer = Mapping[str, str | int]

#: Shares of the linear layers' weights that stay at 16 bits, one after another: small enough to lose little of the
#: saving, large enough to show. Measured on SmolLM2 with int4, KL divergence from the source: 0.42 with none, 0.36,
#: 0.25 and 0.24 with these; 0.32 and 0.37 with a fifth at random. With a fifth, int4 needs 6.6 bits a weight and fp8
#: 9.6: whoever needs more is better off with the next larger precision.
STEPS = (0.05, 0.10, 0.20)


def offers(context: StageContext, report: Report, *, grouped: bool = False) -> list[Offer]:
    """Settings to try, the best first: 16-bit keys and values, smaller groups, then the worst layers at 16 bits.

    Args:
        context: of the rejected build's stage 1.
        report: `layers` ranks the linear layers; without it none are excluded.
        grouped: whether `group_size` is an option of the precision.
    """
    options = context.options
    found: list[Offer] = []
    if options["kv_cache"] != "none":
        found.append({"kv_cache": "none"})
    with checkpoint.open_source(context.input("hf-checkpoint")) as source:
        decoder = source.decoder
    if grouped:
        size = checkpoint.choose_group_size(decoder, int(options["group_size"]), int(options["tp_size"]))
        found += [{"group_size": smaller} for smaller in (64,) if smaller < size]
    if int(options["pp_size"]) > 1:  # pipeline ranks can only exclude a layer of all of them
        return found
    given = patterns(options)
    more = worst(checkpoint.linear_sizes(decoder), checkpoint.excluded_linears(decoder, given), report.layers)
    return [*found, {"exclude": ",".join([*given, *more])}] if more else found


def worst(sizes: Mapping[str, int], excluded: Collection[str], errors: Mapping[str, float]) -> list[str]:
    """The layers to exclude next, so that the next of STEPS is reached.

    Args:
        sizes: weights of every linear layer.
        excluded: those that are excluded now.
        errors: relative error of a layer's weights. Equal ones are taken in the order of the layers; those without an
            error that is a number are not taken: they are exact, or broken.

    Returns:
        The new ones, in the order of the layers. Empty if the last step is reached, or nothing more fits below it.
    """
    total = sum(sizes.values())
    taken = sum(sizes[name] for name in excluded)
    goal = next((step * total for step in STEPS if step * total > taken), 0)
    units = [unit for unit in _units(sizes) if unit[0] not in excluded and _error(unit, errors)]
    chosen: set[str] = set()
    for unit in sorted(units, key=lambda unit: -_error(unit, errors)):
        size = sum(sizes[name] for name in unit)
        if taken < goal and taken + size <= STEPS[-1] * total:
            chosen.update(unit)
            taken += size
    return [name for name in sizes if name in chosen]


def _units(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """What is excluded together: TensorRT-LLM makes one matrix of fc and gate."""
    for name in names:
        if name.endswith(".mlp.fc"):
            yield name, name.removesuffix("fc") + "gate"
        elif not name.endswith(".mlp.gate"):
            yield (name,)


def _error(unit: Iterable[str], errors: Mapping[str, float]) -> float:
    """The largest; 0 if there is none that is a number."""
    return max(error if math.isfinite(error) else 0.0 for error in (errors.get(name, 0.0) for name in unit))
