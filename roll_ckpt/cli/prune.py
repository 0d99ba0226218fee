"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from roll_ckpt.cli.claiming import claimed, recovered_rows
from roll_ckpt.cli.paths import run_directory
from roll_ckpt.cli.printing import FINE, human_bytes, print_json, print_line
from roll_ckpt.cli.survey import survey
from roll_ckpt.transaction import reader_locks, retention
from roll_ckpt.transaction.recovery import Recovery
from roll_ckpt.upload import file_system
from roll_ckpt.upload.hub import push_queue


def prune(args: argparse.Namespace) -> int:
    """Remove all but the newest checkpoints of a run that is not running."""
    output_dir = run_directory(args.path, args.command)
    owing = _owing(output_dir, args.upload_dir)
    sizes = {record.name: record.nbytes for record in retention.records_of(output_dir)}
    recovered: list[Recovery] = []
    if args.dry_run:
        being_read = [name for name in sizes if reader_locks.is_being_read(output_dir / name)]
        removed = retention.doomed(retention.records_of(output_dir, owing, being_read), args.keep)
    else:
        with claimed(output_dir, args) as (claim, recovered):
            removed = retention.prune(output_dir, claim, args.keep, owing)
    kept_names = [told.name for told in survey(output_dir).checkpoints if told.name not in removed]
    if args.json:
        print_json(
            {
                "path": str(output_dir),
                "dry_run": args.dry_run,
                "removed": removed,
                "kept": kept_names,
                "recovered": [asdict(recovery) for recovery in recovered],
            }
        )
        return FINE
    for action, name, attempt, reason in recovered_rows(recovered):
        print_line(f"{action} {name}, attempt {attempt}: {reason}")
    for name in removed:
        print_line(f"{'would remove' if args.dry_run else 'removed'} {name} ({human_bytes(sizes.get(name, 0))})")
    print_line(f"{'would keep' if args.dry_run else 'kept'} {', '.join(kept_names) or 'nothing'}")
    return FINE


def _owing(output_dir: Path, upload_dir: Path | None) -> list[retention.Owing]:
    """What may still be owed checkpoints: the Hub, and with --upload-dir that directory."""
    copies = [file_system.Copies(output_dir, upload_dir)] if upload_dir is not None else []
    return [push_queue.RecordedQueue(output_dir), *copies]


_PRUNE = """\
Remove all but the newest N committed checkpoints. The one that `latest` names and
those that somebody reads just now, or that are owed to the Hub, stay in any case.
Refuses while a live run owns the directory (a run prunes by itself:
max_ckpt_to_keep); recovers the directory first, as the next start of the run would.

  roll-ckpt prune runs/demo --keep 2 --dry-run
  roll-ckpt prune runs/demo --keep 2 --upload-dir /mnt/archive/demo
"""


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of checkpoints; at least 1 stays")
    return int(text)
