"""For MkDocs: files of the repository that pages link to, such as `benchmarks/README.md`, become part of the site.

Links are written as they are for a reader of the repository, `../../benchmarks/README.md`. The site has those files
under `repository/`; a folder stands for its README, and the repository's own README for the home page. Names of the API
are written as they are imported, `checkpoint.convert`, also where mkdocstrings would find a module of that name.
"""

from __future__ import annotations

import os.path
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()([^)\s#:]+)(?=[)#])")
_NAME = re.compile(r"^::: engine_recipes\.(\w+)\.(\w+)$", flags=re.M)
_PLACE = "repository/"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside the docs, and what that links to."""
    from mkdocs.structure.files import File, InclusionLevel

    found: set[str] = set()
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in {_target(page, link[2]) for link in _LINK.finditer(text)}:
            if not target.startswith("docs/") and target not in found and (ROOT / target).is_file():
                found.add(target)
                waiting += [target] if target.endswith(".md") else []
    for target in sorted(found):
        file = File.generated(config, _PLACE + target, abs_src_path=str(ROOT / target))
        file.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(file)
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point links at where the site has their targets, and names at functions rather than modules."""
    here = page.file.src_uri
    source = here.removeprefix(_PLACE) if here.startswith(_PLACE) else f"docs/{here}"

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link[2])
        place = target.removeprefix("docs/") if target.startswith("docs/") else _PLACE + target
        return link[1] + os.path.relpath(place, os.path.dirname(here) or ".")

    def inside(name: re.Match[str]) -> str:
        module = ROOT / "core" / "engine_recipes" / name[1] / f"{name[2]}.py"
        return f"{name[0]}.{name[2]}" if module.is_file() else name[0]

    markdown = re.sub(r"^<!-- (::: .+) -->$", r"\1", markdown, flags=re.M)  # only the site shows docstrings in full
    parts = _NAME.sub(inside, markdown).split("```")  # code is left as it is
    parts[::2] = [_LINK.sub(moved, part) for part in parts[::2]]
    return "```".join(parts)


def _target(page: str, link: str) -> str:
    """What a link of a page of the repository leads to, from the root."""
    target = os.path.normpath(os.path.join(os.path.dirname(page), link))
    target = f"{target}/README.md" if (ROOT / target).is_dir() else target
    return "docs/index.md" if target in ("README.md", "./README.md") else target
