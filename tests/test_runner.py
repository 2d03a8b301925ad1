from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import tiny
from conftest import Recipes, command
from engine_recipes import api, gate, history, runner, testing
from engine_recipes.errors import MachineError, Rejected, RequestError, StageFailed
from engine_recipes.events import Event
from engine_recipes.runner import How

REF = "./toy-model:plain@echo"


def test_a_strangers_package_builds_through_every_stage(toy_model: Path, workspace: Path) -> None:
    events: list[Event] = []
    build = api.build(REF, listen=events.append)
    assert build.status == "built"
    assert [(s.name, s.status) for s in build.stages] == [
        ("resolve", "run"),
        ("stage1", "run"),
        ("stage2", "run"),
        ("baseline", "run"),
        ("validate", "run"),
    ]
    assert build.report.verdict == "pass"
    engine = build.path("stage2")
    assert engine is not None
    plain = workspace / "engines" / "toy-model-plain-echo-cpu"
    assert plain.resolve() == engine
    assert (engine / "tokenizer.json").exists()
    manifest = json.loads((engine / "manifest.json").read_text())
    assert manifest["ref"] == REF
    assert manifest["provider"] == {
        "kind": "engine",
        "name": "echo",
        "module": "engine_recipes_toy.echo",
        "package": "engine-recipes-toy",
        "version": "1.0",
    }
    assert [line["status"] for line in history.read(workspace)] == ["built"]
    assert {e["event"] for e in events} == {"stage", "progress"}
    assert all(s.peak_rss_bytes > 1 << 20 for s in build.stages)


def test_the_same_build_twice_does_nothing_twice(toy_model: Path, workspace: Path) -> None:
    api.build(REF)
    again = api.build(REF)
    assert again.status == "cached"
    assert {s.status for s in again.stages} == {"cached"}
    assert len(list(history.read(workspace))) == 1
    assert api.build(REF, how=How(force=True)).status == "built"
    assert len(api.open_setup().store.artifacts("engines")) == 1


def test_until_and_no_validate_stop_there(toy_model: Path) -> None:
    build = api.build(REF, how=How(until="stage1"))
    assert [s.name for s in build.stages] == ["resolve", "stage1"]
    build = api.build(REF, how=How(validate=False))
    assert build.stages[-1].status == "skipped"
    assert build.report.verdict == "not run"
    engine = build.path("stage2")
    assert engine is not None
    assert not engine.with_name("toy-model-plain-echo-cpu").exists()


def test_a_loaded_engine_generates(toy_model: Path) -> None:
    api.build(REF)
    loaded = api.load(REF)
    ids = loaded.tokenizer.encode("abc", special=False)
    assert loaded.tokenizer.decode(list(loaded.runtime.generate(ids, api_sampling()))) == "cba"


def api_sampling() -> object:
    from engine_recipes import Sampling

    return Sampling(max_tokens=10)


STAGES = ("resolve", "stage1", "stage2", "baseline", "validate")
PLACES = {
    "resolve": "sources",
    "stage1": "checkpoints",
    "stage2": "engines",
    "baseline": "baselines",
    "validate": "engines",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("mode", "message", "output"),
    [
        ("raise", "failed: ValueError: the toy broke", "Traceback"),
        ("exit", "ended with exit code 7 and no result", "a library prints this to stdout"),
    ],
)
def test_a_stage_that_fails_keeps_its_output_and_leaves_no_folder(
    toy_model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, stage: str, mode: str, message: str, output: str
) -> None:
    monkeypatch.setenv("TOY", f"{stage} {mode}")
    with pytest.raises(StageFailed) as caught:
        api.build(REF)
    assert f"{stage} of " in caught.value.message
    assert "(engine-recipes-toy 1.0)" in caught.value.message
    assert message in caught.value.message
    assert output in caught.value.output
    (log,) = (workspace / "logs").glob(f"{PLACES[stage]}*")
    assert output in log.read_text()
    assert str(log) in caught.value.hint
    left = 1 if stage == "validate" else 0  # the engine itself is good, it has no verdict yet
    assert len(list((workspace / PLACES[stage]).iterdir())) == left
    assert [line["status"] for line in history.read(workspace)] == ["failed"]
    monkeypatch.delenv("TOY")
    assert api.build(REF).status == "built"


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_said_in_two_lines(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setenv("TOY", f"{stage} disk")
    ran = recipes("build", REF)
    assert ran.code == 3
    assert ran.error[0].startswith("no space left on the device while writing")
    assert "--workspace" in ran.error[1]


def test_a_rejected_engine_is_kept_for_study_and_never_gets_the_plain_name(toy_model: Path, workspace: Path) -> None:
    api.build(REF)
    plain = workspace / "engines" / "toy-model-plain-echo-cpu"
    good = plain.resolve()
    with pytest.raises(Rejected, match=r"rejected: says something \(1, limit 0\.5\)"):
        api.build(REF, settings={"loud": "true"})
    assert plain.resolve() == good
    assert len(api.open_setup().store.artifacts("engines")) == 2
    with pytest.raises(Rejected):  # also when the verdict comes from the store
        api.build(REF, settings={"loud": "true"})


def test_a_stage_that_leaves_children_behind_takes_them_along(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY", "stage1 orphan")
    api.build(REF)
    deadline = time.monotonic() + 10
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans() == []


@pytest.mark.parametrize("action", ["build", "killed"])
def test_a_daemon_that_left_the_session_is_ended_with_its_stage(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    if action == "build":
        monkeypatch.setenv("TOY", "stage1 daemon")
        told: list[Event] = []
        api.build(REF, listen=told.append)
        (text,) = [event["text"] for event in told if event["event"] == "warn"]
        assert text.startswith("stage1 of precision plain (engine-recipes-toy 1.0) left 1 running, which were ended")
    else:  # the caller dies: the worker ends what it started before it follows
        monkeypatch.setenv("TOY", "stage1 daemon and sleep")
        process, _ = sleeping_build()
        assert orphans()
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 10
    while orphans() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphans() == []


def test_a_stage_that_writes_into_its_input_is_stopped_and_the_input_is_as_it_was(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = api.build(REF, how=How(until="stage1")).path("stage1")
    assert checkpoint is not None
    before = (checkpoint / "weights.json").read_text()
    monkeypatch.setenv("TOY", "stage2 trespass")
    with pytest.raises(
        StageFailed, match=r"stage2 of engine echo \(engine-recipes-toy 1\.0\) would write to .*weights"
    ):
        api.build(REF)
    assert (checkpoint / "weights.json").read_text() == before
    monkeypatch.setenv("TOY", "")
    assert [s.status for s in api.build(REF).stages][:2] == ["cached", "cached"]


@pytest.mark.parametrize("mode", ["tamper", "tamper and raise"])
def test_an_input_that_a_foreign_program_changed_is_made_again(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("TOY", f"stage2 {mode}")
    said = r"weights.json was changed while stage2 of engine echo .* read it" if mode == "tamper" else "the toy broke"
    with pytest.raises(StageFailed, match=said):
        api.build(REF)
    monkeypatch.setenv("TOY", "")
    build = api.build(REF)
    assert [s.status for s in build.stages][:2] == ["cached", "run"]
    checkpoint = build.path("stage1")
    assert checkpoint is not None
    assert not (checkpoint / "weights.json").read_text().endswith("\n")


def test_an_input_that_another_process_made_again_meanwhile_is_nobodys_fault(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "stage2 swap")
    build = api.build(REF)
    assert build.status == "built"
    assert [s.status for s in api.build(REF).stages][:2] == ["cached", "cached"]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("ask", "EOFError"),
        ("reject", "I say so"),
        ("strange", "stage1 of precision plain .* failed: Strange"),
    ],
)
def test_a_stage_that_raises_what_it_should_not_has_failed_and_no_more(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, mode: str, said: str
) -> None:
    monkeypatch.setenv("TOY", f"stage1 {mode}")
    with pytest.raises(StageFailed, match=said):
        api.build(REF)


def test_what_a_stage_says_is_shown_short_and_without_what_a_terminal_obeys(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "stage1 say much")
    ran = recipes("build", REF, "-v")
    assert ran.code == 4
    assert "]0;mine" in ran.err and "\x1b]0;mine" not in ran.err and "\x07" not in ran.err
    assert "failed: ValueError: yyyy" in ran.err
    assert len(ran.err) < 20_000


def test_who_empties_the_workspace_has_emptied_its_own_folder(
    toy_model: Path, workspace: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.build(REF)
    (workspace / "caches" / "echo").mkdir(parents=True)
    (workspace / "caches" / "echo" / "warm").touch()
    (workspace / "digests.json").touch()
    kept = [path for path in workspace.rglob("*") if path.is_file() and path.suffix != ".lock"]
    monkeypatch.setenv("TOY", "stage1 empty the workspace")
    ran = recipes("build", "./toy-model:plain@echo", "--set", "style=long", "--no-validate", "-v")
    assert "would write to" in ran.err and "this was refused" in ran.err
    assert all(path.exists() for path in kept)
    assert len(list(history.read(workspace))) == 2


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("swap its own", r"engine echo \(engine-recipes-toy 1\.0\): .* is no folder any more"),
        ("manifest", r"engine echo \(engine-recipes-toy 1\.0\): manifest\.json is not for a stage to write"),
    ],
)
def test_what_cannot_be_published_is_its_stages_fault_and_leaves_nothing(
    toy_model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch, mode: str, said: str
) -> None:
    monkeypatch.setenv("TOY", f"stage2 {mode}")
    with pytest.raises(StageFailed, match=said):
        api.build(REF)
    assert list((workspace / "engines").iterdir()) == []


def test_a_worker_that_ends_by_a_signal_without_a_name_is_said(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "stage1 signal 35")
    with pytest.raises(StageFailed, match=r"stage1 of precision plain .* was killed by signal 35"):
        api.build(REF)


@pytest.mark.parametrize("mode", ["share", "emit nonsense"])
def test_what_does_no_harm_is_no_matter(toy_model: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("TOY", f"stage1 {mode}")
    told: list[Event] = []
    build = api.build(REF, listen=told.append)
    assert build.status == "built"
    assert build.stages[1].bytes > 100  # the stage went on to its end
    assert [event for event in told if event["event"] == "warn"] == []


def test_an_artifact_with_a_link_out_of_its_folder_is_not_published(
    toy_model: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY", "stage2 link")
    with pytest.raises(StageFailed, match=r"link\.bin is a link that leads out of the stage's folder"):
        api.build(REF)
    assert not list((workspace / "engines").glob("toy*"))


@pytest.mark.parametrize("mode", ["fork", "fork and die"])
def test_a_forked_child_that_holds_the_pipes_does_not_hold_the_build(
    toy_model: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("TOY", f"stage1 {mode}")
    started = time.monotonic()
    if mode == "fork":
        assert api.build(REF).status == "built"
    else:
        with pytest.raises(StageFailed, match="was killed by SIGKILL"):
            api.build(REF)
    assert time.monotonic() - started < 14  # the child sleeps for longer


def test_a_checkpoint_that_moved_is_read_where_it_is_now(toy_model: Path, workspace: Path) -> None:
    api.build(REF)
    moved = toy_model.rename(toy_model.with_name("moved"))
    build = api.build("./moved:plain@echo", how=How(until="resolve"))
    assert build.stages[0].status == "run"
    assert build.stages[0].path is not None
    assert json.loads((build.stages[0].path / "source.json").read_text())["folder"] == str(moved)


def test_another_model_of_the_same_label_is_not_taken_for_this_one(toy_model: Path, tmp_path: Path) -> None:
    api.build(REF)
    Path("registry.toml").write_text('[models.toy-model]\nfamily = "toy"\nsource = "/not/here"\n')
    with pytest.raises(MachineError, match="toy-model:plain@echo for cpu is not built"):
        api.load("toy-model:plain@echo")


def orphans() -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if "orphan of the toy" in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def sleeping_build() -> tuple[subprocess.Popen[str], int]:
    """A build whose stage sleeps, and the pid of its worker."""
    process = subprocess.Popen(
        command("build", REF),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background may have told them to ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "sleeping in" in line:
            return process, int(line.split()[-1])
    raise AssertionError("the stage never slept")


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


KILLS: dict[str, tuple[Callable[[subprocess.Popen[str], int], None], int]] = {
    "Ctrl-C": (lambda parent, worker: parent.send_signal(signal.SIGINT), 130),
    "SIGTERM": (lambda parent, worker: parent.send_signal(signal.SIGTERM), 130),
    "kill -9 of the worker": (lambda parent, worker: os.kill(worker, signal.SIGKILL), 4),
    "kill -9 of the parent": (lambda parent, worker: parent.kill(), -9),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", KILLS)
def test_a_kill_loses_the_stage_in_hand_and_nothing_else(
    toy_model: Path, recipes: Recipes, monkeypatch: pytest.MonkeyPatch, stage: str, how: str
) -> None:
    monkeypatch.setenv("TOY", f"{stage} sleep")
    kill, code = KILLS[how]
    process, worker = sleeping_build()
    kill(process, worker)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert gone(worker)
    assert "Traceback" not in err
    assert ("was killed by SIGKILL" in err) == (how == "kill -9 of the worker")
    store = api.open_setup().store
    finished = [len(store.artifacts(place)) for place in ("sources", "checkpoints", "engines", "baselines")]
    assert finished == [int(i < STAGES.index(stage)) for i in range(4)]
    monkeypatch.delenv("TOY")
    again = recipes("build", REF, "--json")
    assert again.code == 0
    statuses = [s["status"] for s in again.json["builds"][0]["stages"]]
    assert statuses == ["cached"] * STAGES.index(stage) + ["run"] * (5 - STAGES.index(stage))
    assert store.garbage() == []


def test_two_processes_that_build_the_same_build_it_once(toy_model: Path, workspace: Path) -> None:
    both = [
        subprocess.Popen(command("build", REF, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    ran = [json.loads(process.communicate(timeout=60)[0])["builds"][0]["stages"] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    for a, b in zip(ran[0][:3], ran[1][:3], strict=True):
        assert sorted([a["status"], b["status"]]) == ["cached", "run"]
        assert a["path"] == b["path"]


def test_a_verdict_is_stored_with_the_key_it_was_given_for(toy_model: Path) -> None:
    build = api.build(REF)
    engine = build.path("stage2")
    assert engine is not None
    assert gate.read(engine) == build.report
    stage = build.plan.stage("validate")
    assert runner.status(build.plan, stage, api.open_setup().store, engine) == engine
    (engine / "validation.json").write_text("{}")
    assert runner.status(build.plan, stage, api.open_setup().store, engine) is None


def test_a_calibration_is_kept_for_other_choices_and_other_precisions(toy_model: Path) -> None:
    def statuses(ref: str, **settings: str) -> dict[str, str]:
        return {s.name: s.status for s in api.build(ref, settings=settings).stages}

    assert statuses("./toy-model:weighed@echo")["calibrate"] == "run"
    other = statuses("./toy-model:weighed@echo", style="long")
    assert (other["calibrate"], other["stage1"]) == ("cached", "run")
    twice = statuses("./toy-model:weighed-twice@echo")
    assert (twice["calibrate"], twice["stage1"]) == ("cached", "run")


def test_a_crash_while_writing_does_not_calibrate_again(toy_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY", "stage1 raise")
    build = runner.run(api.plan("./toy-model:weighed@echo"), api.open_setup().store, How(), lambda event: None)
    assert build.status == "failed"
    monkeypatch.delenv("TOY")
    again = api.build("./toy-model:weighed@echo")
    assert [(s.name, s.status) for s in again.stages][:3] == [
        ("resolve", "cached"),
        ("calibrate", "cached"),
        ("stage1", "run"),
    ]
    stage1 = again.path("stage1")
    assert stage1 is not None and json.loads((stage1 / "weights.json").read_text())["weight"] == 2


def test_what_a_provider_refuses_is_said_before_any_long_work(toy: None, own_world: Path) -> None:
    model = tiny.write(own_world / "here" / "flat", "llama", architectures=["ToyForCausalLM"], num_hidden_layers=1)
    testing.write_tokenizer(model)
    for _ in range(2):  # also when the source was resolved before
        told: list[Event] = []
        with pytest.raises(RequestError, match=r"one layer is too few, with \{'data': .*'tp_size': 3"):
            api.build("./flat:weighed@echo", settings={"tp_size": "3"}, listen=told.append)
        assert {e["stage"] for e in told if e.get("status") == "started"} <= {"resolve"}
    store = api.open_setup().store
    assert not store.artifacts("calibrations") and len(store.artifacts("sources")) == 1
    assert api.build("./flat:plain@echo").status == "built"


def test_until_calibrate_stops_there(toy_model: Path) -> None:
    build = api.build("./toy-model:weighed@echo", how=How(until="calibrate"))
    assert [s.name for s in build.stages] == ["resolve", "calibrate"]
    assert [s.name for s in api.build(REF, how=How(until="calibrate")).stages] == ["resolve"]


def test_an_engine_that_has_nothing_to_do_refuses_nothing(own_world: Path) -> None:
    model = tiny.write(own_world / "here" / "small-heads", "llama", num_attention_heads=16, num_key_value_heads=4)
    testing.write_tokenizer(model)
    with pytest.raises(RequestError, match="attention heads of 4"):
        api.build("./small-heads:fp16@onnxruntime")
    assert api.build("./small-heads:fp16@onnxruntime", how=How(until="stage1")).status == "built"


def test_data_that_changes_while_it_is_used_is_not_kept_under_the_old_key(toy_model: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one two three")
    plan = api.plan("./toy-model:weighed@echo", settings={"calib.data": str(words)})
    words.write_text("four")
    build = runner.run(plan, api.open_setup().store, How(), lambda event: None)
    assert build.error is not None and "words.txt changed while it was being used" in build.error.message
    assert not api.open_setup().store.artifacts("calibrations")
