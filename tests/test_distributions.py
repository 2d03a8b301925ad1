from __future__ import annotations

import shutil
import sys
from importlib import metadata
from pathlib import Path

import pytest

from conftest import install, package
from engine_recipes import distributions, registry


def test_versions_are_those_that_pip_wrote() -> None:
    names = {dist.metadata["Name"] for dist in metadata.distributions()}
    assert len(names) > 20
    assert distributions.versions(names) == {name: metadata.version(name) for name in names}
    assert distributions.versions(["not-installed-anywhere", ""]) == {}


def test_who_advertises_is_who_python_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package(tmp_path, "acme-one", "api = 1\n"))
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])  # a Path, which Python ignores
    points = metadata.entry_points(group=distributions.GROUP)
    theirs = {(point.dist.name, point.value) for point in points if point.dist}
    ours = {(one.package, one.path.parent.name) for one in distributions.advertised()}
    assert ours == theirs
    assert ("acme-one", "acme_one") in ours


def test_what_no_folder_of_the_path_holds_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path / "site", "acme-zipped", "api = 1\n")
    archive = shutil.make_archive(str(tmp_path / "site"), "zip", folder)
    monkeypatch.syspath_prepend(archive)
    assert "acme-zipped" in [one.package for one in distributions.advertised()]
    assert distributions.versions(["acme.zipped", "click"]) == {
        "acme.zipped": "0.3",
        "click": metadata.version("click"),
    }

    class Finder:
        @staticmethod
        def find_spec(*_: object) -> None:
            """Imports nothing."""

        @staticmethod
        def find_distributions(context: metadata.DistributionFinder.Context) -> object:
            return metadata.MetadataPathFinder.find_distributions(
                metadata.DistributionFinder.Context(name=context.name, path=[str(folder)])
            )

    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != archive])
    assert distributions.versions(["acme.zipped"]) == {}
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert distributions.versions(["acme.zipped"]) == {"acme.zipped": "0.3"}


def test_a_version_in_the_description_is_not_the_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = package(tmp_path, "acme-readme", "")
    (folder / "acme_readme-0.3.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme-readme\nVersion: 0.3\nLicense: some\n  Version: 8\n\nVersion: 9\n"
    )
    install(monkeypatch, folder)
    assert distributions.versions(["acme-readme"]) == {"acme-readme": "0.3"}


@pytest.mark.parametrize(
    "points",
    [
        "[engine_recipes]\nx = \n",
        "[engine_recipes]\nx = not.there.at:all\n",
        "[engine_recipes]\nx = ../../etc\n",
        "[engine_recipes]\nx = __main__\n",
        "[engine_recipes]\nno equals sign\n",
        "[engine_recipes\nx = y\n",
        "\0\0",
    ],
)
def test_an_entry_point_that_is_nonsense_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, points: str
) -> None:
    install(monkeypatch, package(tmp_path / "good", "acme-good", "api = 1\n"))
    bad = package(tmp_path / "bad", "acme-bad", "api = 1\n")
    (bad / "acme_bad-0.3.dist-info" / "entry_points.txt").write_text(points)
    install(monkeypatch, bad)
    assert "acme-good" in [one.package for one in distributions.advertised()]
    assert registry.load().precisions["fp16"].name == "fp16"


def test_a_package_that_is_gone_is_a_problem_and_no_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = package(tmp_path / "gone", "acme-gone", "api = 1\n")
    (gone / "acme_gone").rename(tmp_path / "elsewhere")
    install(monkeypatch, gone)
    Path("acme_gone").mkdir()
    Path("acme_gone", "registry.toml").write_text('[aliases]\nhijack = "smollm2-135m"\n')
    monkeypatch.setattr("sys.path", [folder for folder in sys.path if folder not in ("", ".")])
    found = registry.load()
    assert "hijack" not in found.aliases
    assert [problem.text for problem in found.problems] == ["its package acme_gone is not installed"]


def test_a_damaged_entry_point_is_a_problem_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = package(tmp_path / "bad", "acme-bad", "api = 1\n")
    (bad / "acme_bad-0.3.dist-info" / "entry_points.txt").write_text("[engine_recipes]\nno equals sign\n")
    install(monkeypatch, bad)
    (problem,) = registry.load().problems
    assert str(problem.owner) == "acme-bad 0.3"
    assert "entry_points.txt cannot be read" in problem.text


def test_bytes_that_are_no_text_hide_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package(tmp_path / "good", "acme-good", "api = 1\n"))
    for i, file in enumerate(("entry_points.txt", "METADATA")):
        bad = package(tmp_path / f"bad{i}", f"acme-bad{i}", "api = 1\n")
        (bad / f"acme_bad{i}-0.3.dist-info" / file).write_bytes(b"\xff\xfe[engine_recipes]\xff")
        install(monkeypatch, bad)
    assert "acme-good" in [one.package for one in distributions.advertised()]


def test_an_installation_without_metadata_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, package(tmp_path / "good", "acme-good", "api = 1\n"))
    bad = package(tmp_path / "bad", "acme-bad", "api = 1\n")
    (bad / "acme_bad-0.3.dist-info" / "METADATA").unlink()
    install(monkeypatch, bad)
    found = [one.package for one in distributions.advertised()]
    assert "acme-good" in found
    assert "" not in found


def test_a_finder_that_raises_hides_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Finder:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "acme_bad":
                raise ZeroDivisionError

    install(monkeypatch, package(tmp_path / "good", "acme-good", "api = 1\n"))
    install(monkeypatch, package(tmp_path / "bad", "acme-bad", "api = 1\n"))
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    assert {"acme-good", "acme-bad"} <= {one.package for one in distributions.advertised()}


def test_names_are_one_however_they_are_spelled_and_hold_nothing_that_a_terminal_obeys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name in (("first", "acme.nvfp4"), ("second", "acme-nvfp4"), ("third", "evil\x1b[31m")):
        install(monkeypatch, package(tmp_path / folder, "acme_other", ""))
        (file,) = (tmp_path / folder).glob("*.dist-info/METADATA")
        file.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    names = {one.package for one in distributions.advertised()}
    assert len(names & {"acme.nvfp4", "acme-nvfp4"}) == 1
    assert "evil\\x1b[31m" in names
