"""roll-ckpt ls: the committed checkpoints of a run, one row each, and the attempts that are not committed."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from typing import Any

from roll_ckpt.cli.parsing import Commands, add_parser, add_path
from roll_ckpt.cli.paths import Place, locate
from roll_ckpt.cli.printing import DAMAGED, FINE, human_age, human_bytes, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import Survey, look
from roll_ckpt.disk.missing import if_there
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.transaction import listing

_ABOUT = """\
List the committed checkpoints, the oldest first, one row each: when it was
committed (local time), how long ago, its clusters, files and size. Attempts that a
run is writing, or that a crash has left, stand below the table: they are not
checkpoints yet. Reads records only, not the contents of checkpoints.

  roll-ckpt ls runs/demo
  roll-ckpt ls runs/demo --json | jq '.checkpoints[].name'

A checkpoint that was pulled or copied to its place counts as committed at that time.
In JSON, committed_at is in UTC and age_s in seconds. `roll-ckpt show` has the epoch
and the attempt.
"""


def add_command(commands: Commands) -> None:
    """Add `ls` to the command line."""
    add_path(add_parser(commands, "ls", ls, "list the checkpoints", _ABOUT))


def ls(args: argparse.Namespace) -> int:
    """Print one row for each committed checkpoint; attempts that are not committed come below."""
    place = locate(args.path)
    survey = look(place)
    rows = [_row(place, manifest, survey.latest) for manifest in survey.checkpoints]
    if args.json:
        print_json(
            {
                "path": str(place.output_dir),
                "latest": survey.latest,
                "checkpoints": rows,
                "pending": [asdict(attempt) for attempt in survey.pending],
                "foreign": survey.foreign,
                "damaged": survey.damaged,
                "live": survey.live,
            }
        )
    else:
        _print_checkpoints(place, rows)
        _print_others(survey)
    for problem in survey.damaged:
        say(f"damaged: {problem}")
    return DAMAGED if survey.damaged else FINE


def _row(place: Place, manifest: Manifest, latest: str | None) -> dict[str, Any]:
    """What --json says about one checkpoint. Its time is null if it was pruned while `ls` was reading."""
    committed_at_s = if_there(partial(listing.committed_at_s, place.directory_of(manifest.name)))
    committed_at = None if committed_at_s is None else datetime.fromtimestamp(committed_at_s, timezone.utc)
    return {
        "name": manifest.name,
        "step": manifest.step,
        "committed_at": None if committed_at is None else committed_at.isoformat(timespec="seconds"),
        "age_s": None if committed_at_s is None else round(time.time() - committed_at_s),
        "clusters": {name: facts["world_size"] for name, facts in manifest.clusters.items()},
        "files": len(manifest.files),
        "bytes": manifest.nbytes(),
        "run_id": manifest.run_id,
        "epoch": manifest.epoch,
        "attempt": manifest.attempt,
        "latest": manifest.name == latest,
    }


def _print_checkpoints(place: Place, rows: list[dict[str, Any]]) -> None:
    if not rows:
        print_line(f"{place.output_dir}: no committed checkpoint yet")
        return
    head = ["", "NAME", "STEP", "COMMITTED", "AGE", "CLUSTERS (RANKS)", "FILES", "SIZE"]
    print_table([head, *map(_cells, rows)], right={2, 4, 6, 7})
    if any(row["latest"] for row in rows):
        print_line("* `latest` names it")


def _cells(row: dict[str, Any]) -> list[str]:
    at = row["committed_at"]
    return [
        "*" if row["latest"] else "",
        row["name"],
        "-" if row["step"] is None else str(row["step"]),
        "-" if at is None else f"{datetime.fromisoformat(at).astimezone():%Y-%m-%d %H:%M}",
        "-" if at is None else human_age(row["age_s"]),
        ", ".join(f"{name} ({size})" for name, size in row["clusters"].items()),
        str(row["files"]),
        human_bytes(row["bytes"]),
    ]


def _print_others(survey: Survey) -> None:
    """Below the table: attempts that are not committed, checkpoints of other writers, and who is saving."""
    for attempt in survey.pending:
        votes = f"attempt {attempt.epoch}.{attempt.attempt}, {attempt.votes} of {attempt.expected} votes"
        if survey.live:
            print_line(f"being written: {attempt.name} ({votes})")
        else:
            print_line(f"left by a crash: {attempt.name} ({votes}); recovery will {attempt.fate} it")
    for name in survey.foreign:
        print_line(f"foreign: {name} was not written by roll_ckpt, has no manifest and cannot be verified")
    for who in survey.live:
        print_line(f"live: {who} saves there")
