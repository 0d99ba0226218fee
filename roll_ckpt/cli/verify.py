"""roll-ckpt verify: re-reads every byte of one checkpoint or of a run and names what is not as it was committed."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

from roll_ckpt.cli.parsing import Commands, add_parser, add_path
from roll_ckpt.cli.paths import locate
from roll_ckpt.cli.printing import DAMAGED, FINE, human_bytes, notice, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import look
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.transaction import reader_locks, verification

log = logging.getLogger("roll_ckpt")

_ABOUT = """\
Read every byte of a checkpoint, or of all checkpoints of a run, and compare it with
the digests that were taken on the way to disk. Names each file that is damaged,
missing, too long or too short, not a file, of another checkpoint, or that stock code
would take for a part of it; then the exit code is 3. Files of others (a tokenizer,
notes) are listed as "not ours" and are no damage. Changes nothing. The digests catch
accidents, not forgery.

  roll-ckpt verify runs/demo
  roll-ckpt verify runs/demo/checkpoint-9 --json
"""


def add_command(commands: Commands) -> None:
    """Add `verify` to the command line."""
    add_path(add_parser(commands, "verify", verify, "re-read every byte", _ABOUT))


def verify(args: argparse.Namespace) -> int:
    """Re-read every byte and compare it with what was committed."""
    place = locate(args.path)
    survey = look(place)
    checkpoints = [manifest.name for manifest in survey.checkpoints]
    if place.name is None and not (checkpoints or survey.damaged):
        raise NotFound(f"{args.path}: no committed checkpoint is there; see `roll-ckpt ls`")
    for name in survey.foreign:
        say(f"not verified: {name} was not written by roll_ckpt and has no digests")
    nbytes = sum(manifest.nbytes() for manifest in survey.checkpoints)
    directories = [place.checkpoint_dir] if place.name else [place.directory_of(name) for name in checkpoints]
    others = {str(directory): verification.not_ours(directory) for directory in directories}
    with _kept_from_pruning(directories), notice(f"reading {human_bytes(nbytes)} ..."):
        problems = (
            verification.verify(place.checkpoint_dir) if place.name else verification.verify_run(place.output_dir)
        )
    if args.json:
        print_json(
            {
                "path": str(place.checkpoint_dir),
                "sound": not problems,
                "checkpoints": checkpoints,
                "bytes": nbytes,
                "problems": [asdict(problem) for problem in problems],
                "not_ours": [f"{directory}/{path}" for directory, paths in others.items() for path in paths],
            }
        )
    else:
        print_table([["damaged", problem.path, f"{problem.kind}: {problem.detail}"] for problem in problems])
        for directory, paths in others.items():
            for path in paths:
                print_line(f"not ours: {directory}/{path} (no save wrote it; it has no digest, and is no damage)")
        if not problems:
            print_line(f"sound: {', '.join(checkpoints)} ({human_bytes(nbytes)} read)")
    return DAMAGED if problems else FINE


@contextmanager
def _kept_from_pruning(checkpoint_dirs: Sequence[Path]) -> Iterator[None]:
    """Hold a reader lock on each checkpoint, so that a live run does not prune it while it is read.

    A checkpoint that is gone, or whose record cannot be locked, is read without one: verification names what is wrong.
    """
    with ExitStack() as stack:
        for checkpoint_dir in checkpoint_dirs:
            try:
                stack.enter_context(reader_locks.reading(checkpoint_dir))
            except (Damaged, OSError) as problem:
                log.debug("%s: read without a reader lock: %s", checkpoint_dir, problem)
        yield
