"""What the demonstration shows at its end: one row for each save, and the directory on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.tree import Tree

from examples.rlvr.journal import Launch, Step
from examples.rlvr.screen import seconds, size
from roll_ckpt import names


@dataclass
class SaveRow:
    """One save of one start of the job, over all ranks of all its worlds."""

    step: int
    resumed_from: int | None
    clusters: set[str] = field(default_factory=set)
    """Those that began the save."""
    blocked_s: float = 0.0
    """The longest that a rank's training stood still for it, waits at the optimizer step included."""
    durable_s: float | None = None
    """From when the last world began the save; None if it was never committed."""
    upload_s: float | None = None
    nbytes: int = 0
    """What all ranks staged; files that a framework wrote by itself are not counted."""


def save_rows(journals: Iterable[list[Launch]]) -> list[SaveRow]:
    """The saves in the order in which they began; each journal is one rank's."""
    rows: dict[tuple[int, int], SaveRow] = {}
    for launches in journals:
        for number, launch in enumerate(launches):
            blocked: dict[int, float] = {}
            for step in launch.steps.values():
                if "time/do_checkpoint/total" in step.metrics:
                    rows.setdefault((number, step.step), SaveRow(step.step, launch.resumed_from))
                _count(step, lambda saved, number=number: _newest(rows, number, saved), blocked)
            for saved, waited in blocked.items():
                row = _newest(rows, number, saved)
                row.blocked_s = max(row.blocked_s, waited)
    return [rows[key] for key in sorted(rows)]


def _newest(rows: dict[tuple[int, int], SaveRow], number: int, saved: int) -> SaveRow:
    """The save of that step, by this start of the job or by one before: a restarted run uploads what was owed."""
    return rows[max(key for key in rows if key[1] == saved and key[0] <= number)]


def _count(step: Step, row_of: Callable[[int], SaveRow], blocked: dict[int, float]) -> None:
    """Add one step's metrics to the saves they belong to, and to the seconds that this rank was `blocked`."""
    if "time/do_checkpoint/total" in step.metrics:
        blocked[step.step] = step.metrics["time/do_checkpoint/total"]
        staged = [key for key in step.metrics if key.endswith("/stage")]
        row_of(step.step).clusters |= {key.split("/")[1] for key in staged}
    for record in step.metrics.get("checkpoint/ended", []):
        row = row_of(record["checkpoint/step"])
        row.upload_s = record.get("checkpoint/upload", row.upload_s)
        for key, value in record.items():
            if key.endswith("/durable") and value is not None:
                row.durable_s = min(value, row.durable_s or value)
            elif key.endswith("/bytes"):
                row.nbytes += value
            elif key.endswith("/fence"):
                blocked[row.step] = blocked.get(row.step, 0.0) + value


def save_table(rows: list[SaveRow], output_dir: Path) -> Table:
    table = Table(box=None, pad_edge=False, caption_justify="left")
    table.caption = "blocked: the longest that a rank's training stood still; at the last step until all is uploaded"
    for heading in _HEADINGS:
        table.add_column(heading, justify="left" if heading == "clusters" else "right")
    for row in rows:
        if row.durable_s is None:
            fate = ["-", seconds(row.blocked_s), "[red]killed[/]", "-", "-"]
        else:
            fate = [
                size(row.nbytes),
                seconds(row.blocked_s),
                seconds(row.durable_s),
                seconds(row.upload_s),
                "no" if (output_dir / names.checkpoint(row.step)).is_dir() else "yes",
            ]
        resumed = "-" if row.resumed_from is None else f"step {row.resumed_from}"
        table.add_row(str(row.step), ", ".join(sorted(row.clusters)), *fate, resumed)
    return table


_HEADINGS = (
    "step",
    "clusters",
    "bytes",
    "blocked\nfor",
    "durable\nafter",
    "uploaded\nin",
    "pruned",
    "resumed\nfrom",
)


def disk_tree(root: Path, opened: Path | None = None) -> Tree:
    """What lies below `root`: checkpoints as one line, but `opened` and unfinished ones with their votes."""
    tree = Tree(f"[bold]{root}/[/]", guide_style="dim")
    for path in sorted(root.iterdir()):
        if names.parse_attempt_dir(path.name) is not None:
            attempt = tree.add(f"[red]{path.name}/[/]  [dim]no checkpoint: it never came to a decision[/]")
            for checkpoint_dir in sorted(path.iterdir()):
                _open_unit(attempt.add(f"{checkpoint_dir.name}/"), checkpoint_dir)
        elif path == opened:
            _open_unit(tree.add(f"[green]{path.name}/[/]  [dim]complete: {_content(path)}[/]"), path)
        elif names.step_of(path.name) is not None:
            tree.add(f"[green]{path.name}/[/]  [dim]complete: {_content(path)}[/]")
        else:
            _add(tree, path)
    return tree


def _open_unit(tree: Tree, checkpoint_dir: Path) -> None:
    for path in sorted(checkpoint_dir.iterdir()):
        below = _add(tree, path)
        if path.name == names.VOTES:
            for vote in sorted(path.iterdir()):
                _add(below, vote)


def _add(tree: Tree, path: Path) -> Tree:
    return tree.add(f"{path.name}{'/' if path.is_dir() else ''}  [dim]{_content(path)}[/]")


def _content(path: Path) -> str:
    if not path.is_dir():
        return size(path.stat().st_size)
    sizes = [file.stat().st_size for file in path.rglob("*") if file.is_file()]
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {size(sum(sizes))}" if sizes else "empty"
