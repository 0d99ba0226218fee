"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

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
    """Own the directory like a run, which is refused while one is live; recover it first, like a run."""
    mine = epochs.claim_number(
        output_dir, f"roll-ckpt {args.command}", {"command line": 1}, None, take_over=args.take_over
    )
    try:
        yield mine, recovery.recover(output_dir, epoch=mine)
    finally:
        mine.release()


def recovered_rows(recovered: Sequence[Recovery]) -> list[list[str]]:
    return [[found.action, found.name, f"{found.epoch}.{found.attempt}", found.reason] for found in recovered]
