"""The site as readers get it: every link leads somewhere, nothing comes from other machines, a browser shows it all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Read(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    links: list[tuple[str, str]] = field(default_factory=list)
    anchors: set[str] = field(default_factory=set)
    descriptions: list[str] = field(default_factory=list)
    titles: list[str] = field(default_factory=list)
    inside: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.links += [(tag, given[name]) for name in ("href", "src", "action", "data", "poster") if name in given]
        self.links += [(tag, part.split()[0]) for part in given.get("srcset", "").split(",") if part.strip()]
        self.descriptions += [given["content"]] if given.get("name") == "description" else []
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside == "title":
            self.titles.append(data)
        self.inside = ""


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    found = {}
    for file in sorted(site.rglob("*.html")):
        found[file] = Read()
        found[file].feed(file.read_text(encoding="utf-8"))
    return found


def test_every_link_and_anchor_leads_somewhere(site: Path, pages: dict[Path, Read]) -> None:
    broken = []
    for page, read in pages.items():
        for _, link in read.links:
            parts = urlsplit(link)
            if parts.scheme or page.name == "404.html":  # whose links count from the root of a server
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            fine = target.is_file() and target.is_relative_to(site)
            if fine and parts.fragment and target in pages and parts.fragment != "__skip":
                fine = unquote(parts.fragment) in pages[target].anchors
            broken += [] if fine else [f"{page.relative_to(site)}: {link}"]
    assert len(pages) > 25
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Read]) -> None:
    for page, read in pages.items():
        loaded = [link for tag, link in read.links if tag != "a" and urlsplit(link).scheme not in ("", "data")]
        assert loaded == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_api_shows_functions_and_not_the_modules_that_they_lie_in(site: Path, pages: dict[Path, Read]) -> None:
    anchors = pages[site / "reference" / "api.html"].anchors
    assert "engine_recipes.checkpoint.convert.convert" in anchors
    assert "engine_recipes.checkpoint.convert" not in anchors


def test_no_list_is_shown_as_a_paragraph_with_hyphens(pages: dict[Path, Read]) -> None:
    for page in pages:  # Markdown wants an empty line before a list; a repository's own view does not
        for text in re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), flags=re.S):
            assert not re.search(r"^\s*[-*] ", text, flags=re.M), f"{page.name}: {text}"


def test_every_page_has_a_title_and_a_description_of_its_own(pages: dict[Path, Read]) -> None:
    own = {page: read for page, read in pages.items() if "repository" not in page.parts and page.name != "404.html"}
    titles = [read.titles[0] for read in own.values()]
    descriptions = [read.descriptions[0] for read in own.values()]
    assert len(set(titles)) == len(titles)
    assert len(set(descriptions)) == len(descriptions)


def test_nothing_of_the_makers_machine_or_code_lies_in_the_site(site: Path) -> None:
    root = str(Path(__file__).parents[2])
    for file in site.rglob("*"):
        assert file.suffix != ".py" or "repository" in file.parts, "what pages link to, and nothing else"
        if file.suffix in (".html", ".json", ".xml"):
            assert root not in file.read_text(encoding="utf-8"), file


# --- in a real browser ------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """A page of the browser, and what went wrong or out in it."""

    view: Any
    trouble: list[str]


@pytest.fixture
def seen(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Seen]:
    """A window of 1280 pixels, or as wide as the test's `width` says. At its end nothing may have gone wrong."""
    width = getattr(request, "param", 1280)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme="light")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    view, trouble = context.new_page(), []
    view.on("request", lambda r: trouble.append(f"asks {r.url}") if not r.url.startswith((address, "data:")) else None)
    view.on("response", lambda r: trouble.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    view.on("console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: trouble.append(str(error)))
    yield Seen(view, trouble)
    context.close()
    assert trouble == []


@pytest.mark.parametrize("seen", [360], indirect=True)
def test_every_page_loads_and_fits_a_phone(seen: Seen, site: Path, address: str) -> None:
    for file in sorted(site.rglob("*.html")):
        page = file.relative_to(site).as_posix()
        seen.view.goto(f"{address}/{page}")
        assert seen.view.locator("h1").count() >= 1, page
        assert seen.view.evaluate("document.documentElement.scrollWidth") <= 360, page
        assert seen.trouble == [], page


@pytest.mark.parametrize("seen", [360], indirect=True)
def test_the_menu_of_a_phone_leads_to_every_part(seen: Seen, address: str) -> None:
    seen.view.goto(f"{address}/index.html")
    seen.view.locator("header label[for=__drawer]").click()
    seen.view.locator("nav.md-nav--primary label", has_text="Reference").first.click()
    link = seen.view.locator("nav.md-nav--primary a", has_text="Hooks").first
    link.click()
    seen.view.wait_for_url("**/reference/hooks.html")
    assert seen.view.locator("h1").inner_text().startswith("Hooks")


@pytest.mark.parametrize("hook", ["resolve_checkpoint", "load_engine"])
def test_search_finds_a_hook_by_its_name(seen: Seen, address: str, hook: str) -> None:
    seen.view.goto(f"{address}/tutorial.html")
    seen.view.locator("input.md-search__input").click()
    seen.view.keyboard.type(hook)
    found = seen.view.locator(f"a.md-search-result__link[href*='reference/hooks.html'][href*='#{hook}']").first
    found.click()
    seen.view.wait_for_url(f"**/reference/hooks.html*#{hook}*")


def test_search_leads_from_conformance_to_the_page_about_it(seen: Seen, address: str) -> None:
    seen.view.goto(f"{address}/tutorial.html")
    seen.view.locator("input.md-search__input").click()
    seen.view.keyboard.type("conformance")
    seen.view.locator("a.md-search-result__link[href*='how-to/test-a-plugin.html']").first.wait_for()


def test_code_of_every_page_fits_a_window_of_1280_pixels(seen: Seen, site: Path, address: str) -> None:
    cut_off = (
        "[...document.querySelectorAll('pre code')].filter(e => e.scrollWidth > e.clientWidth).map(e => e.innerText)"
    )
    for file in sorted(site.rglob("*.html")):
        page = file.relative_to(site).as_posix()
        seen.view.goto(f"{address}/{page}")
        assert seen.view.evaluate(cut_off) == [], page


#: Each kind of text on a page with less contrast to what lies under it than 4.5 to 1 (WCAG 2, level AA).
FAINT = """() => {
  const parse = text => [...text.match(/[\\d.]+/g).map(Number), 1].slice(0, 4);
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat([1]);
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
  const ground = element => over(parse(getComputedStyle(element).backgroundColor),
                                 element.parentElement ? ground(element.parentElement) : [255, 255, 255, 1]);
  const found = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true}))
      continue;
    const lights = [ground(element), over(parse(getComputedStyle(element).color), ground(element))].map(light);
    const ratio = (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
    if (ratio < 4.5) found.add(`${element.tagName}.${element.className}: ${ratio}`);
  }
  return [...found];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_by_light_and_in_the_dark(seen: Seen, site: Path, address: str, scheme: str) -> None:
    seen.view.emulate_media(color_scheme=scheme)
    for file in sorted(site.rglob("*.html")):
        page = file.relative_to(site).as_posix()
        seen.view.goto(f"{address}/{page}")
        assert seen.view.evaluate(FAINT) == [], page


def test_dark_mode_is_one_click_and_stays(seen: Seen, address: str) -> None:
    def brightness() -> int:
        colour = seen.view.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    seen.view.goto(f"{address}/index.html")
    assert brightness() > 600
    for _ in range(3):
        if brightness() < 300:
            break
        seen.view.locator("form.md-header__option label:visible").click()
    assert brightness() < 300
    seen.view.goto(f"{address}/reference/hooks.html")
    assert brightness() < 300


def test_every_block_of_code_can_be_copied(seen: Seen, address: str) -> None:
    seen.view.goto(f"{address}/reference/hooks.html")
    code = seen.view.locator("div.highlight pre code")
    buttons = seen.view.locator("div.highlight button[data-md-type=copy], div.highlight button.md-clipboard")
    buttons.first.wait_for(state="attached")
    assert buttons.count() == code.count() == 11
    code.first.hover()
    buttons.first.click()
    assert seen.view.evaluate("navigator.clipboard.readText()").strip() == code.first.inner_text().strip()


def test_the_picture_of_the_terminal_is_shown(seen: Seen, address: str) -> None:
    seen.view.goto(f"{address}/index.html")
    picture = seen.view.locator("img[src='terminal.svg']")
    assert picture.evaluate("image => image.complete && image.naturalWidth > 0 && image.offsetWidth > 300")
    assert len(picture.get_attribute("alt")) > 20
