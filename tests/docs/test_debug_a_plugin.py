"""What the page has for a debugger runs as it stands, with a new precision installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Recipes, install

PAGE = ROOT / "docs" / "how-to" / "debug-a-plugin.md"


def test_a_hook_of_a_new_precision_can_be_called_in_ones_own_process(
    recipes: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "package"
    assert recipes("new", "precision", "acme", "--folder", folder).code == 0
    install(monkeypatch, folder)
    code = PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "rank0.safetensors" in ran.stdout
