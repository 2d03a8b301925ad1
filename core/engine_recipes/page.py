"""`compare --html`: one page that needs nothing else, no network and no script."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from . import __version__, plots
from .compare import Built, Group, machines
from .errors import MachineError, RequestError
from .markup import Html, join, tag
from .plots import Bar, Dot, Mark, Stack
from .space import human_bytes
from .types import Check
from .words import in_words, rate, seconds, small, source_in_words

#: Nothing may be fetched and nothing may run, whatever a model said.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_HEADER = (
    "Recipe",
    "Verdict",
    "Size",
    "× source",
    "Build",
    "Load",
    "First token",
    "Decode tok/s",
    "KL",
    "Perplexity ×",
    "Top-1",
)
_STAGES = ("resolve", "calibrate", "stage1", "stage2", "validate")
_SIGNS = {"pass": "✓", "warn": "!", "fail": "✗", "accepted": "!"}
#: The smallest KL that is drawn: less than rounding leaves.
_LEAST_KL = 1e-6


def write(path: Path, groups: Sequence[Group]) -> None:
    """Write the page beside `path`, then put it there by one rename.

    Raises:
        RequestError: no such folder, or something that is no file has that name.
        MachineError: it cannot be written.
    """
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} does not exist", "make the folder, or choose another for --html")
    if path.exists() and not path.is_file():
        raise RequestError(f"{path} is there and is no file", "choose another name for --html")
    fresh = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    try:
        fresh.write_text(render(groups, datetime.now(timezone.utc)), encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        reason = error.strerror or error
        raise MachineError(f"{path} cannot be written: {reason}", "choose another place for --html") from None


def render(groups: Sequence[Group], now: datetime) -> str:
    """The page as text.

    Args:
        groups: from `compare.collect`.
        now: the date that the page bears.
    """
    names = ", ".join(dict.fromkeys(group.model for group in groups)) or "nothing built"
    count = sum(len(group.engines) for group in groups)
    title = f"{names}: {_many(count, 'engine')} compared"
    on = f" · {'; '.join(machines(groups))}" if machines(groups) else ""
    style = (Path(__file__).with_name("page.css")).read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} – engine-recipes"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Html(style)),
    )
    top = tag("header", tag("h1", title), tag("p", f"{now:%d %B %Y}{on}", class_="lead"))
    sections = [_section(group, len(groups) > 1) for group in groups]
    foot = tag("footer", f"Made by engine-recipes {__version__}, {now:%Y-%m-%d %H:%M} UTC.")
    return f"<!doctype html>\n{tag('html', head, tag('body', top, tag('main', *sections), foot), lang='en')}\n"


def _section(group: Group, several: bool) -> Html:
    """One model: what to know first, then the pictures, then everything."""
    marks = [Mark(_letter(i), i % plots.TONES, engine.recipe) for i, engine in enumerate(group.engines)]
    pairs = list(zip(marks, group.engines, strict=True))
    level = "h3" if several else "h2"
    titled = (
        ("Summary", _summary(pairs, group)),
        ("Pictures", _plots(pairs, group)),
        ("Quality checks", _checks(pairs)),
        ("What they say", _samples(pairs)),
        ("How they were built", _origins(pairs, group)),
    )
    parts = [join(tag(level, title, class_="part"), body) for title, body in titled if body]
    return tag("section", tag("h2", group.model, class_="model") if several else None, _facts(pairs), *parts)


Pairs = Sequence[tuple[Mark, Built]]


def _facts(pairs: Pairs) -> Html | None:
    """The smallest, the fastest and the closest of those that are not rejected."""
    good = [(mark, engine) for mark, engine in pairs if engine.verdict != "fail"]
    if len(good) < 2:
        return None
    size = [(engine.bytes, mark, human_bytes(engine.bytes)) for mark, engine in good]
    speeds = [(engine.speed("decode_tokens_per_second"), mark) for mark, engine in good]
    speed = [(-value, mark, f"{rate(value)} tokens/s") for value, mark in speeds if value]
    closeness = [(engine.metric("mean_kl"), mark) for mark, engine in good]
    close = [(value, mark, f"KL {small(value)}") for value, mark in closeness if value is not None and value == value]
    items = []
    for what, found in (("Smallest", size), ("Fastest decoding", speed), ("Closest to the source", close)):
        if len(found) > 1:
            _, mark, words = min(found, key=lambda item: item[0])
            items.append(tag("li", tag("small", what), tag("strong", words), _chip(mark), mark.name))
    return tag("ul", *items, class_="facts") if items else None


def _summary(pairs: Pairs, group: Group) -> Html:
    head = tag(
        "tr", *(tag("th", name, scope="col", class_="words" if i < 2 else None) for i, name in enumerate(_HEADER))
    )
    source = group.source
    perplexity = f"perplexity {source.perplexity:.4g}" if source.perplexity else ""
    told = " · ".join(filter(None, [source.dtype, source.reference and f"run by {source.reference}", perplexity]))
    first = tag("th", "source", tag("small", told) if told else None, scope="row")
    rows = [tag("tr", first, *(_cells(source_in_words(source))), class_="source")]
    for mark, engine in pairs:
        told = " ".join(filter(None, [engine.target, engine.given]))
        name = tag("th", _chip(mark), engine.recipe, tag("small", told), scope="row")
        rows.append(tag("tr", name, *_cells(in_words(engine, source))))
    told_first = "The unquantised source first, then its engines, largest first."
    if group.settings:
        told_first += " Speed: " + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in group.settings.items()) + "."
    notes = [tag("p", note[:1].upper() + note[1:] + ".", class_="soft") for note in group.notes]
    return join(tag("p", told_first, class_="soft"), _table("Summary", head, rows), *notes)


def _cells(words: Sequence[str]) -> Iterator[Html]:
    verdict, *numbers = words
    yield tag("td", _verdict(verdict) if verdict != "-" else "–", class_="words")
    yield from (tag("td", "–" if text == "-" else text) for text in numbers)


def _plots(pairs: Pairs, group: Group) -> Html:
    figures = [_quality_plot(pairs, group), _speed_plot(pairs), _time_plot(pairs)]
    return tag("div", *figures, class_="plots")


def _quality_plot(pairs: Pairs, group: Group) -> Html:
    title = "Size and distance from the source"
    dots = []
    for mark, engine in pairs:
        distance = engine.metric("mean_kl")
        if distance is not None and distance == distance:
            words = f"{mark.letter} {mark.name}: {human_bytes(engine.bytes)}, KL {small(distance)}"
            dots.append(Dot(mark, engine.bytes, min(max(distance, _LEAST_KL), 1e6), words))
    if not dots:
        return _figure(title, _does("No engine here was compared with its source", "validate"))
    labels = ("size on disk", "mean KL, nats a token")
    plot = plots.dots(title, dots, *labels, lambda x: human_bytes(x) if x else "0", group.source.bytes)
    return _figure(title, "Further left is smaller, further down is closer. Logarithmic upwards.", plot)


def _speed_plot(pairs: Pairs) -> Html:
    title, name = "Decoding, tokens a second", "decode_tokens_per_second"
    rows = []
    for mark, engine in pairs:
        value = engine.speed(name)
        if value is not None:
            least, most = (engine.speed(name, which) or value for which in ("min", "max"))
            half = (engine.speed(name, "iqr") or 0) / 2
            rows.append(Bar(mark, value, least, most, f"{rate(value)} ± {rate(half)}"))
    if not rows:
        return _figure(title, _does("No speed was measured", "bench"))
    return _figure(title, "Median ± half the interquartile range; the line spans all runs.", plots.bars(title, rows))


def _time_plot(pairs: Pairs) -> Html:
    title = "Building, by stage"
    rows = [Stack(mark, engine.stages, seconds(engine.seconds)) for mark, engine in pairs if engine.stages]
    if not rows:
        return _figure(title, "No engine here says how long its stages took.")
    used = [name for name in _STAGES if any(name in row.parts for row in rows)]
    legend = tag(
        "ul", *(tag("li", tag("span", "", class_=f"part{i}"), name) for i, name in enumerate(used)), class_="legend"
    )
    return _figure(
        title,
        "What engines share, a source or a calibration, is counted for each.",
        join(plots.stacks(title, rows, used, seconds), legend),
    )


def _checks(pairs: Pairs) -> Html | None:
    """Checks in rows and engines in columns; then what was measured and has no limit."""
    found = [{check.name: check for check in engine.report.checks} for _, engine in pairs]
    for checks, (_, engine) in zip(found, pairs, strict=True):
        for name in engine.report.metrics:
            checks.setdefault(name, Check(name, "not run", engine.metric(name)))
    names = list(dict.fromkeys(name for checks in found for name in checks))
    if not names:
        return None
    head = tag(
        "tr",
        tag("th", "Check", scope="col"),
        *(tag("th", _chip(m), m.name, scope="col", class_="words") for m, _ in pairs),
    )
    rows = [
        tag("tr", tag("th", name, scope="row"), *(tag("td", _cell(checks.get(name))) for checks in found))
        for name in names
    ]
    told = "Verdict, value and limit of each check; open one for its reason. Without a verdict: measured, not judged."
    return join(tag("p", told, class_="soft"), _table("Quality checks", head, rows, "checks"))


def _cell(check: Check | None) -> Html:
    if check is None:
        return tag("span", "–", class_="cell none")
    judged = check.verdict != "not run"
    value = None if check.value is None else _plain(check.value)
    line = join(
        tag("strong", f"{_SIGNS[check.verdict]} {check.verdict} ") if judged else None,
        value,
        tag("span", f" / {_plain(check.limit)}") if check.limit is not None else None,
    )
    kind = check.verdict if judged else "none"
    if not check.note:
        return tag("span", line or "–", class_=f"cell {kind}")
    return tag("details", tag("summary", line), tag("p", check.note), class_=kind)


def _plain(value: float) -> str:
    whole = float(value).is_integer() and abs(value) < 1e9
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def _samples(pairs: Pairs) -> Html | None:
    """Every prompt with the source's text and each engine's, marked from where it differs."""
    prompts = dict.fromkeys(sample.get("prompt", "") for _, engine in pairs for sample in engine.report.samples)
    if not prompts:
        return None
    articles = [
        tag(
            "article",
            tag("p", prompt, class_="prompt", dir="auto"),
            tag("dl", *_answers(pairs, prompt), class_="texts"),
            class_="sample",
        )
        for prompt in prompts
    ]
    told = "Greedy answers, each once. Marked: everything from the first place where it differs from the source's."
    return join(tag("p", told, class_="soft"), *articles)


def _answers(pairs: Pairs, prompt: str) -> Iterator[Html]:
    """Each answer to a prompt with those who gave it, the source's first."""
    said: dict[str, list[Html]] = {}
    source = None
    for mark, engine in pairs:
        for sample in engine.report.samples:
            if sample.get("prompt", "") == prompt:
                if source is None and "source" in sample:
                    source = sample["source"]
                    said = {source: [tag("span", "source")], **said}
                said.setdefault(sample.get("text", ""), []).append(tag("span", _chip(mark), mark.name))
    for text, speakers in said.items():
        yield tag("div", tag("dt", *speakers), _marked(text, source))


def _marked(text: str, source: str | None) -> Html:
    """Text, marked from the first difference on; one that stops early has its end marked."""
    if source is None or text == source:
        return tag("dd", text or "(nothing)", dir="auto")
    same = next((i for i, (a, b) in enumerate(zip(text, source, strict=False)) if a != b), min(len(text), len(source)))
    rest = text[same:] or (" (ends here)" if text else "(nothing)")
    return tag("dd", text[:same], tag("mark", rest), dir="auto")


def _origins(pairs: Pairs, group: Group) -> Html:
    """Which folders these are and what made them."""
    used = [name for name in _STAGES if any(name in engine.stages for _, engine in pairs)]
    names = ("Engine", *used, "Peak memory", "Built", "With")
    rows = []
    for mark, engine in pairs:
        tools = engine.manifest.get("preimage", {}).get("tools", {})
        made = ", ".join(f"{tool} {version}" for tool, version in tools.items())
        peak = engine.manifest.get("peak_rss_bytes")
        rows.append(
            tag(
                "tr",
                tag("th", _chip(mark), tag("code", engine.folder.name), scope="row"),
                *(tag("td", seconds(engine.stages.get(name)).replace("-", "–")) for name in used),
                tag("td", human_bytes(peak) if peak else "–"),
                tag("td", str(engine.manifest.get("created", ""))[:10]),
                tag("td", made or "–", class_="tools"),
            )
        )
    head = tag("tr", *(tag("th", name, scope="col", class_="words" if name == "With" else None) for name in names))
    spec = group.source.spec if not group.source.spec.startswith("file:") else "a local folder"
    revision = f", revision {group.source.revision}" if group.source.revision else ""
    told = f"Source: {spec}{revision}. Times of stages; peak memory of the last one."
    return join(tag("p", told, class_="soft"), _table("How they were built", head, rows))


def _table(caption: str, head: Html, rows: Sequence[Html], kind: str | None = None) -> Html:
    table = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *rows), class_=kind)
    return tag("div", table, class_="box", tabindex="0", role="region", aria_label=caption)


def _figure(title: str, told: str, plot: Html | None = None) -> Html:
    box = tag("div", plot, class_="box", tabindex="0", role="region", aria_label=title) if plot else None
    return tag("figure", tag("figcaption", title, tag("small", told)), box)


def _does(missing: str, command: str) -> Html:
    return join(f"{missing}: ", tag("code", f"recipes {command} REF"), " does that.")


def _verdict(word: str) -> Html:
    return tag("span", f"{_SIGNS.get(word, '')} {word}".strip(), class_=f"verdict {word if word in _SIGNS else 'none'}")


def _chip(mark: Mark) -> Html:
    return tag("span", mark.letter, class_=f"letter-box tone{mark.tone}")


def _letter(number: int) -> str:
    return chr(ord("A") + number) if number < 26 else str(number + 1)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
