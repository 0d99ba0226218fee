"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from roll_ckpt.cli.paths import Place, locate
from roll_ckpt.cli.printing import DAMAGED, ERROR, FINE, human_bytes, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import survey
from roll_ckpt.formats import manifests


def show(args: argparse.Namespace) -> int:
    """The manifest of one checkpoint in readable form."""
    place = locate(args.path)
    if place.name is None:
        found = survey(place.output_dir)
        for problem in found.damaged:
            say(f"damaged: {problem}")
        if not found.checkpoints:
            say(f"{args.path}: no committed checkpoint can be shown; see `roll-ckpt ls`")
            return DAMAGED if found.damaged else ERROR
        place = Place(place.output_dir, found.checkpoints[-1].name)
    told = manifests.read(place.checkpoint_dir)
    files = [f for f in told.files if f"{f.path}/".startswith(f"{place.part}/" if place.part else "")]
    nbytes = sum(file.nbytes for file in files)
    if args.json:
        shown = {**asdict(told), "files": [asdict(file) for file in files]}
        print_json({"path": str(place.checkpoint_dir), **shown, "bytes": nbytes})
        return FINE
    step = "no step" if told.step is None else f"step {told.step}"
    print_line(f"{place.checkpoint_dir / place.part}")
    print_line(f"  {step}, epoch {told.epoch}, attempt {told.attempt}, run_id {told.run_id!r}")
    print_line(f"  written by {told.software}; {len(files)} files, {human_bytes(nbytes)}")
    if not told.directories_durable:
        print_line("  weaker guarantee: its file system cannot make directory entries durable")
    print_line("clusters")
    facts = [
        [f"  {name}", ", ".join(f"{key} {_fact(value)}" for key, value in sorted(known.items()))]
        for name, known in told.clusters.items()
    ]
    print_table(facts)
    print_line("files")
    print_table([[f"  {human_bytes(file.nbytes)}", file.path] for file in files], right={0})
    return FINE


def _fact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


_SHOW = """\
Show what one checkpoint holds: its clusters with their world sizes, and every
file with its size. Given a run's directory it shows the newest checkpoint; given
a cluster's directory in a checkpoint, the files of that cluster.

  roll-ckpt show runs/demo/checkpoint-9
  roll-ckpt show runs/demo/checkpoint-9/actor_train
"""
