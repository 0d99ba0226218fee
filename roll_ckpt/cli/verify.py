"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from roll_ckpt.cli.paths import locate
from roll_ckpt.cli.printing import DAMAGED, FINE, human_bytes, notice, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import look
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.transaction import reader_locks, verification


def check(args: argparse.Namespace) -> int:
    """Read every byte again and compare it with what was committed."""
    place = locate(args.path)
    found = look(place)
    checkpoint_dirs = (
        [place.checkpoint_dir] if place.name else [place.output_dir / told.name for told in found.checkpoints]
    )
    names_read = [told.name for told in found.checkpoints]
    if place.name is None and not (names_read or found.damaged):
        raise NotFound(f"{args.path}: no committed checkpoint is there; see `roll-ckpt ls`")
    for name in found.foreign:
        say(f"not verified: {name} was not written by roll_ckpt and has no digests")
    nbytes = sum(told.nbytes() for told in found.checkpoints)
    with _keep_from_pruning(checkpoint_dirs), notice(f"reading {human_bytes(nbytes)} ..."):
        problems = (
            verification.verify(place.checkpoint_dir) if place.name else verification.verify_run(place.output_dir)
        )
    if args.json:
        print_json(
            {
                "path": str(place.checkpoint_dir),
                "sound": not problems,
                "checkpoints": names_read,
                "bytes": nbytes,
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        print_table([["damaged", problem.path, f"{problem.kind}: {problem.detail}"] for problem in problems])
        if not problems:
            print_line(f"sound: {', '.join(names_read)} ({human_bytes(nbytes)} read)")
    return DAMAGED if problems else FINE


@contextmanager
def _keep_from_pruning(checkpoint_dirs: Sequence[Path]) -> Iterator[None]:
    """Keep a live run from pruning what is read. What is gone, or lacks its record, has no lease."""
    with ExitStack() as stack:
        for checkpoint_dir in checkpoint_dirs:
            with suppress(Damaged, OSError):
                stack.enter_context(reader_locks.reading(checkpoint_dir))
        yield


_VERIFY = """\
Read every byte of a checkpoint, or of all checkpoints of a run, and compare it
with the digests taken on the way to disk. Names each file that is damaged,
missing, too long or too short, no file, of another checkpoint, or that does not
belong there; then the exit code is 3. Changes nothing. The digests catch
accidents, not forgery.

  roll-ckpt verify runs/demo
  roll-ckpt verify runs/demo/checkpoint-9 --json
"""
