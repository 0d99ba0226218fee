"""roll-ckpt show: what one checkpoint holds, from its manifest."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from roll_ckpt.cli.parsing import Commands, add_parser, add_path
from roll_ckpt.cli.paths import Place, locate
from roll_ckpt.cli.printing import DAMAGED, ERROR, FINE, human_bytes, print_json, print_line, print_table, say
from roll_ckpt.cli.survey import survey
from roll_ckpt.formats import manifests
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Receipt

_ABOUT = """\
Show what one checkpoint holds: its step, epoch and attempt, its clusters with their
world sizes, and every file with its size. For a run's directory it shows the newest
checkpoint; for a cluster's directory in a checkpoint, the files of that cluster.

  roll-ckpt show runs/demo/checkpoint-9
  roll-ckpt show runs/demo/checkpoint-9/actor_train
"""


def add_command(commands: Commands) -> None:
    """Add `show` to the command line."""
    add_path(add_parser(commands, "show", show, "show what one checkpoint holds", _ABOUT))


def show(args: argparse.Namespace) -> int:
    """Print the manifest of one checkpoint in readable form."""
    place = locate(args.path)
    if place.name is None:
        found = survey(place.output_dir)
        for problem in found.damaged:
            say(f"damaged: {problem}")
        if not found.checkpoints:
            say(f"{args.path}: there is no committed checkpoint to show; see `roll-ckpt ls`")
            return DAMAGED if found.damaged else ERROR
        place = Place(place.output_dir, found.checkpoints[-1].name)
    manifest = manifests.read(place.checkpoint_dir)
    files = [file for file in manifest.files if f"{file.path}/".startswith(f"{place.part}/" if place.part else "")]
    if args.json:
        nbytes = sum(file.nbytes for file in files)
        document = {**asdict(manifest), "files": [asdict(file) for file in files]}
        print_json({"path": str(place.checkpoint_dir), **document, "bytes": nbytes})
    else:
        _print(place, manifest, files)
    return FINE


def _print(place: Place, manifest: Manifest, files: list[Receipt]) -> None:
    step = "no step" if manifest.step is None else f"step {manifest.step}"
    print_line(f"{place.checkpoint_dir / place.part}")
    print_line(f"  {step}, epoch {manifest.epoch}, attempt {manifest.attempt}, run_id {manifest.run_id!r}")
    size = human_bytes(sum(file.nbytes for file in files))
    print_line(f"  written by {manifest.software}; {len(files)} files, {size}")
    if not manifest.directories_durable:
        print_line("  weaker guarantee: its file system cannot make directory entries durable")
    print_line("clusters")
    rows = [
        [f"  {name}", ", ".join(f"{key} {_spell(value)}" for key, value in sorted(facts.items()))]
        for name, facts in manifest.clusters.items()
    ]
    print_table(rows)
    print_line("files")
    print_table([[f"  {human_bytes(file.nbytes)}", file.path] for file in files], right={0})


def _spell(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
