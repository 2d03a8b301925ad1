from __future__ import annotations

from engine_recipes.errors import first_line, one_line, printable


def test_what_a_terminal_obeys_is_spelled_out() -> None:
    assert printable("a\tb\n\x1b]0;x\x07\x7f\x9b é") == "a\tb\n\\x1b]0;x\\x07\\x7f\\x9b é"
    assert one_line("a\n \x1b[2J b") == "a \\x1b[2J b"
    assert first_line(ValueError("\x1b[31mred\nmore")) == "ValueError: \\x1b[31mred"
