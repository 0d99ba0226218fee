"""What the command line prints: tables and JSON on stdout, notices and errors on stderr; its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from roll_ckpt.errors import presentable

FINE, ERROR, DAMAGED, OWED = 0, 1, 3, 4  # argparse itself ends with 2
EXIT_CODES = "Exit codes: 0 fine, 1 error, 2 wrong usage, 3 damaged, 4 uploads still owed."


def print_line(text: str) -> None:
    """One line of an answer, on stdout, at once."""
    print(presentable(text), flush=True)


def say(text: str) -> None:
    """Tell a person one line, on stderr."""
    print(f"roll-ckpt: {presentable(text)}", file=sys.stderr)


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Show what is going on while it goes on, to a person."""
    if not sys.stderr.isatty():
        yield
        return
    print(presentable(text), end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """The one document of a command with --json."""
    print(json.dumps(document, indent=2, ensure_ascii=True))


def print_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Rows of equal length in columns; those numbered in `right` are set to the right."""
    shown = [[presentable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        cells = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print_line("  ".join(cells).rstrip())


def human_bytes(nbytes: int) -> str:
    """A number of bytes with one decimal and its unit."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
