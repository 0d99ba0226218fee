"""The commands of roll-ckpt that speak with the Hub, or about it: push, pull, queue."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roll_ckpt.cli.paths import Place, locate, run_directory
from roll_ckpt.cli.printing import EXIT_CODES, FINE, OWED, human_bytes, print_json, print_line, print_table, say
from roll_ckpt.errors import ConfigError, HubUnavailable, NotFound
from roll_ckpt.formats import manifests
from roll_ckpt.upload.hub import push_queue, worker
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import ProgressBar
from roll_ckpt.upload.hub.pull import pull
from roll_ckpt.upload.hub.push import push
from roll_ckpt.upload.hub.push_queue import Entry, Repository

_PULL = """\
Bring a checkpoint from the Hub to DIR/<name>, complete and verified, or not at
all. URI is hf://namespace/name, its newest checkpoint, or one of its tags:
hf://namespace/name@checkpoint-9. The same command goes on where a pull was killed
or cut off; if the checkpoint is there already, it does nothing.

  roll-ckpt pull hf://me/demo runs/new
  roll-ckpt pull hf://me/demo@checkpoint-9 runs/new --json

The token comes from HF_TOKEN or `hf auth login`, the endpoint from HF_ENDPOINT.
An output_dir whose checkpoints come from a pull is resumed like any other.
"""
_PUSH = """\
Push a checkpoint to the Hub, or all that a run still owes, as the run itself would:
one commit each, then the tag checkpoint-N. PATH is a checkpoint or a run's
directory. REPO is namespace/name; it is made if it is missing, and need not be
given where the run pushes there already.

  roll-ckpt push runs/demo/checkpoint-9 me/demo
  roll-ckpt push runs/demo me/demo --revision experiment

Private unless --public is given: without it a public repository is refused. What is
on the Hub already is not pushed again. The token comes from HF_TOKEN or
`hf auth login`. Ends with 4 if something of the run is still owed.
"""
_QUEUE = """\
What a run owes to the Hub.

  roll-ckpt queue ls runs/demo
  roll-ckpt queue retry runs/demo
  roll-ckpt queue cancel runs/demo checkpoint-9
"""
_QUEUE_LS = """\
List what became of each checkpoint of a run: done, owed (it goes at the next save,
at the next start, or by `roll-ckpt push`), failed (the Hub said no: see why, mend
it, `retry`), cancelled. Ends with 4 if one is owed or failed.

  roll-ckpt queue ls runs/demo
  roll-ckpt queue ls runs/demo --json | jq '.entries[].state'
"""
_QUEUE_RETRY = """\
Let those be pushed again that the Hub has refused, or the one named, though it was
cancelled. Nothing is pushed by this: a live run does so at its next save, and
`roll-ckpt push` does at once.

  roll-ckpt queue retry runs/demo
  roll-ckpt queue retry runs/demo checkpoint-9
"""
_QUEUE_CANCEL = """\
Give up pushing a checkpoint. It may be pruned then. What was pushed stays pushed.

  roll-ckpt queue cancel runs/demo checkpoint-9
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add push, pull and queue to the command line."""
    pushing = _command(commands, "push", push_path, "push to the Hub", _PUSH)
    pushing.add_argument("path", metavar="PATH", help="a run's directory, or one checkpoint in it")
    pushing.add_argument("repo", metavar="REPO", nargs="?", help="namespace/name; default: where the run pushes to")
    pushing.add_argument("--revision", metavar="BRANCH", help="default: main")
    pushing.add_argument("--public", action="store_true", help="let everybody see it")
    pulling = _command(commands, "pull", pull_uri, "pull from the Hub", _PULL)
    pulling.add_argument("uri", metavar="URI", help="hf://namespace/name, or hf://namespace/name@revision")
    pulling.add_argument("directory", type=Path, metavar="DIR", help="gets the checkpoint; made if missing")
    about = "what a run owes to the Hub"
    raw = argparse.RawDescriptionHelpFormatter
    queue = commands.add_parser("queue", help=about, description=_QUEUE, epilog=EXIT_CODES, formatter_class=raw)
    verbs = queue.add_subparsers(dest="verb", required=True, metavar="VERB")
    listing = _command(verbs, "ls", queue_ls, "list it", _QUEUE_LS)
    retrying = _command(verbs, "retry", queue_retry, "let what failed be pushed again", _QUEUE_RETRY)
    cancelling = _command(verbs, "cancel", queue_cancel, "give one up", _QUEUE_CANCEL)
    for verb in (listing, retrying, cancelling):
        verb.add_argument("path", metavar="DIR", help="a run's directory")
    retrying.add_argument("name", metavar="NAME", nargs="?", help="one checkpoint; default: all that failed")
    cancelling.add_argument("name", metavar="NAME", help="one checkpoint")


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    short: str,
    about: str,
) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    added = commands.add_parser(name, help=short, description=about, epilog=EXIT_CODES, formatter_class=raw)
    added.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    added.set_defaults(run=run)
    return added


@contextmanager
def _bar() -> Iterator[ProgressBar]:
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.end()


def pull_uri(args: argparse.Namespace) -> int:
    """Bring a checkpoint from the Hub."""
    remote = Remote.parse(args.uri)
    moved = False
    with _bar() as bar:

        def progress(here: int, of: int) -> None:
            nonlocal moved
            moved = True
            bar({"name": remote.uri, "doing": "pulled", "done": here, "total": of})

        checkpoint_dir = pull(remote, args.directory, progress)
    told = manifests.read(checkpoint_dir)
    if args.json:
        found = {"name": told.name, "step": told.step, "bytes": told.nbytes(), "was_there": not moved}
        print_json({"uri": remote.uri, "path": str(checkpoint_dir), **found})
    elif moved:
        print_line(f"{checkpoint_dir}: complete and verified ({human_bytes(told.nbytes())})")
    else:
        print_line(f"{checkpoint_dir}: was there already")
    return FINE


def push_path(args: argparse.Namespace) -> int:
    """Push a checkpoint, or what a run owes."""
    place = locate(args.path)
    known = push_queue.repository(place.output_dir)
    if args.repo is None and (args.revision is not None or args.public):
        raise ConfigError("--revision and --public go with a REPO: roll-ckpt push PATH REPO …")
    wanted = Repository(args.repo, args.revision or "main", not args.public) if args.repo else known
    if wanted is None:
        raise ConfigError(
            f"{place.output_dir}: its run pushes nowhere; name a REPO: roll-ckpt push PATH namespace/name"
        )
    if place.name is not None:
        return _push_one(place, wanted, known, args)
    if known is not None and known != wanted:
        raise ConfigError(
            f"{place.output_dir}: its run pushes to {_spell(known)}, not to {_spell(wanted)}; push single checkpoints "
            "there, or change the run's checkpoint_config"
        )
    push_queue.set_repository(place.output_dir, wanted)
    return _drain(place.output_dir, args)


def _push_one(place: Place, to: Repository, known: Repository | None, args: argparse.Namespace) -> int:
    name = place.checkpoint_dir.name
    with _bar() as bar:
        if known is not None and known.remote == to.remote:
            made = worker.push_one(place.output_dir, name, to, _teller(bar, args))
        else:
            made = push(
                place.checkpoint_dir,
                to.remote,
                private=to.private,
                progress=lambda doing, done, total: bar({"name": name, "doing": doing, "done": done, "total": total}),
            )
    uri = Remote(to.repo_id, name).uri
    if args.json:
        print_json({"path": str(place.checkpoint_dir), "name": name, "uri": uri, "commit": made})
    else:
        print_line(f"{place.checkpoint_dir}: is {uri}, commit {made[:12]}")
    return FINE


def _drain(output_dir: Path, args: argparse.Namespace) -> int:
    with _bar() as bar:
        try:
            worker.push_all_owed(output_dir, _teller(bar, args), again=True, patient=False)
        except HubUnavailable as error:
            say(str(error))
    return _show_queue(output_dir, args)


def _teller(bar: ProgressBar, args: argparse.Namespace) -> worker.Tell:
    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            bar(event)
            return
        bar.end()
        if event["event"] in ("waiting", "failed"):
            say(event["detail"])
        elif event["event"] == "done" and not args.json:
            print_line(f"pushed {event['name']}, commit {event['commit'][:12]}")

    return tell


def queue_ls(args: argparse.Namespace) -> int:
    """List what became of each checkpoint of a run."""
    return _show_queue(_queue_of(args), args)


def queue_retry(args: argparse.Namespace) -> int:
    """Let refused pushes be tried again."""
    output_dir = _queue_of(args)
    again = push_queue.retry(output_dir, args.name)
    if args.json:
        print_json({"path": str(output_dir), "retry": again})
    else:
        print_line(f"owed again: {', '.join(again)}" if again else "nothing to retry")
    return FINE


def queue_cancel(args: argparse.Namespace) -> int:
    """Give up one push."""
    output_dir = _queue_of(args)
    push_queue.cancel(output_dir, args.name)
    state = push_queue.find(output_dir, args.name).state
    if args.json:
        print_json({"path": str(output_dir), "name": args.name, "state": state})
    else:
        print_line(f"{args.name}: {'it was pushed, and stays there' if state == 'done' else state}")
    return FINE


def _queue_of(args: argparse.Namespace) -> Path:
    output_dir = run_directory(args.path, "queue")
    if push_queue.repository(output_dir) is None:
        raise NotFound(f"{output_dir}: its run pushes nowhere, so nothing is owed. `roll-ckpt push DIR REPO` pushes it")
    return output_dir


def _show_queue(output_dir: Path, args: argparse.Namespace) -> int:
    to = push_queue.repository(output_dir)
    assert to is not None
    entries = push_queue.list_entries(output_dir)
    owed = [entry for entry in entries if entry.state in ("owed", "failed")]
    if args.json:
        found = {"uri": to.remote.uri, "private": to.private, "entries": [asdict(entry) for entry in entries]}
        print_json({"path": str(output_dir), **found, "owed": [entry.name for entry in owed]})
    else:
        print_line(f"{output_dir}: pushes to {_spell(to)}")
        _print_entries(entries)
    return OWED if owed else FINE


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


def _spell(to: Repository) -> str:
    return f"{to.remote.uri} ({'private' if to.private else 'public'})"
