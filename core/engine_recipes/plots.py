"""Plots as inline SVG: dots on a logarithmic axis, bars with spread, stacked bars. Colours are classes of page.css."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .markup import Html, join, tag

#: Colours for engines; letters tell them apart as well.
TONES = 6
_WIDTH = 480
_ROW = 34
_LEFT, _RIGHT = 176, 80


@dataclass(frozen=True)
class Mark:
    """How one engine is marked in every plot: a letter, a colour and a name."""

    letter: str
    tone: int
    name: str


@dataclass(frozen=True)
class Dot:
    """One engine in a plot of `x` against `y > 0`; `words` say both."""

    mark: Mark
    x: float
    y: float
    words: str


@dataclass(frozen=True)
class Bar:
    """One engine's number, with the least and the most that was measured."""

    mark: Mark
    value: float
    least: float
    most: float
    words: str


@dataclass(frozen=True)
class Stack:
    """One engine's parts, named, that add up to what `words` say."""

    mark: Mark
    parts: Mapping[str, float]
    words: str


def badge(mark: Mark, x: float, y: float) -> Html:
    """The engine's letter in its colour, centred at x, y."""
    disc = tag("circle", cx=x, cy=y, r=9, class_=f"fill tone{mark.tone}")
    return join(disc, tag("text", mark.letter, x=x, y=y + 3.6, class_="letter", text_anchor="middle"))


def dots(
    title: str, dots: Sequence[Dot], x_label: str, y_label: str, x_words: Callable[[float], str], line: float | None
) -> Html:
    """Dots over a linear x axis from 0 and a logarithmic y axis.

    Args:
        x_words: a number of the x axis in words.
        line: where on the x axis the source is.
    """
    height, left, top, bottom = 392, 70, 14, 52
    most = max([dot.x for dot in dots] + [line or 0]) * 1.06
    low = math.floor(math.log10(min(dot.y for dot in dots)))
    high = max(math.ceil(math.log10(max(dot.y for dot in dots))), low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y) - low) / (high - low)
        return left + x / most * (_WIDTH - left - 16), height - bottom - share * (height - top - bottom)

    base = height - bottom
    parts = []
    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        parts.append(tag("line", x1=left, x2=_WIDTH - 16, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", _power(power), x=left - 8, y=y + 4, text_anchor="end"))
    for value in ticks(most):
        x = place(value, 10.0**low)[0]
        parts.append(tag("line", x1=x, x2=x, y1=base, y2=base + 5, class_="axis"))
        parts.append(tag("text", x_words(value), x=x, y=base + 19, text_anchor="middle"))
    parts.append(tag("line", x1=left, x2=_WIDTH - 16, y1=base, y2=base, class_="axis"))
    parts.append(tag("text", x_label, x=(left + _WIDTH - 16) / 2, y=height - 8, text_anchor="middle", class_="soft"))
    turn = f"rotate(-90 10 {(top + base) / 2})"
    parts.append(tag("text", y_label, x=10, y=(top + base) / 2, text_anchor="middle", class_="soft", transform=turn))
    if line is not None:
        x = place(line, 10.0**low)[0]
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=base, class_="source"))
        parts.append(tag("text", "source", x=x - 6, y=top + 11, text_anchor="end", class_="soft"))
    parts += _badges([(dot, *place(dot.x, dot.y)) for dot in dots], base - 10)
    return _svg(title, "; ".join(dot.words for dot in dots), height, parts)


def _badges(placed: Sequence[tuple[Dot, float, float]], lowest: float) -> Iterator[Html]:
    """A point for each dot, and its letter beside it where no other is, above `lowest`."""
    taken = [(x, y) for _, x, y in placed]
    for dot, x, y in placed:
        around = [
            (x + r * math.cos(a), y - r * math.sin(a)) for r in (19, 34, 50, 68) for a in (1.57, 0.6, 2.5, 0, 3.14)
        ]
        inside = [(u, v) for u, v in around if 80 < u < _WIDTH - 12 and 12 < v < lowest]
        free = [(u, v) for u, v in inside if all(math.hypot(u - a, v - b) > 17 for a, b in taken)]
        u, v = (free or inside)[0]
        taken.append((u, v))
        yield tag(
            "g",
            tag("title", dot.words),
            tag("line", x1=x, y1=y, x2=u, y2=v, class_=f"lead tone{dot.mark.tone}"),
            tag("circle", cx=x, cy=y, r=4.5, class_=f"fill tone{dot.mark.tone}"),
            badge(dot.mark, u, v),
        )


def bars(title: str, rows: Sequence[Bar]) -> Html:
    """One bar an engine from 0, with a line from the least to the most that was measured."""
    most = max((max(row.most, row.value) for row in rows), default=0) or 1
    room = _WIDTH - _LEFT - _RIGHT
    parts = []
    for number, row in enumerate(rows):
        y = number * _ROW + _ROW / 2
        whisker = f"M{_LEFT + row.least / most * room:.1f} {y:.1f}H{_LEFT + row.most / most * room:.1f}"
        ends = [f"M{_LEFT + x / most * room:.1f} {y - 4:.1f}v8" for x in (row.least, row.most)]
        length = row.value / most * room
        parts.append(
            tag(
                "g",
                tag("title", f"{row.mark.name}: {row.words}"),
                _label(row.mark, y),
                tag("rect", x=_LEFT, y=y - 9, width=length, height=18, rx=2, class_=f"fill tone{row.mark.tone}"),
                tag("path", d=" ".join([whisker, *ends]), class_="halo"),
                tag("path", d=" ".join([whisker, *ends]), class_="spread"),
                _value(row.words, _LEFT + max(length, row.most / most * room) + 8, y),
            )
        )
    return _svg(title, "; ".join(f"{row.mark.name}: {row.words}" for row in rows), len(rows) * _ROW, parts)


def stacks(title: str, rows: Sequence[Stack], names: Sequence[str], words: Callable[[float], str]) -> Html:
    """One bar an engine, made of its parts in the order of `names`. The n-th name has class `part<n>`."""
    most = max((sum(row.parts.values()) for row in rows), default=0) or 1
    room = _WIDTH - _LEFT - _RIGHT
    parts = []
    for number, row in enumerate(rows):
        y, x = number * _ROW + _ROW / 2, float(_LEFT)
        pieces = []
        for name in names:
            width = row.parts.get(name, 0.0) / most * room
            told = tag("title", f"{row.mark.name}: {name} {words(row.parts.get(name, 0.0))}")
            pieces.append(tag("rect", told, x=x, y=y - 9, width=width, height=18, class_=f"part{names.index(name)}"))
            x += width
        parts.append(tag("g", _label(row.mark, y), *pieces, _value(row.words, x + 8, y)))
    said = "; ".join(
        f"{row.mark.name}: {row.words}, " + ", ".join(f"{name} {words(s)}" for name, s in row.parts.items())
        for row in rows
    )
    return _svg(title, said, len(rows) * _ROW, parts)


def ticks(most: float) -> list[float]:
    """Three to six round numbers from 0 to `most`, 1, 2 or 5 times a power of ten apart."""
    step = 10.0 ** math.floor(math.log10(most / 3))
    step = next(step * k for k in (5, 2, 1) if most / (step * k) >= 3)
    return [step * n for n in range(int(most / step) + 1)]


def _power(power: int) -> str:
    """`0.01`, `10⁻⁵`: ten to that power."""
    plain = -4 <= power <= 4
    return f"{10.0**power:g}" if plain else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _label(mark: Mark, y: float) -> Html:
    short = mark.name if len(mark.name) <= 21 else mark.name[:20] + "…"
    return join(badge(mark, 11, y), tag("text", short, x=27, y=y + 4))


def _value(words: str, x: float, y: float) -> Html:
    return tag("text", words, x=x, y=y + 4, class_="number")


def _svg(title: str, said: str, height: float, parts: Sequence[Html]) -> Html:
    head = (tag("title", title), tag("desc", said))
    return tag("svg", *head, *parts, viewBox=f"0 0 {_WIDTH} {height}", role="img", aria_label=title)
