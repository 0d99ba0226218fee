"""What the demonstration shows at its end: one row for each save, and the directory on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.tree import Tree

from examples.rlvr.journal import Launch
from examples.rlvr.screen import seconds, size
from roll_ckpt import names


@dataclass
class SaveRow:
    """One save of one start of the job, over all ranks of all its worlds."""

    step: int
    resumed_from: int | None
    clusters: dict[str, int] = field(default_factory=dict)
    """Bytes of each cluster that began the save."""
    blocked_s: float = 0.0
    """The longest that a rank's training stood still for it, waits at the optimizer step included."""
    durable_s: float | None = None
    upload_s: float | None = None

    @property
    def name(self) -> str:
        return f"checkpoint-{self.step}"


def save_rows(journals: Iterable[list[Launch]]) -> list[SaveRow]:
    """The saves in the order in which they began; each journal is one rank's."""
    rows: dict[tuple[int, int], SaveRow] = {}
    for launches in journals:
        for number, launch in enumerate(launches):
            blocked: dict[int, float] = {}
            for step in launch.steps.values():
                _count(step.step, step.metrics, (rows, number, launch.resumed_from), blocked)
            for saved, waited in blocked.items():
                row = rows[number, saved]
                row.blocked_s = max(row.blocked_s, waited)
    return [rows[key] for key in sorted(rows)]


def _count(
    step: int,
    metrics: Mapping[str, float],
    where: tuple[dict[tuple[int, int], SaveRow], int, int | None],
    blocked: dict[int, float],
) -> None:
    rows, launch, resumed_from = where

    def row(saved: int) -> SaveRow:
        return rows.setdefault((launch, saved), SaveRow(saved, resumed_from))

    if "time/do_checkpoint/total" in metrics:
        blocked[step] = metrics["time/do_checkpoint/total"]
    if "checkpoint/upload" in metrics:
        row(int(metrics["checkpoint/step"])).upload_s = metrics["checkpoint/upload"]
    for key, value in metrics.items():
        prefix, _, item = key.rpartition("/")
        cluster = prefix.removeprefix("time/").removesuffix("/do_checkpoint")
        if item == "stage":
            row(step).clusters.setdefault(cluster, 0)
        elif item == "bytes":
            saved = row(int(metrics[f"{prefix}/step"]))
            saved.clusters[cluster] = saved.clusters.get(cluster, 0) + int(value)
            saved.durable_s = max(saved.durable_s or 0.0, metrics[f"{prefix}/durable"])
            blocked[saved.step] = blocked.get(saved.step, 0.0) + metrics[f"{prefix}/fence"]


def save_table(rows: list[SaveRow], output_dir: Path, uploads: Path) -> Table:
    table = Table(title=f"Every save of {output_dir}", title_justify="left", title_style="bold", box=None)
    table.caption = (
        "blocked: the longest that a rank's training stood still; at the last step until all is uploaded"
    )
    table.caption_justify = "left"
    for heading in (
        "step",
        "clusters",
        "bytes",
        "blocked",
        "to durable",
        "uploaded in",
        "pruned",
        "resumed from",
    ):
        table.add_column(heading, justify="left" if heading in ("clusters", "pruned") else "right")
    for row in rows:
        if row.durable_s is None:
            fate = ["[red]killed[/]", "", "[red]discarded[/]"]
        else:
            uploaded = seconds(row.upload_s) if (uploads / row.name).is_dir() else "[red]no[/]"
            pruned = "no" if (output_dir / row.name).is_dir() else "yes"
            fate = [seconds(row.durable_s), uploaded, pruned]
        nbytes = sum(row.clusters.values())
        table.add_row(
            str(row.step),
            ", ".join(row.clusters),
            size(nbytes) if nbytes else "",
            seconds(row.blocked_s),
            *fate,
            "" if row.resumed_from is None else f"step {row.resumed_from}",
        )
    return table


def disk_tree(root: Path) -> Tree:
    """What lies below `root`; in a checkpoint each folder's files are summed up, but the votes are shown."""
    tree = Tree(f"[bold]{root}/[/]", guide_style="dim")
    _grow(tree, root, depth=0)
    return tree


def _grow(tree: Tree, directory: Path, depth: int) -> None:
    for path in sorted(directory.iterdir()):
        if not path.is_dir():
            tree.add(f"{path.name}  [dim]{size(path.stat().st_size)}[/]")
        elif depth == 0 and names.step_of(path.name) is not None:
            tree.add(f"[green]{path.name}/[/]  [dim]complete: {_sum(path)}[/]")
        elif depth == 2 and path.name != names.VOTES:
            tree.add(f"{path.name}/  [dim]{_sum(path)}[/]")
        else:
            temporary = names.parse_attempt_dir(path.name) is not None
            shown = f"[red]{path.name}/[/]  [dim]not a checkpoint[/]" if temporary else f"{path.name}/"
            _grow(tree.add(shown), path, depth + 1)


def _sum(directory: Path) -> str:
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return f"{len(sizes)} files, {size(sum(sizes))}"
