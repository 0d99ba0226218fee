"""What the ranks do in tests/test_rotation.py: they save while a script of the user tidies up around them."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed_cases import settings
from tiny import engine, train

import roll_ckpt
from roll_ckpt.disk import failpoints

SAVES, KEEP = 5, 2
OURS: dict[str, Any] = settings(commit_timeout_s=20)  # a save that waits for another rank shall say so soon


def delete(path: Path) -> None:
    """Whatever it is. No error where a save in the background writes there: the caller has not waited for it."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def oldest_folders(out: Path) -> None:
    """OpenRLHF's rotation, and that of many scripts: whatever is a directory counts."""
    folders = sorted((path for path in out.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in folders[: max(0, len(folders) - KEEP + 1)]:
        delete(path)


def all_but_the_newest(out: Path) -> None:
    folders = sorted((path for path in out.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for path in folders[:-1]:
        delete(path)


def whole_directory(out: Path) -> None:
    delete(out)


def contents(out: Path) -> None:
    for path in list(out.iterdir()):
        delete(path)


def directory_renamed(out: Path) -> None:
    """As logs are rotated."""
    old = out.with_name(f"{out.name}.old")
    if old.exists():
        delete(old)
    out.rename(old)


def hidden_below(out: Path) -> None:
    for path in sorted(out.rglob(".*")):
        if path.exists():
            delete(path)


def hidden_below_and_beside(out: Path) -> None:
    hidden_below(out)
    for path in list(out.parent.glob(".*")):
        delete(path)


def all_beside(out: Path) -> None:
    for path in list(out.parent.iterdir()):
        if path != out:
            delete(path)


SCRIPTS: dict[str, Callable[[Path], None]] = {
    script.__name__: script
    for script in (
        *(oldest_folders, all_but_the_newest, whole_directory, contents, directory_renamed),
        *(hidden_below, hidden_below_and_beside, all_beside),
    )
}


@dataclass
class Saved:
    """What became of a run's saves."""

    errors: list[str]
    left: list[str]
    latest: str
    loaded: str
    """The tag that a new engine loads when none is named."""
    goes_on: bool
    """Whether an engine that loaded it has the losses of the engine that saved it, ours and stock."""


@contextlib.contextmanager
def held(really: bool) -> Iterator[Callable[[], None]]:
    """Saves stop before they vote, until the function is called; the last one goes on by itself at the end."""
    gate = threading.Event()

    def listener(reached: str, where: dict[str, object]) -> None:
        if reached == "vote.before":
            gate.wait(60)

    def open_gate() -> None:
        gate.set()
        roll_ckpt.wait_pending()
        gate.clear()

    failpoints.listener = listener if really else None
    try:
        yield open_gate if really else lambda: None
    finally:
        gate.set()
        failpoints.listener = None


def run(out: str, script: str, ours: dict[str, Any] | None, *, hold: bool = False) -> Saved:
    """Save `SAVES` times, with the script at work on rank 0 before each save but the first."""
    here = Path(out)
    trained = engine(2, "bf16", ours)
    errors = []
    with held(hold) as let_go:
        for number in range(SAVES):
            train(trained, 1, number)
            if number:
                errors += tidied_up(here, script) if not dist.get_rank() else []
                dist.barrier()
                let_go()
            try:
                assert trained.save_checkpoint(out, tag=f"step{number}", client_state={"number": number}), "not begun"
            except Exception as error:
                errors.append(f"save {number}: {type(error).__name__}: {error}")
    roll_ckpt.wait_pending()
    dist.barrier()
    losses = [train(trained, 2, 50)]
    found: tuple[str, dict[str, Any]] = ("", {})
    for given in (ours, None):
        again = engine(2, "bf16", given, seed=1)
        path, state = again.load_checkpoint(out)
        found = (Path(path or "").parent.name, state or {})
        losses.append(train(again, 2, 50))
    left = sorted(path.name for path in here.iterdir())
    loaded = f"{found[0]} {found[1].get('number')}"
    return Saved(errors, left, (here / "latest").read_text(), loaded, losses[0] == losses[1] == losses[2])


def tidied_up(out: Path, script: str) -> list[str]:
    try:
        SCRIPTS[script](out)
    except OSError as error:
        return [f"the script: {error}"]
    return []


def beside_stock(out: str, script: str, mode: str) -> tuple[Saved, Saved]:
    """The same with us and with stock DeepSpeed. "held": each save is pending while the script is at work."""
    ours = run(f"{out}/ours/run", script, {**OURS, "async_save": mode != "sync"}, hold=mode == "held")
    return ours, run(f"{out}/stock/run", script, None)
