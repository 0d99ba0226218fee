"""Draws docs/performance.svg from the table of benchmarks/RESULTS.md. Needs the standard library only.

    python docs/draw_performance.py        draws it again; tests/test_docs.py fails if the figures have changed since

The picture stands on a card of its own, so it is legible on every page; the card is dark where the reader prefers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "RESULTS.md"
OURS = "roll_ckpt"
MACHINE = "Two shared CPU cores, ext4, no GPU"
NAMES = {
    "dcp.async_save, reused stager": "DCP async_save",
    "torchsnapshot.async_take": "torchsnapshot",
    "dcp.save": "DCP save",
}
COLUMNS = ("blocked", "durable", "of raw write", "load", "of raw read", "long steps", "short steps", "rollouts")
"""What follows the range of `blocked ms` in a row of the table; the first is a multiple of a memcpy."""

WIDTH, HEIGHT = 940, 530
LEFT, TOP, PANEL, ROW, BAR, NAME = 20, 92, 224, 27, 17, 138

LIGHT = """
text { font: 13px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
.title { font-weight: 600; }
.quiet { font-size: 12px; fill: #59636e; }
.figure { font-size: 12px; }
.ours-text { font-weight: 600; fill: #0969da; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.axis { stroke: #818b98; }
.ours { fill: #0969da; }
.peer { fill: #afb8c1; }
"""

DARK = """
text { fill: #e6edf3; }
.quiet { fill: #9198a1; }
.ours-text { fill: #58a6ff; }
.card { fill: #0d1117; stroke: #3d444d; }
.axis { stroke: #656c76; }
.ours { fill: #388bfd; }
.peer { fill: #59636e; }
"""


@dataclass(frozen=True)
class Row:
    """The medians of one system."""

    name: str
    figures: dict[str, float]
    """As `COLUMNS`."""


@dataclass(frozen=True)
class Panel:
    """One small chart: a column of the table, and how to read it."""

    title: str
    better: str
    column: str
    unit: str


PANELS = (
    Panel("Time that a training loop loses for each save", "lower is better", "long steps", "s"),
    Panel("Blocked until the tensors may change", "lower is better", "blocked", "s"),
    Panel("Written, until durable", "higher is better", "durable", "GB/s"),
    Panel("Loaded", "higher is better", "load", "GB/s"),
)


def read_results(document: str) -> tuple[str, list[Row]]:
    """The date of the measurement of movement, and the row of each system, ours first; times in seconds.

    Raises:
        ValueError: the table is not there, or not as expected.
    """
    section = re.search(r"^## Movement.*?\((\d{4}-\d\d-\d\d)\)\n(.*?)(?=^## |\Z)", document, re.M | re.S)
    if section is None:
        raise ValueError(f"{RESULTS} has no section '## Movement … (date)'")
    rows = []
    table = section[2].partition("\nmedians ")[2]
    for line in table.split("\n\n")[0].splitlines()[1:]:
        if found := re.fullmatch(r"(\S.{33}).*?\([\d.]+-[\d.]+\)((?:\s+[\d.]+)+)\s*", line):
            figures = dict(zip(COLUMNS, map(float, found[2].split()), strict=False))
            rows.append(Row(found[1].strip(), figures))
    memcpy = re.search(r"^memcpy, .*?: ([\d.]+) ms", section[2], re.M)
    if not rows or rows[0].name != OURS or any(len(row.figures) != len(COLUMNS) for row in rows) or memcpy is None:
        raise ValueError(f"{RESULTS}: the table after 'medians' is not as expected, with {OURS} first")
    for row in rows:
        row.figures["blocked"] *= float(memcpy[1]) / 1000
        for column in ("long steps", "short steps", "rollouts"):
            row.figures[column] /= 1000
    return section[1], rows


def text(said: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(said)}</text>'


def bar(kind: str, x: float, y: float, width: float, height: float, corner: int = 2) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{corner}"/>'


def panel(shown: Panel, rows: list[Row], x: float, y: float, width: float) -> Iterator[str]:
    """The bars of one panel, each with its value and how many times ours it is."""
    values = [row.figures[shown.column] for row in rows]
    longest = width - NAME - 110
    yield text(shown.title, x, y, "title")
    yield text(shown.better, x, y + 17, "quiet")
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        top, length, mine = y + 28 + index * ROW, longest * value / max(values), row.name == OURS
        ratio = value / values[0]
        told = "" if mine else f" ({ratio:.1f}\u00d7)" if ratio >= 1 else f" ({ratio:.2f}\u00d7)"
        yield text(NAMES.get(row.name, row.name), x + NAME - 8, top + 13, "ours-text" if mine else "", "end")
        yield bar("ours" if mine else "peer", x + NAME, top, length, BAR)
        yield text(f"{value:.2f} {shown.unit}{told}", x + NAME + length + 6, top + 13, "figure")
    yield f'<line class="axis" x1="{x + NAME:g}" y1="{y + 24}" x2="{x + NAME:g}" y2="{y + 24 + len(rows) * ROW}"/>'


def draw() -> str:
    """The picture as SVG."""
    date, rows = read_results(RESULTS.read_text(encoding="utf-8"))
    half = (WIDTH - LEFT) / 2
    told = "Bars: roll_ckpt beside DCP, torchsnapshot, safetensors and torch.save; the figures stand in RESULTS.md"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{told}">',
        f"<style>{LIGHT}@media (prefers-color-scheme: dark) {{{DARK}}}</style>",
        bar("card", 0.5, 0.5, WIDTH - 1, HEIGHT - 1, 8),
        text("A state of 1 GiB in 400 tensors, saved and loaded by roll_ckpt and its peers", LEFT, 32, "title"),
        text(f"Medians. {MACHINE}, {date}. In brackets: the multiple of roll_ckpt", LEFT, 52, "quiet"),
    ]
    for index, shown in enumerate(PANELS):
        parts += panel(shown, rows, LEFT + index % 2 * half, TOP + index // 2 * PANEL, half - 8)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("performance.svg").write_text(draw(), encoding="utf-8")
