from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Recipes
from engine_recipes.scaffold import KINDS

FILES = [
    ".github/workflows/test.yml",
    ".gitignore",
    "README.md",
    "engine_recipes_my_own/__init__.py",
    "engine_recipes_my_own/family.py",
    "engine_recipes_my_own/registry.toml",
    "pyproject.toml",
    "tests/test_conformance.py",
]


def test_new_writes_a_package_and_says_what_to_do_next(recipes: Recipes) -> None:
    ran = recipes("new", "family", "my-own")
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == "wrote engine-recipes-my-own"
    assert [line.strip() for line in lines[1 : lines.index("next:")]] == FILES
    after = [line.strip() for line in lines[lines.index("next:") + 1 :]]
    assert after[:3] == ["cd engine-recipes-my-own", "pip install -e '.[test]'", "pytest"]
    assert "python -m engine_recipes.testing tiny-my-own --architecture MyOwnForCausalLM" in after
    assert any(line.startswith("recipes build my-own-tiny") for line in after)
    assert [name for name in FILES if not Path("engine-recipes-my-own", name).is_file()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_json_names_the_folder_the_package_and_its_files(recipes: Recipes, kind: str, tmp_path: Path) -> None:
    ran = recipes("new", kind, "engine-recipes-my-own", "--folder", tmp_path / "deep" / "place", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["schema"] == 1
    assert ran.json["folder"] == str(tmp_path / "deep" / "place")
    assert ran.json["package"] == "engine-recipes-my-own"
    written = [p for p in (tmp_path / "deep" / "place").rglob("*") if p.is_file()]
    assert ran.json["files"] == sorted(str(p.relative_to(tmp_path / "deep" / "place")) for p in written)


def test_the_way_into_a_folder_can_be_typed_as_it_is_printed(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = recipes("new", "registry", "my-own", "--folder", "~/a place")
    assert ran.code == 0, ran.err
    assert f"cd '{tmp_path}/a place'" in ran.out
    assert (tmp_path / "a place" / "pyproject.toml").is_file()
    assert recipes("new", "registry", "mine", "--folder", "~/other", "--json").json["folder"] == f"{tmp_path}/other"


def test_a_place_that_cannot_be_written_is_named(recipes: Recipes) -> None:
    Path("file").write_text("")
    ran = recipes("new", "registry", "my-own", "--folder", "file/place")
    assert ran.code == 3
    assert ran.error == ["file/place cannot be written: Not a directory", "choose another place: --folder DIR"]


def test_a_family_is_of_the_architecture_that_is_given(recipes: Recipes) -> None:
    assert recipes("new", "family", "my-own", "--architecture", "OtherForCausalLM").code == 0
    text = Path("engine-recipes-my-own/engine_recipes_my_own/registry.toml").read_text()
    assert 'architectures = ["OtherForCausalLM"]' in text


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["engine", "My Own"], "'My Own' is no name for a package", "did you mean my-own?"),
        (
            ["precision", "fp8"],
            "precisions.fp8 belongs to engine-recipes 0.1.0",
            "choose another name, or uninstall that",
        ),
        (
            ["engine", "mine", "--architecture", "X"],
            "--architecture is for a family, and this is a new engine",
            "leave",
        ),
        (["engine", "mine", "--folder", "."], ". is there already", "choose another place: --folder DIR"),
        (["model", "mine"], "Invalid value for '{family|precision|engine|registry}': 'model' is not one of", "--help"),
    ],
)
def test_what_cannot_be_made_is_said_in_two_lines(
    recipes: Recipes, arguments: list[str], message: str, hint: str
) -> None:
    ran = recipes("new", *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.error[0].startswith(message)
    assert hint in ran.error[1]
    assert not list(Path().iterdir())


def test_names_that_are_taken_are_known_without_importing_anything(recipes: Recipes, toy: None) -> None:
    ran = recipes("new", "engine", "echo")
    assert ran.code == 2
    assert ran.error[0] == "engines.echo belongs to engine-recipes-toy 1.0"
