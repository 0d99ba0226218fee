"""Draws docs/save.svg: what happens in a save, on a time line. Needs the standard library only.

    python docs/draw_save.py        draws it again; tests/test_docs.py fails if the file is not what this draws

The picture stands on a card of its own, so it is legible on every page; the card is dark where the reader prefers it.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 940, 440
LEFT, RIGHT = 160, 920  # where time begins and ends
TOP, LANE, BAR = 92, 50, 30

LIGHT = """
text { font: 13px -apple-system, "Segoe UI", "DejaVu Sans", Helvetica, Arial, sans-serif; fill: #1f2328; }
.lane { font-weight: 600; }
.quiet { font-size: 12px; fill: #59636e; }
.path { font: 12px ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.card { fill: #ffffff; stroke: #d1d9e0; }
.axis { stroke: #818b98; }
.free { stroke: #bc4c00; stroke-dasharray: 4 3; }
.done { stroke: #1a7f37; stroke-dasharray: 4 3; }
.free-text { fill: #bc4c00; font-weight: 600; }
.done-text { fill: #1a7f37; font-weight: 600; }
.train { fill: #ddf4ff; stroke: #54aeff; }
.still { fill: #ffd8b5; stroke: #bc4c00; }
.background { fill: #eaeef2; stroke: #818b98; }
.whole { fill: #dafbe1; stroke: #1a7f37; }
.unfinished { fill: none; stroke: #818b98; stroke-dasharray: 5 4; }
"""

DARK = """
text { fill: #e6edf3; }
.quiet { fill: #9198a1; }
.card { fill: #0d1117; stroke: #3d444d; }
.axis { stroke: #656c76; }
.free { stroke: #f0883e; }
.done { stroke: #3fb950; }
.free-text { fill: #f0883e; }
.done-text { fill: #3fb950; }
.train { fill: #0c2d6b; stroke: #388bfd; }
.still { fill: #762d0a; stroke: #f0883e; }
.background { fill: #2a313c; stroke: #656c76; }
.whole { fill: #04260f; stroke: #2ea043; }
.unfinished { stroke: #656c76; }
"""

SAVE, GOES_ON, COPIED, DURABLE, COMMITTED = 90, 152, 398, 532, 640  # moments on the time line

Bar = tuple[int, int, str, str]
"""From, to, class, text."""

LANES: list[tuple[str, str, list[Bar]]] = [
    (
        "Training",
        "main thread",
        [
            (0, SAVE, "train", "step 5"),
            (SAVE, GOES_ON, "still", "save"),
            (GOES_ON, COPIED - 48, "train", "step 6: forward, backward"),
            (COPIED - 48, COPIED, "still", "fence"),
            (COPIED, COPIED + 84, "train", "optimizer"),
            (COPIED + 84, COMMITTED, "train", "step 7"),
            (COMMITTED, RIGHT - LEFT, "train", "step 8"),
        ],
    ),
    ("Copy", "native threads", [(SAVE + 16, COPIED, "background", "tensors to host memory, checksums")]),
    ("Write", "native threads", [(GOES_ON + 26, DURABLE, "background", "host memory to disk, then fsync")]),
    (
        "Commit",
        "the save's thread",
        [
            (DURABLE, DURABLE + 42, "background", "vote"),
            (DURABLE + 42, COMMITTED, "background", "rename"),
        ],
    ),
    (
        "Follow-up",
        "rank 0",
        [
            (COMMITTED, COMMITTED + 68, "background", "upload"),
            (COMMITTED + 68, RIGHT - LEFT, "background", "prune"),
        ],
    ),
    (
        "On disk",
        "in output_dir",
        [
            (SAVE, COMMITTED, "unfinished", ".checkpoint-5.1.1.tmp/"),
            (COMMITTED, RIGHT - LEFT, "whole", "checkpoint-5/"),
        ],
    ),
]


def bar(kind: str, x: float, y: float, width: float, height: float, corner: int = 4) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner}"/>'


def text(said: str, x: float, y: float, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(said)}</text>'


def line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>'


def lanes() -> Iterator[str]:
    """One row for each actor, from the top."""
    for index, (name, who, bars) in enumerate(LANES):
        y = TOP + index * LANE
        yield text(name, 20, y + 13, "lane")
        yield text(who, 20, y + 29, "quiet")
        for start, end, kind, said in bars:
            yield bar(kind, LEFT + start, y, end - start - 2, BAR)
            yield text(said, LEFT + (start + end) / 2 - 1, y + 20, "path" if "/" in said else "", "middle")


def moments() -> Iterator[str]:
    """What changes at a moment, across the lanes that it concerns."""
    bottom = TOP + len(LANES) * LANE
    for at, to, kind, said in (
        (GOES_ON, TOP + BAR, "free", "training goes on"),
        (COPIED, TOP + LANE + BAR, "free", "every tensor is copied"),
        (COMMITTED, bottom - LANE + BAR, "done", "complete and durable"),
    ):
        yield line(kind, LEFT + at - 1, TOP - 20, LEFT + at - 1, to)
        yield text(said, LEFT + at - 1, TOP - 28, f"{kind}-text", "middle")
    yield line("axis", LEFT, bottom + 6, RIGHT, bottom + 6)
    yield text("time", RIGHT, bottom + 22, "quiet", "end")


def legend() -> Iterator[str]:
    x, y = float(LEFT), TOP + len(LANES) * LANE + 14
    for kind, said in (("still", "training stands still"), ("train", "training"), ("background", "in the background")):
        yield bar(kind, x, y, 18, 12, 2)
        yield text(said, x + 24, y + 11, "quiet")
        x += 48 + 6.4 * len(said)


def draw() -> str:
    """The picture as SVG."""
    told = "A save on a time line: training stands still only while the save begins and at the fence"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{told}">',
        f"<style>{LIGHT}@media (prefers-color-scheme: dark) {{{DARK}}}</style>",
        bar("card", 0.5, 0.5, WIDTH - 1, HEIGHT - 1, 8),
        text("A save of step 5, seen from one rank", 20, 32, "lane"),
        *lanes(),
        *moments(),
        *legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("save.svg").write_text(draw(), encoding="utf-8")
