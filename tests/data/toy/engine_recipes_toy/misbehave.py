"""The ways a stage can go wrong, on demand: TOY="stage1 raise", for example. Not an option: it must not be in keys."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.shared_memory import SharedMemory

from engine_recipes import Rejected, events


def misbehave(context) -> None:
    (context.out / "half.bin").write_bytes(b"half written")
    events.progress("working", 1, 2, "steps")
    print("a library prints this to stdout")
    stage, _, mode = os.environ.get("TOY", "").partition(" ")
    if stage != context.stage:
        return
    if mode == "exit":
        os._exit(7)
    if mode == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(context.out / "half.bin"))
    if mode == "orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # orphan of the toy"])
    if mode.startswith("daemon"):
        words = [sys.executable, "-c", "import time; time.sleep(600)  # orphan of the toy"]
        subprocess.Popen(words, start_new_session=True)
    if mode == "trespass":
        (context.inputs[0].path / "weights.json").write_text("{}")
    if mode.startswith("tamper"):  # by another program: what a C library does looks the same
        subprocess.run(["sh", "-c", 'echo >> "$0"', str(context.inputs[0].path / "weights.json")], check=True)
    if mode == "swap":  # as another process does that makes it again
        words = 'cp -r "$0" "$0.new" && rm -r "$0" && mv "$0.new" "$0"'
        subprocess.run(["sh", "-c", words, str(context.inputs[0].path)], check=True)
    if mode == "ask":
        input("Trust remote code? [y/N] ")
    if mode == "share":
        memory = SharedMemory(create=True, size=64)
        memory.close()
        memory.unlink()
    if mode == "emit nonsense":
        for event in ({}, {"event": "error"}, {"event": "progress"}, {"event": "strange"}, [1], {"event": ["x"]}):
            events.emit(event)
        events.emit({"event": "result", "value": {}, "peak_rss_bytes": 1})
        events.emit({"event": "error", "kind": "Rejected", "message": "no", "hint": "no", "output": ""})
        events.emit({"event": "crash", "message": "no"})
        events.log(5)
        events.warn(None)
        events.progress("x", "a", "b", "c")
        for number in (None, float("nan"), float("inf"), -1, 10**400, True, {1}):
            events.progress("x", number, 3, "B")
    if mode == "say much":
        events.log(f"\x1b]0;mine\x07 {context.out} " + "x" * 3_000_000)
        raise ValueError("y" * 3_000_000)
    if mode == "empty the workspace":
        shutil.rmtree(context.out.parent.parent, ignore_errors=True)
    if mode == "swap its own":
        elsewhere = context.out.parent.parent.parent / "elsewhere"
        elsewhere.mkdir()
        shutil.rmtree(context.out)
        context.out.symlink_to(elsewhere)
    if mode == "manifest":
        (context.out / "manifest.json").mkdir()
    if mode == "signal 35":
        os.kill(os.getpid(), 35)
    if mode == "reject":
        raise Rejected("I say so")
    if mode == "strange":
        raise type("Strange", (BaseException,), {"__str__": lambda self: 1 / 0})
    if mode == "link":
        (context.out / "link.bin").symlink_to(context.inputs[0].path / "weights.json")
    if mode == "fork" and os.fork() == 0:  # the child keeps all pipes open
        os.setsid()
        time.sleep(15)
        os._exit(0)
    if mode == "fork and die":
        if os.fork() == 0:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGKILL)
    if mode.endswith("sleep"):
        events.warn(f"sleeping in {os.getpid()}")
        time.sleep(600)
    if mode.endswith("raise"):
        raise ValueError("the toy broke")
