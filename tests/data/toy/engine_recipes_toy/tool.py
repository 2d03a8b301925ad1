"""An engine that calls a program of the user's, and can be simulated where it cannot run."""

import subprocess

from engine_recipes import MachineError, hookimpl

from .echo import Echo


@hookimpl
def command(context) -> list[str]:
    size = str(context.options["size"])
    return ["toy-tool", "--size", size, str(context.input("toy-checkpoint").path), str(context.out / "tool.txt")]


@hookimpl
def stage2(context) -> dict:
    subprocess.run(command(context), check=True)
    context.cache.mkdir(parents=True, exist_ok=True)
    (context.cache / "warm").touch()
    return {"versions": {"toy-tool": "2.0.1"}}


@hookimpl
def load_engine(folder, options):
    if options["runtime"] != "local":
        raise MachineError(f"told to load with {options['runtime']}", "load it with another")
    return Echo()


@hookimpl
def simulate(context) -> Echo:
    (context.out / "scratch.txt").write_text("meanwhile")
    return Echo()
