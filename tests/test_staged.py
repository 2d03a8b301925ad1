from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine_recipes import StageFailed
from engine_recipes.staged import check

WHO = "engine acme (acme-pack 1.0)"


def swapped(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


def no_folder(out: Path) -> None:
    out.rename(out.with_name("elsewhere"))
    out.write_text("a file")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link in its place": (swapped, "is no folder any more"),
    "a file in its place": (no_folder, "is no folder any more"),
    "a manifest": (lambda out: (out / "manifest.json").mkdir(), "manifest.json is not for a stage to write"),
    "a verdict": (lambda out: (out / "validation.json").touch(), "validation.json is not for a stage to write"),
    "a link out": (lambda out: (out / "link").symlink_to("../other"), "leads out of the stage's folder, to ../other"),
    "an absolute link": (lambda out: (out / "link").symlink_to(out / "file"), "leads out of the stage's folder"),
    "a link that names the folder": (lambda out: (out / "link").symlink_to("../out/file"), "leads out"),
    "a deep link out": (lambda out: (out / "deep" / "link").symlink_to("../../out/file"), "leads out"),
    "a link by a link": (lambda out: ((out / "a").symlink_to("b"), (out / "b").symlink_to("/etc")), "leads out"),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "file").touch()
    return tmp_path / "out"


@pytest.mark.parametrize("wrong", WRONG)
def test_what_would_not_stay_whole_is_refused_and_whose_it_is_said(out: Path, wrong: str) -> None:
    deed, said = WRONG[wrong]
    deed(out)
    with pytest.raises(StageFailed, match=said) as caught:
        check(out, WHO)
    assert caught.value.message.startswith(WHO)


def test_links_inside_the_folder_lead_to_their_files_after_it_was_moved(out: Path) -> None:
    (out / "file").write_text("here")
    (out / "lib.so").symlink_to("file")
    (out / "deep" / "lib.so").symlink_to("../file")
    (out / "folder").symlink_to("deep")
    check(out, WHO)
    moved = out.rename(out.with_name("moved"))
    assert (moved / "lib.so").read_text() == (moved / "folder" / "lib.so").read_text() == "here"
