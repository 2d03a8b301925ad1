"""The ways a stage can go wrong, on demand."""

import errno
import os
import subprocess
import sys
import time

from engine_recipes import events


def misbehave(context) -> None:
    mode = context.options["mode"]
    (context.out / "half.bin").write_bytes(b"half written")
    events.progress("working", 1, 2, "steps")
    print("a library prints this to stdout")
    if mode == "raise":
        raise ValueError("the toy broke")
    if mode == "exit":
        os._exit(7)
    if mode == "disk":
        raise OSError(errno.ENOSPC, "No space left on device", str(context.out / "half.bin"))
    if mode == "orphan":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # orphan of the toy"])
    if mode == "sleep":
        events.warn(f"sleeping in {os.getpid()}")
        time.sleep(600)
