"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from roll_ckpt.cli.paths import Place, locate
from roll_ckpt.cli.printing import DAMAGED, FINE, human_bytes, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import Survey, look
from roll_ckpt.formats.manifests import Manifest


def ls(args: argparse.Namespace) -> int:
    """One row for each committed checkpoint; what is being written stands apart."""
    place = locate(args.path)
    found = look(place)
    if args.json:
        print_json(
            {
                "path": str(place.output_dir),
                "latest": found.latest,
                "checkpoints": [_row(told, found.latest) for told in found.checkpoints],
                "pending": [asdict(pending) for pending in found.pending],
                "foreign": found.foreign,
                "damaged": found.damaged,
                "live": found.live,
            }
        )
    else:
        _print_listing(place, found)
    for problem in found.damaged:
        say(f"damaged: {problem}")
    return DAMAGED if found.damaged else FINE


def _row(told: Manifest, latest: str | None) -> dict[str, Any]:
    return {
        "name": told.name,
        "step": told.step,
        "clusters": {name: facts["world_size"] for name, facts in told.clusters.items()},
        "files": len(told.files),
        "bytes": told.nbytes(),
        "run_id": told.run_id,
        "epoch": told.epoch,
        "attempt": told.attempt,
        "latest": told.name == latest,
    }


def _print_listing(place: Place, found: Survey) -> None:
    rows = [["", "NAME", "STEP", "CLUSTERS (RANKS)", "FILES", "SIZE", "EPOCH.ATTEMPT"]]
    for row in (_row(told, found.latest) for told in found.checkpoints):
        clusters = ", ".join(f"{name} ({size})" for name, size in row["clusters"].items())
        step = "-" if row["step"] is None else str(row["step"])
        attempt = f"{row['epoch']}.{row['attempt']}"
        mark = "*" if row["latest"] else ""
        rows.append([mark, row["name"], step, clusters, str(row["files"]), human_bytes(row["bytes"]), attempt])
    if found.checkpoints:
        print_table(rows, right={2, 4, 5, 6})
        if any(told.name == found.latest for told in found.checkpoints):
            print_line("* `latest` names it")
    else:
        print_line(f"{place.output_dir}: no committed checkpoint yet")
    for pending in found.pending:
        votes = f"attempt {pending.epoch}.{pending.attempt}, {pending.votes} of {pending.expected} votes"
        if found.live:
            print_line(f"being written: {pending.name} ({votes})")
        else:
            print_line(f"left by a crash: {pending.name} ({votes}); recovery will {pending.fate} it")
    for name in found.foreign:
        print_line(f"not ours: {name} has no manifest and cannot be verified")
    for who in found.live:
        print_line(f"live: {who} saves there")


_LS = """\
List the committed checkpoints, the oldest first, one row each. Attempts that are
being written, or that a crash has left, stand below the table: they are no
checkpoints yet. Reads records only, no contents.

  roll-ckpt ls runs/demo
  roll-ckpt ls runs/demo --json | jq '.checkpoints[].name'
"""
