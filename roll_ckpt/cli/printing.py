"""What the command line prints: tables and JSON on stdout, notices and errors on stderr; its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from roll_ckpt.errors import presentable

FINE, ERROR, USAGE, DAMAGED, OWED = 0, 1, 2, 3, 4  # argparse itself ends with USAGE
EXIT_CODES = "Exit codes: 0 fine, 1 error, 2 wrong usage, 3 damaged, 4 uploads still owed."


def print_line(text: str) -> None:
    """Print one line of the answer on stdout, and flush it."""
    print(presentable(text), flush=True)


def say(text: str) -> None:
    """Print one line for a person on stderr."""
    print(f"roll-ckpt: {presentable(text)}", file=sys.stderr)


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Show `text` on stderr while the block runs, if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    print(presentable(text), end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def print_json(document: dict[str, Any]) -> None:
    """Print the one document of a command with --json."""
    print(json.dumps(document, indent=2, ensure_ascii=True))


def print_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> None:
    """Print rows of equal length in columns; the columns numbered in `right` are aligned to the right."""
    cells = [[presentable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = [
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print_line("  ".join(padded).rstrip())


def human_bytes(nbytes: int) -> str:
    """A number of bytes in the largest fitting unit, with one decimal: `1.5 GiB`."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_age(seconds: float) -> str:
    """A time span in whole minutes, hours (from one hour on) or days (from two days on): `3 min`, `2 h`, `5 d`.

    `<1 min` also stands for a time in the future: the clocks of two hosts differ a little.
    """
    minutes = int(seconds // 60)
    if minutes < 1:
        return "<1 min"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} d"
