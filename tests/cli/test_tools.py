"""Engines that run a program of the user's, and engines for a GPU that is not here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from conftest import Recipes, install, package

REF = "./toy-model:plain@tool"


@pytest.fixture
def toy_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program `toy-tool` on the PATH, which writes how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "toy-tool"
    program.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'w').write(' '.join(sys.argv[1:]))\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return program


def test_without_its_program_nothing_begins(toy_model: Path, recipes: Recipes, workspace: Path) -> None:
    ran = recipes("build", REF, "--target", "cpu")
    assert ran.code == 3
    assert ran.error == ["tool needs the program toy-tool, not found here", "install toy-tool 2.0, or --runtime docker"]
    assert not workspace.exists()


def test_plan_prints_the_command_that_build_runs(toy_model: Path, recipes: Recipes, toy_tool: Path) -> None:
    choices = ["--target", "cpu", "--set", "build.size=7"]
    rows = {row["name"]: row for row in recipes("plan", REF, "--json", *choices).json["stages"]}
    assert rows["stage1"]["command"] is None
    built = recipes("build", REF, "--json", *choices).json["builds"][0]
    checkpoint, engine = built["checkpoint_dir"], built["engine_dir"]
    assert rows["stage2"]["command"] == ["toy-tool", "--size", "7", checkpoint, f"{engine}/tool.txt"]
    ran = Path(engine, "tool.txt").read_text().split()
    assert ran[:3] == ["--size", "7", checkpoint], "what was run is what was shown, but for the folder it wrote to"
    assert f"toy-tool --size 7 {checkpoint} {engine}/tool.txt" in recipes("plan", REF, *choices).out


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("print('chatter'); return ['sh', '-c', 'true']", 0, ""),
        ("raise ValueError('boo')", 4, "command of engine evil (acme-evil 0.3) failed: ValueError: boo"),
        ("import os; os._exit(0)", 4, "command of engine evil (acme-evil 0.3) ended with exit code 0 and no result"),
        ("return 'sh -c true'", 3, "engine evil (acme-evil 0.3) cannot be used: its `command` returned 'sh -c true'"),
    ],
)
def test_a_command_that_goes_wrong_is_its_plugins_fault_and_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    toy_model: Path,
    recipes: Recipes,
    body: str,
    code: int,
    message: str,
) -> None:
    registry = """
api = 1
[engines.evil]
module = "acme_evil.mod"
takes = ["toy-checkpoint"]
gives = "evil-engine"
targets = ["cpu"]
programs = { local = ["sh"] }
"""
    module = f"from engine_recipes import hookimpl\n@hookimpl\ndef command(context):\n    {body}\n"
    install(monkeypatch, package(tmp_path / "evil", "acme-evil", registry, mod=module))
    assert recipes("build", "./toy-model:plain@evil", "--until", "stage1").code == 0
    ran = recipes("plan", "./toy-model:plain@evil", "--json")
    assert ran.code == code
    if code:  # what the plugin printed, a traceback perhaps, and then the two lines
        assert ran.out == ""
        first, hint = ran.err.splitlines()[-2:]
        assert first.startswith(f"error: {message}")
        assert "authors" in hint
    else:
        assert [stage["command"] for stage in ran.json["stages"] if stage["command"]] == [["sh", "-c", "true"]]


def test_what_the_engine_tells_is_in_the_manifest_and_its_cache_outlives_the_build(
    toy_model: Path, recipes: Recipes, toy_tool: Path, workspace: Path
) -> None:
    import json

    built = recipes("build", REF, "--target", "cpu", "--json").json["builds"][0]
    manifest = json.loads(Path(built["engine_dir"], "manifest.json").read_text())
    assert manifest["result"] == {"versions": {"toy-tool": "2.0.1"}}
    assert (workspace / "caches" / "tool" / "warm").is_file()


def test_an_engine_for_a_gpu_that_is_not_here_is_built_and_simulated_and_that_is_said(
    toy_model: Path, recipes: Recipes, toy_tool: Path
) -> None:
    built = recipes("build", REF, "--target", "sm89", "--json").json["builds"][0]
    assert built["status"] == "built"
    assert built["validation"]["verdict"] == "warn"
    (check,) = (check for check in built["validation"]["checks"] if check["name"] == "engine ran")
    assert check["verdict"] == "warn"
    assert "sm89" in check["note"] and "simulated" in check["note"]
    assert built["validation"]["samples"], "its text was judged all the same"
    err = recipes("build", REF, "--target", "sm89", "--force").err
    assert "recipes validate FOLDER" in err and "try: recipes run" not in err
    assert not list(Path(built["engine_dir"]).glob("**/scratch.txt"))


def test_what_cannot_be_simulated_is_carried_to_its_gpu(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", "./toy-model:plain@echo", "--target", "sm89")
    assert ran.code == 3
    assert "sm89" in ran.error[0]
    assert "recipes validate FOLDER" in ran.error[1]
    assert recipes("build", "./toy-model:plain@echo", "--target", "sm89", "--no-validate").code == 0


def test_run_on_a_machine_without_its_gpu_says_so_before_anything_is_loaded(
    toy_model: Path, recipes: Recipes, toy_tool: Path
) -> None:
    assert recipes("build", REF, "--target", "sm89", "--no-validate").code == 0
    ran = recipes("run", REF, "abc", "--target", "sm89")
    assert ran.code == 3
    assert "sm89" in ran.error[0]
    ran = recipes("bench", REF, "--target", "sm89")
    assert ran.code == 3


def test_how_to_run_it_reaches_the_engine_when_it_is_loaded(toy_model: Path, recipes: Recipes, toy_tool: Path) -> None:
    assert recipes("build", REF, "--target", "cpu").code == 0
    assert recipes("run", REF, "abc", "--raw", "--target", "cpu").out == "cba\n"
    ran = recipes("run", REF, "abc", "--raw", "--target", "cpu", "--runtime", "docker")
    assert "docker" in ran.error[0]


def test_an_engine_without_tools_has_no_runtime_to_choose(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("plan", "./toy-model:plain@echo", "--runtime", "docker")
    assert ran.code == 2
    assert ran.error == ["echo calls no tools of yours: it has no --runtime", "leave it out"]


def test_the_stages_before_the_engine_need_nothing_of_it(toy_model: Path, recipes: Recipes) -> None:
    ran = recipes("build", REF, "--target", "cpu", "--until", "stage1")
    assert ran.code == 0, ran.err
    assert recipes("build", REF, "--target", "cpu").code == 3


def test_what_is_there_already_needs_no_tool(toy_model: Path, recipes: Recipes, toy_tool: Path) -> None:
    assert recipes("build", REF, "--target", "cpu").code == 0
    toy_tool.unlink()
    ran = recipes("build", REF, "--target", "cpu", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["builds"][0]["status"] == "cached"


def test_plan_says_which_stage_is_blocked_and_by_what(toy_model: Path, recipes: Recipes) -> None:
    rows = {row["name"]: row for row in recipes("plan", REF, "--target", "cpu", "--json").json["stages"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "resolve": "to run",
        "stage1": "to run",
        "stage2": "blocked",
        "baseline": "to run",
        "validate": "to run",
    }
    assert "toy-tool" in rows["stage2"]["reason"]


def test_what_cannot_fit_is_refused_before_any_work_unless_forced(
    toy_model: Path, recipes: Recipes, workspace: Path
) -> None:
    Path("registry.toml").write_text("[engines.echo]\ncosts = { memory_base = 1_000_000_000_000_000 }\n")
    ran = recipes("build", "./toy-model:plain@echo")
    assert ran.code == 3
    assert "stage2 of ./toy-model:plain@echo needs about 1000.0 TB of memory" in ran.error[0]
    assert "--force" in ran.error[1]
    assert not (workspace / "checkpoints").exists()
    rows = recipes("plan", "./toy-model:plain@echo", "--json").json["stages"]
    assert "1000.0 TB" in rows[0]["reason"] and rows[0]["status"] == "blocked"
    assert recipes("build", "./toy-model:plain@echo", "--until", "stage1").code == 0
    assert recipes("build", "./toy-model:plain@echo", "--force").code == 0
    assert recipes("build", "./toy-model:plain@echo").code == 0, "what is there already needs nothing"


def test_an_engine_of_another_version_of_its_library_is_refused_before_it_is_loaded(
    toy_model: Path, recipes: Recipes
) -> None:
    import json

    Path("registry.toml").write_text('[engines.echo]\nrequires = ["numpy>=1"]\nbinds = ["numpy"]\n')
    built = recipes("build", "./toy-model:plain@echo", "--json").json["builds"][0]
    manifest = Path(built["engine_dir"], "manifest.json")
    data = json.loads(manifest.read_text())
    here = data["machine"]["versions"]["numpy"]
    data["machine"]["versions"]["numpy"] = "1.0.1"
    manifest.write_text(json.dumps(data))
    for command in (["run", "./toy-model:plain@echo", "abc"], ["bench", "./toy-model:plain@echo"]):
        ran = recipes(*command)
        assert ran.code == 3
        assert ran.error[0] == f"this engine was built with numpy 1.0.1, this machine has {here}"
        assert "recipes build ./toy-model:plain@echo" in ran.error[1]
    assert recipes("validate", "./toy-model:plain@echo").code == 3


def test_a_tool_that_stage_two_calls_itself_is_looked_for_and_may_be_named_by_its_variable(
    toy_model: Path, recipes: Recipes, toy_tool: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("registry.toml").write_text('[engines.echo]\ntools = ["$TOY_CC|no-such-compiler"]\n')
    refused = recipes("build", "./toy-model:plain@echo")
    assert refused.code == 3
    assert refused.error == [
        "echo needs the program no-such-compiler, not found here",
        "install no-such-compiler, or name another in the environment variable TOY_CC",
    ]
    assert not workspace.exists()
    assert recipes("build", "./toy-model:plain@echo", "--until", "stage1").code == 0
    checks = {row["name"]: row for row in recipes("doctor", "--json").json["checks"]}
    assert checks["no-such-compiler"]["verdict"] == "missing"
    monkeypatch.setenv("TOY_CC", "toy-tool")
    assert recipes("build", "./toy-model:plain@echo").code == 0
    checks = {row["name"]: row for row in recipes("doctor", "--json").json["checks"]}
    assert checks["toy-tool"]["found"].startswith(str(toy_tool))
