from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import side_by_side
from engine_recipes import compare, page, plots
from engine_recipes.api import open_setup
from engine_recipes.errors import RequestError
from engine_recipes.markup import Html, escaped, tag
from engine_recipes.store import Store
from engine_recipes.types import Check

#: What a model might say: markup, a script, half a surrogate pair, a bell.
NASTY = "The <script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> \ud800\x07 & end."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page on three engines, of which one says what no page should run, and on one that nobody measured."""
    folder = tmp_path_factory.mktemp("page")
    store = Store(folder / "workspace")
    checks = (
        Check("scales are sane", "fail", 8.0, 1.0, "one of <them> is 8 times too large"),
        Check("loads", "pass", 49152.0, 0.00012346),
    )
    judged = side_by_side.judged
    for recipe, size, tokens, findings in (
        ("bf16@toy", 270, 52, judged(0.0001, 1.0, 0.996)),
        ("fp8@toy", 170, 112, judged(0.07, 1.05, 0.88, "The same but shorter")),
        ("int4@toy", 120, 161, judged(0.3, 1.2, 0.7, NASTY, *checks)),
    ):
        built = side_by_side.engine(store, recipe, size, findings=findings, calibrated=20 * (size < 200))
        side_by_side.timed(built, tokens)
    side_by_side.engine(store, "fp16@toy", 20, model="another")
    page.write(folder / "page.html", compare.collect(open_setup(store.workspace), ()))
    return folder / "page.html"


class Outline(HTMLParser):
    """What a page is made of; fails for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_is_well_formed_and_says_what_it_is(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    outline = Outline(text)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert "<title>another, smollm2-135m: 4 engines compared – engine-recipes</title>" in text
    tags = [name for name, _ in outline.tags]
    assert tags.count("h1") == 1
    assert tags.count("table") == tags.count("caption") == 5
    assert all(cell.get("scope") in ("col", "row") for cell in outline.named("th"))
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in outline.named("svg"))
    assert tags.count("svg") == tags.count("desc") == 4  # the small one has only its stages


def test_the_page_refers_to_nothing_outside_itself(written: Path) -> None:
    outline = Outline(written.read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "a", "object", "form"} & {name for name, _ in outline.tags}
    given = [attributes.get(name) for _, attributes in outline.tags for name in ("src", "href", "style", "onclick")]
    assert set(given) == {None, "data:,"}
    (policy,) = [m["content"] or "" for m in outline.named("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
    assert "script" not in policy
    assert not re.search(r"url\(|@import|//", written.read_text(encoding="utf-8").partition("</style>")[0])


def test_the_page_names_no_folder_of_this_machine(written: Path) -> None:
    assert str(written.parent) not in written.read_text(encoding="utf-8")


def test_numbers_of_checks_are_short(written: Path) -> None:
    assert "<strong>✓ pass </strong>49,152<span> / 0.0001235</span>" in written.read_text(encoding="utf-8")


def test_texts_are_marked_from_the_first_difference_on(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert '<dd dir="auto">The same<mark> but shorter</mark></dd>' in text
    assert "The <mark>&lt;script&gt;document.title" in text
    assert "?\u2407 &amp; end.</mark>" in text
    assert text.count('<dd dir="auto">The same.</dd>') == 1  # the source and the engine that says the same


def test_a_text_that_ends_early_has_its_end_marked(workspace: Path, tmp_path: Path) -> None:
    for recipe, said in (("a@toy", "The"), ("b@toy", "")):
        side_by_side.engine(Store(workspace), recipe, 20, findings=side_by_side.judged(0.2, 1.2, 0.8, said))
    text = page.render(compare.collect(open_setup(), ()), datetime.now(timezone.utc))
    assert '<dd dir="auto">The<mark> (ends here)</mark></dd>' in text
    assert '<dd dir="auto"><mark>(nothing)</mark></dd>' in text


def test_what_was_not_measured_is_said_with_the_command_that_does(workspace: Path) -> None:
    side_by_side.engine(Store(workspace), "fp16@toy", 20)
    text = page.render(compare.collect(open_setup(), ()), datetime.now(timezone.utc))
    assert "<code>recipes bench REF</code>" in text
    assert "<code>recipes validate REF</code>" in text
    assert "What they say" not in text


def test_numbers_that_are_none_are_no_reason_to_fail(workspace: Path) -> None:
    findings = side_by_side.judged(math.nan, math.inf, 0.0)
    side_by_side.engine(Store(workspace), "fp8@toy", 20, findings=findings)
    side_by_side.engine(Store(workspace), "fp16@toy", 40, findings=side_by_side.judged(0.0, 1.0, 1.0))
    Outline(page.render(compare.collect(open_setup(), ()), datetime.now(timezone.utc)))


def test_a_page_of_nothing_is_a_page() -> None:
    assert "nothing built" in page.render([], datetime.now(timezone.utc))


def test_an_existing_page_is_replaced_and_other_things_are_not(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    page.write(path, [])
    assert "old" not in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.glob("*page*")] == ["page.html"]
    with pytest.raises(RequestError, match="is there and is no file"):
        page.write(tmp_path, [])
    with pytest.raises(RequestError, match="does not exist\nmake the folder"):
        page.write(tmp_path / "no" / "page.html", [])


def test_markup_escapes_whatever_is_not_markup() -> None:
    assert (
        tag("td", "<b>", Html("<i>"), None, class_='a"b', x=1.0, y=None)
        == '<td class="a&quot;b" x="1">&lt;b&gt;<i></td>'
    )
    assert escaped("a\x00b\ud800\n") == "a\u2400b?\n"


@pytest.mark.parametrize("most", [0.7, 1.0, 123.0, 999.0, 272_000_000.0, 3.3e11])
def test_axes_have_some_round_numbers(most: float) -> None:
    found = plots.ticks(most)
    assert found[0] == 0
    assert 0.6 * most < found[-1] <= most
    assert 4 <= len(found) <= 7
    assert float(f"{found[1]:.0e}") == pytest.approx(found[1])


def test_letters_do_not_lie_on_each_other(workspace: Path) -> None:
    mark = [plots.Mark(letter, 0, letter) for letter in "ABCDEF"]
    dots = [plots.Dot(m, 100.0 + i % 2, 0.1, m.name) for i, m in enumerate(mark)]
    svg = plots.dots("t", dots, "x", "y", str, None)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="9"', svg)]
    assert len(places) == len(dots)
    assert all(math.dist(a, b) > 17 for i, a in enumerate(places) for b in places[:i])


# --- in a real browser ------------------------------------------------------------------------------------------------


#: For every text on the page: its colour against what lies behind it, as WCAG 2.2 defines contrast.
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    if (element.matches('svg text.letter')) return rgba(getComputedStyle(element.previousElementSibling).fill);
    for (let e = element; e; e = e.parentElement) {
      const colour = rgba(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const texts = [...document.body.querySelectorAll('*')].filter(e => !e.closest('title, desc') &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  return texts.map(e => {
    const style = getComputedStyle(e), front = rgba(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(front), light(behind(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), `${e.tagName}.${e.getAttribute('class')} ${e.textContent.slice(0, 20)}`];
  });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(browser: Any, written: Path, scheme: Any) -> None:
    view = browser.new_page(color_scheme=scheme)
    view.goto(written.as_uri())
    found = view.evaluate(CONTRASTS)
    back = view.evaluate("getComputedStyle(document.body).backgroundColor")
    view.close()
    assert len(found) > 100
    assert [(round(ratio, 2), what) for ratio, what in found if ratio < 4.5] == []
    assert (back == "rgb(255, 255, 255)") is (scheme == "light")


@pytest.mark.parametrize("scripts", [True, False])
def test_the_page_asks_for_nothing_and_runs_nothing(browser: Any, written: Path, scripts: bool) -> None:
    context = browser.new_context(java_script_enabled=scripts)
    view = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(written.as_uri(), wait_until="networkidle")
    title, shown = view.title(), view.locator("mark", has_text="document.title").first
    assert shown.is_visible()
    assert view.locator("svg").count() == 4
    context.close()
    assert asked == [written.as_uri()]
    assert said == []
    assert title.endswith("– engine-recipes")


@pytest.mark.parametrize(("width", "narrow"), [(380, True), (768, True), (1280, False)])
def test_tables_scroll_where_they_must_and_the_page_never_does(
    browser: Any, written: Path, width: int, narrow: bool
) -> None:
    view = browser.new_page(viewport={"width": width, "height": 800})
    view.goto(written.as_uri())
    wide = view.evaluate("document.documentElement.scrollWidth")
    boxes = [plot.bounding_box() for plot in view.locator("svg").all()]
    inside = view.evaluate("[...document.querySelectorAll('.box')].some(box => box.scrollWidth > box.clientWidth)")
    view.close()
    assert wide == width
    assert all(box["width"] > 250 and box["height"] > 20 for box in boxes)
    assert inside is narrow


def test_a_check_opens_to_say_why(browser: Any, written: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    view = context.new_page()
    view.goto(written.as_uri())
    why = view.get_by_text("one of <them> is 8 times too large")
    assert not why.is_visible()
    view.locator("details", has=why).locator("summary").click()
    assert why.is_visible()
    context.close()
