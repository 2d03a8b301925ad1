"""Draw docs/terminal.svg: runs the commands below on a terminal and keeps what is on the screen at the end of each.

    pip install pyte && python docs/terminal.py

Needs the checkpoint fetched (`recipes fetch smollm2-135m`); builds into an empty workspace beside it.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import tempfile
import termios
from itertools import groupby
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

from engine_recipes.api import open_setup

COMMANDS = (
    "recipes build smollm2-135m:fp16",
    'recipes run smollm2-135m:fp16 "What is the capital of France?"',
    "recipes build smollm2-135m:int4-wo",
    "recipes build smollm2-135m:fp8@tensorrt-rtx --target sm86",
)
COLUMNS, LINES = 104, 60


def on_screen(command: str, environment: dict[str, str]) -> list[Text]:
    """The lines a command leaves on the screen."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    process = subprocess.Popen(
        command, shell=True, env=environment, stdin=follower, stdout=follower, stderr=subprocess.STDOUT
    )
    os.close(follower)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            stream.feed(os.read(leader, 65536))
        except OSError:  # the command has ended and the terminal is gone
            break
    process.wait()
    lines = [line(screen, y) for y in range(LINES)]
    while lines and not lines[-1].plain:
        lines.pop()
    return lines


def line(screen: pyte.Screen, y: int) -> Text:
    """One line of the screen with its colours."""
    cells = [screen.buffer[y][x] for x in range(COLUMNS)]
    text = Text()
    for style, run in groupby(cells, key=style_of):
        text.append("".join(cell.data for cell in run), style)
    text.rstrip()
    return text


def style_of(cell: pyte.screens.Char) -> str:
    """A cell's style in the words of rich."""
    colour = "" if cell.fg == "default" else cell.fg.replace("brown", "yellow")
    return f"{'bold ' * cell.bold}{colour}".strip() or "none"


def main() -> None:
    """Run, record, write the picture."""
    setup = open_setup()
    located = setup.locate(setup.registry.models["smollm2-135m"])
    if located is None:
        raise SystemExit("run `recipes fetch smollm2-135m` first")
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        workspace = Path(folder, "e")
        (workspace / "sources").mkdir(parents=True)
        (workspace / "sources" / located.folder.name).symlink_to(located.folder)
        environment = {**os.environ, "RECIPES_WORKSPACE": str(workspace), "TERM": "xterm-256color"}
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "green"), (command, "bold")))
            for text in on_screen(command, environment):
                text.plain = text.plain.replace(str(workspace), "~/.local/share/engine-recipes")
                console.print(text, no_wrap=True, overflow="ignore")
        svg = console.export_svg(title="recipes")
    svg = re.sub(r"@font-face \{.*?\}\n", "", svg, flags=re.S)  # no fonts from the network
    Path(__file__).with_name("terminal.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
