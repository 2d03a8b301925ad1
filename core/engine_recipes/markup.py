"""HTML and SVG as text. Whatever is not `Html` is escaped, so what a model said cannot become part of the page."""

from __future__ import annotations

import html

_VOID = ("br", "col", "link", "meta")
#: Control characters are no HTML: each is shown by its picture, U+2400 on.
_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}


class Html(str):
    """Markup that may stand in a page as it is."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | None) -> Html:
    """An element. None among children and attributes is left out.

    Args:
        name: `td`.
        children: `Html` as it is, other text escaped.
        attributes: `class_` is `class`, `stroke_width` is `stroke-width`; numbers get at most two decimals.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-") if key != "viewBox" else key}="{escaped(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str | None) -> Html:
    """Children one after the other, as in `tag`."""
    return Html(
        "".join(child if isinstance(child, Html) else escaped(child) for child in children if child is not None)
    )


def escaped(text: str) -> Html:
    """Text as HTML text or attribute, also text that holds control characters or half a surrogate pair."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return Html(html.escape(whole.translate(_PICTURES)))


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
