from __future__ import annotations

from conftest import Recipes


def test_doctor_is_honest_and_always_exits_0(recipes: Recipes, toy: None) -> None:
    ran = recipes("doctor", "--json")
    assert ran.code == 0
    checks = {check["name"]: check for check in ran.json["checks"]}
    assert all(set(c) == {"name", "verdict", "found", "hint"} for c in checks.values())
    assert {c["verdict"] for c in checks.values()} <= {"ok", "warn", "missing"}
    assert checks["engine onnxruntime"]["verdict"] == "ok"
    assert "onnxruntime 1." in checks["engine onnxruntime"]["found"]
    assert checks["engine echo"]["found"] == "needs nothing more"
    assert "free" in checks["workspace"]["found"]
    assert "engine onnxruntime" in recipes("doctor").out
