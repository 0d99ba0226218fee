"""roll-ckpt recover: finishes or discards what a killed run has left behind."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.cli.claiming import claimed, recovered_rows
from roll_ckpt.cli.parsing import Commands, add_change_options, add_parser, add_path
from roll_ckpt.cli.paths import run_directory
from roll_ckpt.cli.printing import FINE, print_json, print_line, print_table
from roll_ckpt.cli.survey import survey
from roll_ckpt.disk import tree
from roll_ckpt.errors import RunIsLive
from roll_ckpt.transaction.home import find_home

_ABOUT = """\
Finish each attempt that a killed run had decided to commit, or that has all its
votes; discard every other attempt, and delete what the run had already thrown away.
Prints one row for each. Committed checkpoints are left alone, damaged ones too:
`roll-ckpt verify` names those. The next start of the run does the same by itself.
Refuses while a live run owns the directory.

  roll-ckpt recover runs/demo --dry-run
  roll-ckpt recover runs/demo --json | jq '.recovered[].action'
"""


def add_command(commands: Commands) -> None:
    """Add `recover` to the command line."""
    parser = add_parser(commands, "recover", recover, "clean up after a crash", _ABOUT)
    add_path(parser)
    add_change_options(parser)


def recover(args: argparse.Namespace) -> int:
    """Finish or discard what a killed run has left behind."""
    output_dir = run_directory(args.path, args.command)
    garbage = _garbage(output_dir)
    if args.dry_run:
        found = survey(output_dir)
        if found.live and not args.take_over:
            raise RunIsLive(f"{output_dir}: {found.live[0]} is running and saves there; it recovers by itself")
        attempts = {"pending": [asdict(pending) for pending in found.pending]}
        rows = [[left.fate, left.name, f"{left.epoch}.{left.attempt}", left.reason] for left in found.pending]
    else:
        with claimed(output_dir, args) as (_, recovered):
            pass
        attempts = {"recovered": [asdict(recovery) for recovery in recovered]}
        rows = recovered_rows(recovered)
    if args.json:
        print_json({"path": str(output_dir), "dry_run": args.dry_run, **attempts, "garbage": garbage})
        return FINE
    rows += [["delete" if args.dry_run else "deleted", path, "-", "thrown away before"] for path in garbage]
    if rows:
        print_table([["WOULD" if args.dry_run else "DID", "CHECKPOINT", "ATTEMPT", "BECAUSE"], *rows])
    else:
        print_line("nothing to recover")
    return FINE


def _garbage(output_dir: Path) -> list[str]:
    """What earlier runs have thrown away and not yet deleted, relative to the directory of the bookkeeping."""
    trash = find_home(output_dir) / names.TRASH
    return [
        f"{names.TRASH}/{epoch}/{entry}" for epoch in tree.list_dir(trash) for entry in tree.list_dir(trash / epoch)
    ]
