"""How a command that changes an output directory owns it while it works."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from roll_ckpt.transaction import epochs, recovery
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.recovery import Recovery


@contextmanager
def claimed(output_dir: Path, args: argparse.Namespace) -> Iterator[tuple[Epoch, list[Recovery]]]:
    """Claim the directory inside the block as a run does, and recover it first as a run does.

    RunIsLive while a run owns the directory, unless --take-over is given.
    """
    epoch = epochs.claim_number(
        output_dir, f"roll-ckpt {args.command}", {"command line": 1}, None, take_over=args.take_over
    )
    try:
        yield epoch, recovery.recover(output_dir, epoch=epoch)
    finally:
        epoch.release()


def recovered_rows(recovered: Sequence[Recovery]) -> list[list[str]]:
    """For each attempt that was recovered: what was done, its name, EPOCH.ATTEMPT, and why."""
    return [[done.action, done.name, f"{done.epoch}.{done.attempt}", done.reason] for done in recovered]
