"""Running a tool: its lines, its end, and what it leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from engine_recipes_engines.tensorrt_llm import process
from engine_recipes_engines.tensorrt_llm.process import TooLate, descendants, run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_lines_of_both_streams_come_in_order() -> None:
    said: list[str] = []
    code = "import sys\nfor i in range(3): print(i); print(-i, file=sys.stderr)\nprint('a\\rb', end='')"
    assert run(python(code), said.append) == 0
    assert said == ["0", "0", "1", "-1", "2", "-2", "a", "b"]


def test_what_ends_our_group_ends_the_tool() -> None:
    said: list[str] = []
    run(python("import os; print(os.getpgid(0))"), said.append)
    assert said == [str(os.getpgid(0))]


@pytest.mark.parametrize("code", ["import os; os.kill(os.getpid(), 9)", "import sys; sys.exit(137)"])
def test_death_by_a_signal_is_told_also_when_a_container_tells_it(code: str) -> None:
    assert run(python(code), print) == -signal.SIGKILL
    assert run(python("import sys; sys.exit(2)"), print) == 2


def test_a_child_that_holds_the_pipe_open_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE", 0.5)
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    said: list[str] = []
    before = time.monotonic()
    assert run(python(code), said.append) == 0
    os.kill(int(said[0]), signal.SIGKILL)
    assert time.monotonic() - before < 20


def test_a_tool_that_closed_its_output_is_still_waited_for_and_limited() -> None:
    code = "import os, time; os.close(1); os.close(2); time.sleep({})"
    assert run(python(code.format(0.3)), print) == 0
    with pytest.raises(TooLate):
        run(python(code.format(60)), print, seconds=0.5)


def test_an_error_while_listening_ends_the_tool(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail(line: str) -> None:
        pids.append(int(line))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(python("import os, time; print(os.getpid()); time.sleep(60)"), fail)
    assert not Path(f"/proc/{pids[0]}").exists()
    assert pids[0] not in descendants(os.getpid())
