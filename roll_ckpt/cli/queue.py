"""roll-ckpt queue: what a run owes to the Hub; `ls` shows it, `retry` and `cancel` change it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from roll_ckpt.cli.parsing import Commands, add_parser
from roll_ckpt.cli.paths import run_directory
from roll_ckpt.cli.printing import EXIT_CODES, FINE, OWED, human_bytes, print_json, print_line, print_table
from roll_ckpt.errors import NotFound
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import Entry, Repository

_SHORT = "what a run owes to the Hub"
_ABOUT = """\
Show or change what a run owes to the Hub.

  roll-ckpt queue ls runs/demo
  roll-ckpt queue retry runs/demo
  roll-ckpt queue cancel runs/demo checkpoint-9
"""
_ABOUT_LS = """\
List the push of each checkpoint of a run: done; owed (it is pushed at the next save,
at the next start, or by `roll-ckpt push`); failed (the Hub refused it: read why,
repair that, then `retry`); cancelled. Ends with 4 if one is owed or failed.

  roll-ckpt queue ls runs/demo
  roll-ckpt queue ls runs/demo --json | jq '.entries[].state'
"""
_ABOUT_RETRY = """\
Mark all failed pushes as owed again, or the named one, even if it was cancelled.
This command pushes nothing: a live run does so at its next save, `roll-ckpt push`
does so at once.

  roll-ckpt queue retry runs/demo
  roll-ckpt queue retry runs/demo checkpoint-9
"""
_ABOUT_CANCEL = """\
Give up pushing a checkpoint. It may be pruned then. If it was already pushed, it
stays on the Hub.

  roll-ckpt queue cancel runs/demo checkpoint-9
"""


def add_command(commands: Commands) -> None:
    """Add `queue` to the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    queue = commands.add_parser("queue", help=_SHORT, description=_ABOUT, epilog=EXIT_CODES, formatter_class=raw)
    verbs = queue.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = add_parser(verbs, "ls", _ls, "list the pushes", _ABOUT_LS)
    retrying = add_parser(verbs, "retry", _retry, "mark failed pushes as owed again", _ABOUT_RETRY)
    cancelling = add_parser(verbs, "cancel", _cancel, "give up one push", _ABOUT_CANCEL)
    for verb in (listing, retrying, cancelling):
        verb.add_argument("path", metavar="DIR", help="a run's directory")
    retrying.add_argument("name", metavar="NAME", nargs="?", help="one checkpoint; default: all that failed")
    cancelling.add_argument("name", metavar="NAME", help="one checkpoint")


def show_queue(output_dir: Path, args: argparse.Namespace) -> int:
    """Print the queue of a run that pushes somewhere; the exit code is OWED if something is owed or failed."""
    repository = push_queue.repository(output_dir)
    assert repository is not None
    entries = push_queue.list_entries(output_dir)
    owed = [entry.name for entry in entries if entry.state in ("owed", "failed")]
    if args.json:
        target = {"uri": repository.remote.uri, "private": repository.private}
        print_json({"path": str(output_dir), **target, "entries": [asdict(entry) for entry in entries], "owed": owed})
    else:
        print_line(f"{output_dir}: pushes to {spell_repository(repository)}")
        _print_entries(entries)
    return OWED if owed else FINE


def spell_repository(repository: Repository) -> str:
    """A repository for people: `hf://me/demo@main (private)`."""
    return f"{repository.remote.uri} ({'private' if repository.private else 'public'})"


def _ls(args: argparse.Namespace) -> int:
    return show_queue(_output_dir(args), args)


def _retry(args: argparse.Namespace) -> int:
    output_dir = _output_dir(args)
    owed_again = push_queue.retry(output_dir, args.name)
    if args.json:
        print_json({"path": str(output_dir), "retry": owed_again})
    else:
        print_line(f"owed again: {', '.join(owed_again)}" if owed_again else "nothing to retry")
    return FINE


def _cancel(args: argparse.Namespace) -> int:
    output_dir = _output_dir(args)
    push_queue.cancel(output_dir, args.name)
    state = push_queue.find(output_dir, args.name).state
    if args.json:
        print_json({"path": str(output_dir), "name": args.name, "state": state})
    else:
        print_line(f"{args.name}: {'already pushed; it stays on the Hub' if state == 'done' else state}")
    return FINE


def _output_dir(args: argparse.Namespace) -> Path:
    """The directory of a run that pushes somewhere; NotFound if it does not."""
    output_dir = run_directory(args.path, "queue")
    if push_queue.repository(output_dir) is None:
        raise NotFound(f"{output_dir}: its run pushes nowhere, so nothing is owed; `roll-ckpt push DIR REPO` pushes it")
    return output_dir


def _print_entries(entries: list[Entry]) -> None:
    rows = [["NAME", "STATE", "SIZE", "TRIES", "COMMIT"]]
    rows += [[e.name, e.state, human_bytes(e.nbytes), str(e.attempts), (e.commit or "-")[:12]] for e in entries]
    if entries:
        print_table(rows, right={2, 3})
    else:
        print_line("no checkpoint yet")
    for entry in entries:
        if entry.detail and entry.state != "done":
            print_line(f"{entry.name}: {entry.detail}")
