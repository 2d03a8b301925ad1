from __future__ import annotations

from pathlib import Path

import pytest

from conftest import install, package
from engine_recipes import MachineError, RequestError, StageContext, StageFailed
from engine_recipes.host import Host, import_problem, import_seconds
from engine_recipes.types import Provider

CONTEXT = StageContext("m:p@e", "stage1", {}, (), Path())
HOOK = "from engine_recipes import hookimpl\n@hookimpl\ndef {name}({arguments}):\n    {body}\n"


def provider(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, name: str = "acme_p") -> Provider:
    install(monkeypatch, package(tmp_path / name, name.replace("_", "-"), "", mod=text))
    return Provider("precision", "nvfp4", f"{name}.mod", name.replace("_", "-"), "0.3")


def test_only_the_chosen_provider_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [HOOK.format(name="stage1", arguments="context", body=f"print('{n}')") for n in ("one", "two")]
    one, two = (provider(tmp_path, monkeypatch, text, f"acme_{i}") for i, text in enumerate(texts))
    Host([one, two]).stage1(one, CONTEXT)
    assert capsys.readouterr().out == "one\n"


def test_validate_asks_everyone_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "from engine_recipes import Check; return [Check('{}', 'pass')]"
    texts = [HOOK.format(name="validate", arguments="context", body=body.format(n)) for n in ("one", "two")]
    host = Host(provider(tmp_path, monkeypatch, text, f"acme_{i}") for i, text in enumerate(texts))
    assert [check.name for check in host.validate(CONTEXT)] == ["one", "two"]


def test_an_answer_that_is_no_verdict_is_its_plugins_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "from engine_recipes import Check; return [Check('size', 'failed')]"
    host = Host([provider(tmp_path, monkeypatch, HOOK.format(name="validate", arguments="context", body=body))])
    with pytest.raises(StageFailed, match=r"\(acme-p 0\.3\) answered Check\(name='size', verdict='failed'"):
        host.validate(CONTEXT)


def test_a_verdict_without_a_name_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "from engine_recipes import Check; return [Check(' ', 'fail')]"
    text = HOOK.format(name="validate", arguments="context", body=body)
    with pytest.raises(StageFailed, match="no Check and no Measure with a name"):
        Host([provider(tmp_path, monkeypatch, text, "acme_nameless")]).validate(CONTEXT)


def test_the_traceback_of_what_hangs_shows_its_place_and_nothing_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_IMPORT_SECONDS", "0.2")
    problem = import_problem(provider(tmp_path, monkeypatch, "import time\ntime.sleep(60)", "acme_hung"))
    assert "mod.py" in problem and "line 2" in problem
    assert "_Hangs" not in problem and "host" not in problem


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
        ("raise type('Odd', (BaseException,), {})('one\\ntwo')", "Odd: one"),
        ("raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})", "Mute"),
        (HOOK.format(name="stage_1", arguments="context", body="pass"), "unknown hook 'stage_1'"),
        (HOOK.format(name="stage1", arguments="contxt", body="pass"), "contxt"),
    ],
)
def test_a_broken_plugin_is_named_with_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    with pytest.raises(MachineError) as caught:
        Host([provider(tmp_path, monkeypatch, text, f"acme_{abs(hash(text))}")])
    assert caught.value.message.startswith("precision nvfp4 (acme-")
    assert reason in caught.value.message
    assert "uninstall acme-" in caught.value.hint
    assert "two" not in caught.value.message


def test_a_provider_without_the_hook_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"acme_empty\.mod has no `@hookimpl def stage1`"):
        Host().stage1(provider(tmp_path, monkeypatch, "", "acme_empty"), CONTEXT)


def test_a_family_that_returns_nonsense_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HOOK.format(name="resolve_checkpoint", arguments="config", body="return 3")
    with pytest.raises(MachineError, match="returned int, not Decoder"):
        Host().resolve_checkpoint(provider(tmp_path, monkeypatch, text, "acme_int"), CONTEXT, {})


def test_an_error_of_ours_passes_through_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from engine_recipes import RequestError\nraise RequestError('not so', 'but so')"
    broken = provider(tmp_path, monkeypatch, text, "acme_own")
    with pytest.raises(RequestError) as caught:
        Host([broken])
    assert (caught.value.message, caught.value.hint) == ("not so", "but so")
    problem = import_problem(broken)
    assert problem.startswith("not so\n") and "mod.py" in problem and "host.py" not in problem


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 30), ("often", 30), ("nan", 30), ("7.5", 7.5), ("inf", 86400), ("1e10", 86400), ("-inf", 0.1), ("0", 0.1)],
)
def test_any_text_gives_a_time_that_a_timer_takes(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float) -> None:
    monkeypatch.setenv("RECIPES_IMPORT_SECONDS", text)
    assert import_seconds() == seconds


def test_what_takes_too_long_is_stopped_and_the_hint_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_IMPORT_SECONDS", "0.2")
    slow = provider(tmp_path, monkeypatch, "import time\ntime.sleep(60)", "acme_slow")
    asked = HOOK.format(name="command", arguments="context", body="import time; time.sleep(60)")
    for what, call in (
        ("importing acme_slow.mod", lambda: Host([slow])),
        ("its `command`", lambda: Host().command(provider(tmp_path, monkeypatch, asked, "acme_asked"), CONTEXT)),
    ):
        with pytest.raises(MachineError, match=f"{what} took more than 0.2 seconds") as caught:
            call()
        assert "RECIPES_IMPORT_SECONDS" in caught.value.hint


@pytest.mark.parametrize("answer", ["3", "'my tool --x'", "b'tool'", "['tool', 3]", "{'tool'}", "[None]"])
def test_a_command_that_is_no_list_of_words_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    text = HOOK.format(name="command", arguments="context", body=f"return {answer}")
    with pytest.raises(MachineError, match=r"\(acme-words 0\.3\) cannot be used: its `command` returned"):
        Host().command(provider(tmp_path, monkeypatch, text, "acme_words"), CONTEXT)


@pytest.mark.parametrize(("answer", "lacks"), [("None", "generate"), ("type('R', (), {'generate': print})()", "close")])
def test_an_engine_that_loads_as_something_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, lacks: str
) -> None:
    text = HOOK.format(name="load_engine", arguments="folder", body=f"return {answer}")
    with pytest.raises(StageFailed, match=f"acme-loads 0.3.*has no {lacks}"):
        Host().load_engine(provider(tmp_path, monkeypatch, text, "acme_loads"), tmp_path, {})
