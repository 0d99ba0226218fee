"""roll-ckpt prune: removes old checkpoints of a run that is not running."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.cli.claiming import claimed, recovered_rows
from roll_ckpt.cli.parsing import Commands, add_change_options, add_parser, add_path
from roll_ckpt.cli.paths import argument, run_directory
from roll_ckpt.cli.printing import FINE, human_bytes, print_json, print_line
from roll_ckpt.cli.survey import survey
from roll_ckpt.transaction import reader_locks, retention
from roll_ckpt.transaction.recovery import Recovery
from roll_ckpt.upload import file_system
from roll_ckpt.upload.hub import push_queue

_ABOUT = """\
Remove all committed checkpoints but the newest N. Checkpoints stay in any case that
`latest` names, that a process is reading, or that are owed to the Hub or to the
directory to which the run uploads. Refuses while a live run owns the directory (a run
prunes by itself: max_ckpt_to_keep). Recovers the directory first, as the next start of
the run would.

  roll-ckpt prune runs/demo --keep 2 --dry-run
  roll-ckpt prune runs/demo --keep 2 --upload-dir /mnt/archive/demo
"""


def add_command(commands: Commands) -> None:
    """Add `prune` to the command line."""
    parser = add_parser(commands, "prune", prune, "remove all but the newest", _ABOUT)
    add_path(parser)
    parser.add_argument("--keep", type=_positive, required=True, metavar="N", help="how many checkpoints stay")
    parser.add_argument(
        "--upload-dir", metavar="DIR", help="keep what has no complete copy there; default: where the run uploads to"
    )
    add_change_options(parser)


def prune(args: argparse.Namespace) -> int:
    """Remove all but the newest checkpoints of a run that is not running."""
    output_dir = run_directory(args.path, args.command)
    upload_dir = file_system.recorded(output_dir) if args.upload_dir is None else argument(args.upload_dir)
    owing = _owing(output_dir, upload_dir)
    sizes = {record.name: record.nbytes for record in retention.records_of(output_dir)}
    recovered: list[Recovery] = []
    if args.dry_run:
        being_read = [name for name in sizes if reader_locks.is_being_read(output_dir / name)]
        removed = retention.doomed(retention.records_of(output_dir, owing, being_read), args.keep)
    else:
        with claimed(output_dir, args) as (epoch, recovered):
            removed = retention.prune(output_dir, epoch, args.keep, owing)
    remaining = [manifest.name for manifest in survey(output_dir).checkpoints if manifest.name not in removed]
    if args.json:
        print_json(
            {
                "path": str(output_dir),
                "dry_run": args.dry_run,
                "removed": removed,
                "kept": remaining,
                "recovered": [asdict(recovery) for recovery in recovered],
            }
        )
        return FINE
    for action, name, attempt, reason in recovered_rows(recovered):
        print_line(f"{action} {name}, attempt {attempt}: {reason}")
    for name in removed:
        print_line(f"{'would remove' if args.dry_run else 'removed'} {name} ({human_bytes(sizes.get(name, 0))})")
    print_line(f"{'would keep' if args.dry_run else 'kept'} {', '.join(remaining) or 'nothing'}")
    if args.upload_dir is None and upload_dir is not None:
        _tell_missing_copies(output_dir, upload_dir, remaining[: -args.keep])
    return FINE


def _tell_missing_copies(output_dir: Path, upload_dir: Path, old: list[str]) -> None:
    """Say which old checkpoints stay for want of a copy where the run uploads to, and how to let them go."""
    if owed := [name for name in file_system.owed(output_dir, upload_dir) if name in old]:
        print_line(
            f"of these, {', '.join(owed)} {'has' if len(owed) == 1 else 'have'} no complete copy in {upload_dir}, "
            f"where the run uploads to. If that is no longer so, remove {output_dir / names.COPIES} and prune again"
        )


def _owing(output_dir: Path, upload_dir: Path | None) -> list[retention.Owing]:
    """The destinations that checkpoints may be owed to: the Hub, and a directory of copies if there is one."""
    copies = [file_system.Copies(output_dir, upload_dir)] if upload_dir is not None else []
    return [push_queue.RecordedQueue(output_dir), *copies]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of checkpoints; at least 1 stays")
    return int(text)
