from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, Recipes, install
from engine_recipes import Decoder, MachineError, RequestError, StageContext, checkpoint, from_hf, scaffold, testing
from engine_recipes.registry import load
from engine_recipes.scaffold import KINDS
from engine_recipes.types import Artifact

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: kind -> what its README builds of a tiny model
REFS = {
    "family": "{name}-tiny:fp16@onnxruntime",
    "precision": "./tiny-{name}:{name}@onnxruntime",
    "engine": "./tiny-{name}:fp16@{name}",
    "registry": "{name}",
}


def made(folder: Path, kind: str, name: str, architecture: str | None = None) -> Path:
    """A new package, written."""
    new = scaffold.package(kind, name, architecture, load())
    scaffold.write(new, folder / new.distribution)
    return folder / new.distribution


def dist_info(folder: Path) -> Path:
    """What installing would write beside the package, from its pyproject.toml."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {value}\n" for name, value in project["entry-points"]["engine_recipes"].items()]
    (info / "entry_points.txt").write_text("[engine_recipes]\n" + "".join(points))
    return folder


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes and installs a new package; returns its folder."""

    def run(kind: str, name: str) -> Path:
        folder = dist_info(made(tmp_path, kind, name))
        install(monkeypatch, folder)
        return folder

    yield run
    for module in [name for name in sys.modules if name.startswith(("engine_recipes_my_", "engine_recipes_mine"))]:
        del sys.modules[module]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_is_listed_with_its_owner_builds_and_generates(
    kind: str, installed: Callable[[str, str], Path], recipes: Recipes, own_world: Path
) -> None:
    installed(kind, "my-own")
    listed = recipes("list", "--json")
    assert listed.err == ""
    owned = [row["ref"] for row in listed.json["recipes"] if "engine-recipes-my-own" in row["owner"]]
    assert owned
    assert all("my-own" in ref for ref in owned)
    architecture = ["--architecture", "MyOwnForCausalLM"] if kind == "family" else []
    command = [sys.executable, "-m", "engine_recipes.testing", "tiny-my-own", *architecture]
    subprocess.run(command, check=True, capture_output=True)
    ref = REFS[kind].format(name="my-own")
    built = recipes("build", ref, "--no-validate", "--json")
    assert built.code == 0, built.err
    assert [build["status"] for build in built.json["builds"]] == ["built"]
    ran = recipes("run", ref, "Hello", "--max-tokens", "4")
    assert ran.code == 0, ran.err
    assert "4 tokens" in ran.err


def test_the_own_tests_of_new_packages_pass(tmp_path: Path, installed: Callable[[str, str], Path]) -> None:
    folders = [installed(kind, f"my-{kind}") for kind in KINDS]
    # the conformance of some takes a minute; that of the package without code must do here
    chosen = "test_a_ or test_rows or my-registry"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "-k", chosen]
    command += [
        "--import-mode=importlib",
        "-c",
        str(folders[0] / "pyproject.toml"),
        *(str(f / "tests") for f in folders),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stdout
    assert int(re.findall(r"(\d+) passed", ran.stdout)[0]) >= 15, ran.stdout


@pytest.mark.parametrize("name", ["x", "a-name-that-is-as-long-as-names-can-be-2"])
def test_new_packages_are_clean_for_ruff(tmp_path: Path, name: str) -> None:
    pytest.importorskip("ruff")
    folders = [made(tmp_path / kind, kind, name) for kind in KINDS]
    ruff = [sys.executable, "-m", "ruff"]
    rules = "E,F,I,UP,B,SIM,RUF,TID,ANN"
    ignore = "ANN401,RUF001,RUF002,RUF003"
    for command in (["check", "--no-cache", "--extend-select", rules, "--ignore", ignore], ["format", "--check"]):
        ran = subprocess.run([*ruff, *command, *folders], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout


def test_new_packages_are_clean_for_strict_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "all").mkdir()
    for kind in KINDS:
        folder = made(tmp_path, kind, f"my-{kind}")
        shutil.move(folder / f"engine_recipes_my_{kind}", tmp_path / "all")
        shutil.move(folder / "tests" / "test_conformance.py", tmp_path / "all" / f"test_{kind}.py")
    path = os.pathsep.join(str(ROOT / root) for root in ("core", "recipes", "plugins", "engines"))
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", os.devnull, "."],
        cwd=tmp_path / "all",
        env={**os.environ, "MYPYPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_the_templates_name(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, kind, "zeta_2-b")
    assert folder.name == "engine-recipes-zeta-2-b"
    for path in folder.rglob("*"):
        assert "acme" not in str(path.relative_to(folder)).lower()
        assert path.is_dir() or "acme" not in path.read_text().lower(), path
    assert (folder / "engine_recipes_zeta_2_b" / "registry.toml").is_file()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == folder.name
    assert project["entry-points"]["engine_recipes"] == {"zeta_2-b": "engine_recipes_zeta_2_b"}
    readme = (folder / "README.md").read_text()
    assert all(str(link) in readme for link in ("tests/test_conformance.py", "engine_recipes_zeta_2_b/registry.toml"))


def test_a_registry_package_has_no_python_code(tmp_path: Path) -> None:
    folder = made(tmp_path, "registry", "mine")
    assert [path.name for path in (folder / "engine_recipes_mine").iterdir()] == ["registry.toml"]


# --- the engine and the precision are what they say ---------------------------------------------------------------


@pytest.mark.parametrize(
    "differences",
    [
        {},
        {"qkv_bias": True, "dense_bias": True, "mlp_bias": True, "tied": True},
        {"qk_norm": True},
        {"activation": "gelu_pytorch_tanh", "embedding_scale": 8.0, "tied": True},
        {"rotary_size": 16},
    ],
    ids=["plain", "biases", "qk norm", "gelu and scale", "partial rope"],
)
def test_the_new_engine_computes_what_onnxruntime_does(
    differences: dict[str, Any], tmp_path: Path, installed: Callable[[str, str], Path]
) -> None:
    from engine_recipes_engines import onnxruntime

    installed("engine", "mine")
    config = testing.tiny_config("Qwen3ForCausalLM" if "qk_norm" in differences else "LlamaForCausalLM")
    folder = converted(tmp_path, config, from_hf(config, **differences))
    engine = import_module("engine_recipes_mine.engine")
    ids = np.random.default_rng(0).integers(256, size=40).tolist()
    found = []
    for module in (engine, onnxruntime):
        out = tmp_path / module.__name__
        out.mkdir()
        given = (Artifact("trtllm-checkpoint", folder, ""), Artifact("hf-checkpoint", tmp_path / "source", ""))
        module.stage2(StageContext("", "stage2", {"max_seq_len": 64}, given, out))
        runtime = module.load_engine(out, {}) if module is onnxruntime else module.load_engine(out)
        assert runtime.max_seq_len == 64
        found += [runtime.logits(ids), runtime.stepwise_logits(ids)]
        runtime.close()
    for logits in found[:2]:
        np.testing.assert_allclose(logits, found[2], atol=2e-4 * np.abs(found[2]).max())


def converted(folder: Path, config: dict[str, Any], decoder: Decoder) -> Path:
    """The source and a float32 checkpoint of it."""
    testing.write_checkpoint(folder / "source", config, decoder)
    decoder.write(folder / "source" / "decoder.json")
    (folder / "source" / "source.json").write_text("{}")
    (folder / "checkpoint").mkdir()
    with checkpoint.open_source(folder / "source") as source:
        checkpoint.convert(source, folder / "checkpoint", dtype="float32")
    return folder / "checkpoint"


def test_the_new_precision_loses_more_with_fewer_bits(tmp_path: Path, installed: Callable[[str, str], Path]) -> None:
    installed("precision", "mine")
    precision = import_module("engine_recipes_mine.precision")
    config = testing.tiny_config()
    exact = converted(tmp_path, config, from_hf(config))
    name, errors = "transformer.layers.1.mlp.proj.weight", []
    for bits in (2, 4, 8):
        out = tmp_path / str(bits)
        out.mkdir()
        given = (Artifact("hf-checkpoint", tmp_path / "source", ""),)
        precision.stage1(StageContext("", "stage1", {"bits": bits, "tp_size": 2, "pp_size": 1}, given, out))
        checkpoint.verify(out)
        with checkpoint.open_checkpoint(out) as rounded, checkpoint.open_checkpoint(exact) as source:
            before, after = source.array(name), rounded.array(name).astype(np.float32)
            errors.append(float(np.linalg.norm(after - before) / np.linalg.norm(before)))
            assert all(len(np.unique(row)) < 2**bits for row in after)
    assert errors[0] > 0.5 > errors[1] > 0.05 > errors[2] > 0.003


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_new_precision_rounds_to_the_nearest_level(bits: int, installed: Callable[[str, str], Path]) -> None:
    installed("precision", "mine")
    rows = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    rows[1] = 0
    result = import_module("engine_recipes_mine.precision").rounded(rows, bits)
    step = np.abs(rows).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    assert (np.abs(result - rows) <= step / 2 * 1.001).all()
    assert len(np.unique(result[0])) <= 2**bits - 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_workflow_installs_an_extra_that_there_is_and_a_family_meets_transformers(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, kind, "mine")
    extras = tomllib.loads((folder / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    workflow = (folder / ".github" / "workflows" / "test.yml").read_text()
    (used,) = re.findall(r"'\.\[(\w+)\]'", workflow)
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in workflow  # torch without CUDA
    wanted = " ".join(extras[used])
    assert "engine-recipes-mine[test]" in wanted or used == "test"
    assert ("transformers" in wanted) is (kind == "family")


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_package_sends_nobody_to_an_index_that_has_no_engine_recipes(tmp_path: Path, kind: str) -> None:
    folder = made(tmp_path, kind, "mine")
    assert "pypi.org" not in "".join(path.read_text() for path in folder.rglob("*") if path.is_file())
    assert "pip install wheels/engine_recipes-*.whl" in (folder / ".github" / "workflows" / "test.yml").read_text()
    assert "--outdir wheels" in (folder / "README.md").read_text()


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Acme", "did you mean acme?"),
        ("my.model", "did you mean my-model?"),
        ("a name", "did you mean a-name?"),
        ("-x", "did you mean x?"),
        ("engine-recipes-", "up to 40"),
        ("", "up to 40"),
        ("../x", "did you mean x?"),
        ("7b", "a letter first"),
        ("x" * 41, "up to 40"),
        ("é", "up to 40"),
    ],
)
def test_what_is_no_name_is_refused(name: str, hint: str) -> None:
    with pytest.raises(RequestError, match="is no name for a package") as caught:
        scaffold.package("engine", name, None, load())
    assert hint in caught.value.hint


def test_the_prefix_may_be_given() -> None:
    assert scaffold.package("engine", "engine-recipes-mine", None, load()).name == "mine"


@pytest.mark.parametrize(
    ("kind", "name", "architecture", "said"),
    [
        ("engine", "onnxruntime", None, r"engines.onnxruntime belongs to engine-recipes \d"),
        ("precision", "plain", None, r"precisions.plain belongs to engine-recipes-toy 1"),
        ("family", "models", None, "there is a package engine_recipes_models already"),
        ("registry", "smollm2", None, "'smollm2' means smollm2-135m already"),
        ("family", "mine", "LlamaForCausalLM", r"belongs to the family llama of engine-recipes \d"),
        ("family", "mine", "No Class", "'No Class' is no class name"),
        ("engine", "mine", "MineForCausalLM", "--architecture is for a family"),
    ],
)
@pytest.mark.usefixtures("toy")
def test_what_is_there_already_is_refused_and_whose_it_is_is_said(
    kind: str, name: str, architecture: str | None, said: str
) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        scaffold.package(kind, name, architecture, load())
    assert caught.value.hint


def test_a_package_is_not_made_twice(installed: Callable[[str, str], Path]) -> None:
    installed("engine", "mine")
    for kind in KINDS:
        with pytest.raises(RequestError, match="engine_recipes_mine already"):
            scaffold.package(kind, "mine", None, load())


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_what_lies_at_the_place_is_left_alone(tmp_path: Path, there: str) -> None:
    place = tmp_path / "place"
    if there == "folder":
        place.mkdir()
    elif there == "file":
        place.write_text("mine")
    else:
        place.symlink_to(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="is there already"):
        scaffold.write(scaffold.Package("engine", "mine", "X"), place)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "place"}
    assert there != "file" or place.read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "place"
    with pytest.raises(MachineError) as caught:
        scaffold.write(scaffold.Package("engine", "mine", "X"), place)
    assert caught.value.message == f"{place} cannot be written: Not a directory"
    assert caught.value.hint == "choose another place: --folder DIR"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_text
    count = 0

    def interrupted(path: Path, *arguments: Any, **more: Any) -> int:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return written(path, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scaffold.write(scaffold.Package("family", "mine", "X"), tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_kill_leaves_nothing_that_looks_like_a_package(tmp_path: Path) -> None:
    code = (
        "import os, pathlib; from engine_recipes import scaffold\n"
        "pathlib.Path.rename = lambda *_: os._exit(9)\n"
        "scaffold.write(scaffold.Package('family', 'mine', 'X'), pathlib.Path('place'))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 9
    assert not (tmp_path / "place").exists()
    scaffold.write(scaffold.Package("family", "mine", "X"), tmp_path / "place")
    assert (tmp_path / "place" / "pyproject.toml").is_file()


def test_templates_are_packages_that_find_nothing_of_ours_installed() -> None:
    """A template that lies on the path would claim the name acme."""
    assert PathFinder.find_spec("engine_recipes_acme") is None  # not sys.modules, where other tests leave theirs


@pytest.mark.parametrize(
    ("name", "architecture", "hint"),
    [
        ("Größe", None, "up to 40 lower-case letters"),
        ("a--b", None, "did you mean a-b?"),
        ("mine", "", "give the one of `architectures`"),
    ],
)
def test_a_name_that_would_not_do_is_refused_with_one_that_would(
    name: str, architecture: str | None, hint: str
) -> None:
    with pytest.raises(RequestError) as caught:
        scaffold.package("family", name, architecture, load())
    assert caught.value.hint.startswith(hint)
