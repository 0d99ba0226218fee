"""What the ranks do in tests/test_rotation.py: they save while a script of the user tidies up around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tiny import engine, train

import roll_ckpt

SAVES, KEEP = 5, 2
OURS: dict[str, Any] = {"commit_timeout_s": 20}  # a save that waits for another rank shall say so soon


def delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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


def run(out: str, script: str, ours: dict[str, Any] | None) -> Saved:
    """Save `SAVES` times, with the script at work on rank 0 before each save but the first."""
    here = Path(out)
    trained = engine(2, "bf16", ours)
    errors = []
    for number in range(SAVES):
        train(trained, 1, number)
        if number and not dist.get_rank():
            try:
                SCRIPTS[script](here)
            except OSError as error:
                errors.append(f"the script: {error}")
        dist.barrier()
        try:
            trained.save_checkpoint(out, tag=f"step{number}", client_state={"number": number})
        except Exception as error:
            errors.append(f"save {number}: {type(error).__name__}: {error}")
    try:
        roll_ckpt.wait_pending()
    except Exception as error:
        errors.append(f"the end: {type(error).__name__}: {error}")
    dist.barrier()
    left = sorted(path.name for path in here.iterdir())
    path, state = "", {}
    losses = [train(trained, 2, 50)]
    for settings in (ours, None):
        again = engine(2, "bf16", settings, seed=1)
        path, state = again.load_checkpoint(out)
        losses.append(train(again, 2, 50))
    found = f"{Path(path or '').parent.name} {(state or {}).get('number')}"
    return Saved(errors, left, (here / "latest").read_text(), found, losses[0] == losses[1] == losses[2])


def beside_stock(out: str, script: str, asynchronous: bool) -> tuple[Saved, Saved]:
    """The same with us and with stock DeepSpeed."""
    ours = run(f"{out}/ours/run", script, {**OURS, "async_save": asynchronous})
    return ours, run(f"{out}/stock/run", script, None)
