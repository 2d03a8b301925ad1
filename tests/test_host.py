from __future__ import annotations

from pathlib import Path

import pytest

from conftest import install, package
from engine_recipes import MachineError, StageContext, StageFailed
from engine_recipes.host import Host
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
    with pytest.raises(StageFailed, match=r"validate of acme_p\.mod answered Check\(name='size', verdict='failed'"):
        host.validate(CONTEXT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import not_there", "ModuleNotFoundError: No module named 'not_there'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError"),
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


def test_a_provider_without_the_hook_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match=r"acme_empty\.mod has no `@hookimpl def stage1`"):
        Host().stage1(provider(tmp_path, monkeypatch, "", "acme_empty"), CONTEXT)


def test_a_family_that_returns_nonsense_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = HOOK.format(name="resolve_checkpoint", arguments="config", body="return 3")
    with pytest.raises(MachineError, match="returned int, not Decoder"):
        Host().resolve_checkpoint(provider(tmp_path, monkeypatch, text, "acme_int"), CONTEXT, {})
