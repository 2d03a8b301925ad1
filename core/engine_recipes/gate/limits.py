"""Limits as options: what the registry says of each metric, by precision and size, and what `--set` makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..entries import SMALL, Metric, Option, Precision
from ..registry import Registry
from ..types import Value
from . import Bound

#: What stands for no limit: nothing is worse.
_NEVER = {"above": math.inf, "below": -math.inf}


def options(registry: Registry, precision: Precision, parameters: int) -> dict[str, Option]:
    """`mean_kl.warn` and the like for every metric: options that no key depends on.

    Args:
        parameters: of the model; 0 if they are not known, which counts as large.
    """
    found = {}
    for name, metric in registry.metrics.entries.items():
        for which in ("warn", "fail"):
            limit = _limit(metric, precision, which, 0 < parameters < SMALL)
            found[f"{name}.{which}"] = Option(limit, help=f"where `{which}` begins: {metric.help}", keyed=False)
    return found


def _limit(metric: Metric, precision: Precision, which: str, small: bool) -> float:
    tables = (precision.small_limits, precision.limits) if small else (precision.limits,)
    entries = [*(table[metric.name] for table in tables if metric.name in table), metric]
    values = (getattr(entry, which) for entry in entries)
    return next((value for value in values if value is not None), _NEVER[metric.worse])


def bounds(registry: Registry, chosen: Mapping[str, Value]) -> dict[str, Bound]:
    """What judges each metric.

    Args:
        chosen: values of `options`.
    """
    return {
        name: Bound(metric.worse, _or_none(chosen[f"{name}.warn"]), _or_none(chosen[f"{name}.fail"]), metric.help)
        for name, metric in registry.metrics.entries.items()
    }


def _or_none(limit: Value) -> float | None:
    return float(limit) if math.isfinite(float(limit)) else None
