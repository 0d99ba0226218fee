"""roll-ckpt push: pushes one checkpoint, or everything that a run owes, to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.cli.parsing import Commands, add_parser
from roll_ckpt.cli.paths import Place, locate
from roll_ckpt.cli.printing import FINE, print_json, print_line, say
from roll_ckpt.cli.queue import show_queue, spell_repository
from roll_ckpt.errors import ConfigError, HubUnavailable
from roll_ckpt.formats import manifests
from roll_ckpt.upload.hub import push as hub_push
from roll_ckpt.upload.hub import push_queue, version, worker
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import ProgressBar, progress_bar
from roll_ckpt.upload.hub.push_queue import Repository

_ABOUT = """\
Push a checkpoint to the Hub, or everything that a run still owes, as the run itself
would: one commit for each checkpoint, then the tag checkpoint-N. PATH is a checkpoint
or a run's directory. REPO is namespace/name; it is created if it is missing. Leave it
out where the run already pushes to a repository.

  roll-ckpt push runs/demo/checkpoint-9 me/demo
  roll-ckpt push runs/demo me/demo --revision experiment

Private unless --public is given: without it a public repository is refused. What is
already on the Hub is not pushed again. The token comes from HF_TOKEN or
`hf auth login`. Ends with 4 if the run still owes something.
"""


def add_command(commands: Commands) -> None:
    """Add `push` to the command line."""
    parser = add_parser(commands, "push", push, "push to the Hub", _ABOUT)
    parser.add_argument("path", metavar="PATH", help="a run's directory, or one checkpoint in it")
    parser.add_argument("repo", metavar="REPO", nargs="?", help="namespace/name; default: where the run pushes to")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--public", action="store_true", help="let everybody see it")


def push(args: argparse.Namespace) -> int:
    """Push a checkpoint, or everything that a run owes."""
    version.warn_if_newer()
    place = locate(args.path)
    recorded = push_queue.repository(place.output_dir)
    repository = _repository(place, recorded, args)
    if place.name is not None:
        return _push_one(place, repository, recorded, args)
    if recorded is not None and recorded != repository:
        raise ConfigError(
            f"{place.output_dir}: its run pushes to {spell_repository(recorded)}, not to "
            f"{spell_repository(repository)}; push single checkpoints there, or change the run's checkpoint_config"
        )
    push_queue.set_repository(place.output_dir, repository)
    return _push_all_owed(place.output_dir, args)


def _repository(place: Place, recorded: Repository | None, args: argparse.Namespace) -> Repository:
    """The repository that the command line names, else the one that is `recorded` for the run."""
    if args.repo is not None:
        return Repository(args.repo, args.revision or "main", not args.public)
    if args.revision is not None or args.public:
        raise ConfigError("--revision and --public go with a REPO: roll-ckpt push PATH REPO …")
    if recorded is None:
        raise ConfigError(
            f"{place.output_dir}: its run pushes nowhere; name a REPO: roll-ckpt push PATH namespace/name"
        )
    return recorded


def _push_one(place: Place, repository: Repository, recorded: Repository | None, args: argparse.Namespace) -> int:
    """Push one checkpoint. It is recorded as done if the run pushes to the same repository."""
    name = place.checkpoint_dir.name
    with progress_bar() as bar:
        if recorded is not None and recorded.remote == repository.remote:
            commit = worker.push_one(place.output_dir, name, repository, _printer(bar, args))
        else:
            commit = hub_push.push(
                place.checkpoint_dir,
                repository.remote,
                private=repository.private,
                progress=lambda doing, done, total: bar({"name": name, "doing": doing, "done": done, "total": total}),
            )
    saved_as = manifests.read(place.checkpoint_dir).name
    uri = Remote(repository.repo_id, names.hub_tag(saved_as)).uri
    if args.json:
        print_json({"path": str(place.checkpoint_dir), "name": name, "uri": uri, "commit": commit})
    else:
        print_line(f"{place.checkpoint_dir}: pushed as {uri}, commit {commit[:12]}{_about_tag(saved_as)}")
    return FINE


def _about_tag(name: str) -> str:
    """What to say if a checkpoint has another tag than its name, "" if not."""
    if (tag := names.hub_tag(name)) == name:
        return ""
    return f"; no tag of the Hub can be {name!r}, so it is {tag} there, and a pull finds it by either"


def _push_all_owed(output_dir: Path, args: argparse.Namespace) -> int:
    with progress_bar() as bar:
        try:
            worker.push_all_owed(output_dir, _printer(bar, args), again=True, patient=False)
        except HubUnavailable as error:
            say(str(error))
    return show_queue(output_dir, args)


def _printer(bar: ProgressBar, args: argparse.Namespace) -> worker.OnEvent:
    """What prints the events of a push: progress in the bar, problems on stderr, what is done on stdout."""

    def print_event(event: dict[str, Any]) -> None:
        if event["event"] == "progress":
            bar(event)
            return
        bar.end()
        if event["event"] in ("waiting", "failed"):
            say(event["detail"])
        elif event["event"] == "done" and not args.json:
            print_line(f"pushed {event['name']}, commit {event['commit'][:12]}{_about_tag(event['name'])}")

    return print_event
