"""What a person sees of a running job: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


def move_noise_to(log: Path) -> TextIO:
    """Send this process's stdout and stderr, native code's included, to `log`; returns the old stdout."""
    log.parent.mkdir(parents=True, exist_ok=True)
    terminal = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    return terminal


def seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            break
        nbytes /= 1000
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.1f} {unit}"


class Screen:
    """Shows one world's run; made on rank 0 only. `bar` is false where several worlds share a terminal."""

    def __init__(self, terminal: TextIO, world: str, max_steps: int, *, bar: bool) -> None:
        console = Console(file=terminal, highlight=False, soft_wrap=True)
        self._prefix = f"{world:<12}" if not bar else ""
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=console,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not (bar and console.is_terminal),
        )
        self._task = self._progress.add_task("starting", total=max_steps, figures="")
        self._progress.start()

    def say(self, text: str) -> None:
        self._progress.console.print(f"  {self._prefix}{text}")

    def begin(self, resumed_from: int | None) -> None:
        if resumed_from is not None:
            self.say(f"[bold green]resumed from checkpoint-{resumed_from}[/]: on with step {resumed_from + 1}")
        self._progress.update(self._task, description="training", completed=(resumed_from or -1) + 1)

    def step(self, step: int, figures: dict[str, float], metrics: dict[str, Any]) -> None:
        shown = [f"{_LABELS[name]} {figures[name]:.3f}" for name in _LABELS if name in figures]
        if self._progress.disable:
            self.say(f"step {step:>2}  {'  '.join(shown)}")
        self._progress.update(self._task, completed=step + 1, figures="  ".join(shown[:2]))
        for line in _checkpoint_lines(step, metrics):
            self.say(f"         {line}" if self._progress.disable else line)

    def close(self) -> None:
        self._progress.stop()


_LABELS = {
    "actor/reward": "reward",
    "actor/kl": "KL",
    "actor/loss": "policy loss",
    "critic/loss": "value loss",
}


def _checkpoint_lines(step: int, metrics: dict[str, Any]) -> list[str]:
    lines = []
    if "time/do_checkpoint/total" in metrics:
        waited = seconds(metrics["time/do_checkpoint/total"])
        lines.append(f"[cyan]checkpoint-{step}[/]: training waited {waited} for it")
    for record in metrics.get("checkpoint/ended", []):
        name = f"[cyan]checkpoint-{record['checkpoint/step']}[/]"
        durable = [value for key, value in record.items() if key.endswith("/do_checkpoint/durable")]
        if "checkpoint/failed" in record:
            lines.append(f"{name}: [bold red]{escape(record['checkpoint/failed'])}[/]")
            continue
        told = [f"durable {seconds(max(durable))} after the save began"] if durable else []
        if "checkpoint/upload" in record:
            told.append(f"uploaded in {seconds(record['checkpoint/upload'])}")
        if record.get("checkpoint/pruned"):
            told.append(f"pruned {', '.join(record['checkpoint/pruned'])}")
        lines.append(f"{name}: {', '.join(told)}")
    return lines
