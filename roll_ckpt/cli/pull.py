"""roll-ckpt pull: brings one checkpoint from the Hub."""

from __future__ import annotations

import argparse

from roll_ckpt.cli.parsing import Commands, add_parser
from roll_ckpt.cli.paths import argument
from roll_ckpt.cli.printing import FINE, human_bytes, print_json, print_line
from roll_ckpt.formats import manifests
from roll_ckpt.upload.hub import pull as hub_pull
from roll_ckpt.upload.hub import version
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import progress_bar

_ABOUT = """\
Bring a checkpoint from the Hub to DIR/<name>, complete and verified, or not at all.
URI is hf://namespace/name for its newest checkpoint, or hf://namespace/name@checkpoint-9
for one of its tags. The same command resumes a pull that was killed or cut off; if the
checkpoint is already there, it does nothing.

  roll-ckpt pull hf://me/demo runs/new
  roll-ckpt pull hf://me/demo@checkpoint-9 runs/new --json

The token comes from HF_TOKEN or `hf auth login`, the endpoint from HF_ENDPOINT.
A run whose output_dir holds pulled checkpoints resumes from them like from its own.
"""


def add_command(commands: Commands) -> None:
    """Add `pull` to the command line."""
    parser = add_parser(commands, "pull", pull, "pull from the Hub", _ABOUT)
    parser.add_argument("uri", metavar="URI", help="hf://namespace/name, or hf://namespace/name@revision")
    parser.add_argument("directory", metavar="DIR", help="gets the checkpoint; made if missing")


def pull(args: argparse.Namespace) -> int:
    """Bring a checkpoint from the Hub."""
    remote = Remote.parse(args.uri)
    version.warn_if_newer()
    moved = False
    with progress_bar() as bar:

        def progress(done: int, total: int) -> None:
            nonlocal moved
            moved = True
            bar({"name": remote.uri, "doing": "pulled", "done": done, "total": total})

        checkpoint_dir = hub_pull.pull(remote, argument(args.directory), progress)
    manifest = manifests.read(checkpoint_dir)
    if args.json:
        facts = {"name": manifest.name, "step": manifest.step, "bytes": manifest.nbytes(), "was_there": not moved}
        print_json({"uri": remote.uri, "path": str(checkpoint_dir), **facts})
    elif moved:
        print_line(f"{checkpoint_dir}: complete and verified ({human_bytes(manifest.nbytes())})")
    else:
        print_line(f"{checkpoint_dir}: was there already")
    return FINE
