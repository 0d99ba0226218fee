"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import cli_hub, commit, disk, epoch, manifest, names, push_queue, retention, uploads, verify
from .errors import ConfigError, Damaged, NotFound, RollCkptError, RunIsLive
from .place import Place, is_foreign, locate, run_directory
from .printing import DAMAGED, ERROR, EXIT_CODES, FINE, human_bytes, notice, print_json, print_line, print_table, say

_HEARD_S = 60.0  # a run on another host that was heard of so recently is shown as live


# --- what lies in an output directory -----------------------------------------------------------------------


@dataclass(frozen=True)
class Pending:
    """An attempt that is not committed. `fate` is what recovery would do with it as it lies here."""

    name: str
    epoch: int
    attempt: int
    votes: int
    expected: int
    fate: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """What lies in an output directory; `foreign` are DeepSpeed checkpoints that somebody else wrote."""

    checkpoints: list[manifest.Manifest]
    damaged: list[str]
    pending: list[Pending]
    foreign: list[str]
    latest: str | None
    live: list[str] = field(default_factory=list)


def survey(output_dir: Path) -> Survey:
    """Look at an output directory. Reads records only, no contents, and waits for nobody."""
    damaged: list[str] = []
    checkpoints = commit.committed(output_dir, report=lambda problem: damaged.append(str(problem)))
    try:
        latest = commit.read_latest(output_dir)
    except Damaged as error:
        latest = None
        damaged.append(str(error))
    entries = disk.list_dir(output_dir)
    attempts = [parsed for entry in entries if (parsed := names.parse_attempt_dir(entry))]
    return Survey(
        checkpoints=checkpoints,
        damaged=damaged,
        pending=[_look_at_attempt(output_dir, *parsed) for parsed in attempts],
        foreign=[entry for entry in entries if is_foreign(output_dir / entry)],
        latest=latest,
        live=_live(output_dir),
    )


def look(place: Place) -> Survey:
    """The survey of a place: of the one checkpoint that it names, else of its output directory."""
    if place.name is None:
        return survey(place.output_dir)
    checkpoints, damaged, latest = [], [], None
    try:
        checkpoints.append(manifest.read(place.unit))
        latest = commit.read_latest(place.output_dir)
    except (Damaged, NotFound) as error:
        damaged.append(str(error))
    except OSError as error:
        damaged.append(f"{error.filename}: it cannot be read: {error.strerror}")
    return Survey(checkpoints, damaged, [], [], latest)


def _look_at_attempt(output_dir: Path, name: str, number: int, attempt: int) -> Pending:
    unit = output_dir / names.attempt_dir(name, number, attempt) / name
    votes = needed = 0
    try:
        told = manifest.parse_expected(disk.read_bytes(unit / names.EXPECTED), unit / names.EXPECTED)
        needed = len(told.voters())
        cast = set(disk.list_dir(unit / names.VOTES)) & set(told.voters())
        votes = len(cast)
        if disk.exists(unit / names.DECISION):
            decision = manifest.parse_decision(disk.read_bytes(unit / names.DECISION), unit / names.DECISION)
            fate, reason = ("finish", "committed") if decision.commit else ("discard", decision.reason)
            return Pending(name, number, attempt, votes, needed, fate, reason)
        for file in sorted(cast):
            path = unit / names.VOTES / file
            if problem := manifest.objection(manifest.parse_vote(disk.read_bytes(path), path), told, file):
                return Pending(name, number, attempt, votes, needed, "discard", problem)
    except Damaged as error:
        return Pending(name, number, attempt, votes, needed, "discard", str(error))
    except FileNotFoundError as error:
        # It was made, renamed or removed while we looked; or its process was killed at its very beginning.
        return Pending(name, number, attempt, votes, needed, "discard", f"{error.filename} is not there")
    fate = "finish" if votes == needed else "discard"
    return Pending(name, number, attempt, votes, needed, fate, f"{votes} of {needed} votes")


def _live(output_dir: Path) -> list[str]:
    """Who saves there now, as far as can be told without waiting for a heartbeat."""
    found = []
    for path, member in epoch.members(output_dir, epoch.newest_number(output_dir)).items():
        if isinstance(member, Damaged):
            continue
        try:
            if member.locked and member.boot_id == disk.boot_id():
                alive = epoch.is_alive(path, member)
            else:
                alive = time.time() - disk.mtime_ns(path) / 1e9 < _HEARD_S
        except FileNotFoundError:
            continue
        if alive:
            found.append(member.who)
    return found


# --- ls -----------------------------------------------------------------------------------------------------


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


def _row(told: manifest.Manifest, latest: str | None) -> dict[str, Any]:
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


# --- show ---------------------------------------------------------------------------------------------------


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
    told = manifest.read(place.unit)
    files = [f for f in told.files if f"{f.path}/".startswith(f"{place.part}/" if place.part else "")]
    nbytes = sum(file.nbytes for file in files)
    if args.json:
        shown = {**asdict(told), "files": [asdict(file) for file in files]}
        print_json({"path": str(place.unit), **shown, "bytes": nbytes})
        return FINE
    step = "no step" if told.step is None else f"step {told.step}"
    print_line(f"{place.unit / place.part}")
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


# --- verify -------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> int:
    """Read every byte again and compare it with what was committed."""
    place = locate(args.path)
    found = look(place)
    units = [place.unit] if place.name else [place.output_dir / told.name for told in found.checkpoints]
    names_read = [told.name for told in found.checkpoints]
    if place.name is None and not (names_read or found.damaged):
        raise NotFound(f"{args.path}: no committed checkpoint is there; see `roll-ckpt ls`")
    for name in found.foreign:
        say(f"not verified: {name} was not written by roll_ckpt and has no digests")
    nbytes = sum(told.nbytes() for told in found.checkpoints)
    with _leases(units), notice(f"reading {human_bytes(nbytes)} ..."):
        problems = verify.verify(place.unit) if place.name else verify.verify_run(place.output_dir)
    if args.json:
        print_json(
            {
                "path": str(place.unit),
                "sound": not problems,
                "checkpoints": names_read,
                "bytes": nbytes,
                "problems": [asdict(problem) for problem in problems],
            }
        )
    else:
        print_table([["damaged", problem.path, f"{problem.kind}: {problem.detail}"] for problem in problems])
        if not problems:
            print_line(f"sound: {', '.join(names_read)} ({human_bytes(nbytes)} read)")
    return DAMAGED if problems else FINE


@contextmanager
def _leases(units: Sequence[Path]) -> Iterator[None]:
    """Keep a live run from pruning what is read. What is gone, or lacks its record, has no lease."""
    with ExitStack() as stack:
        for unit in units:
            with suppress(Damaged, OSError):
                stack.enter_context(commit.reading(unit))
        yield


# --- prune and recover --------------------------------------------------------------------------------------


def prune(args: argparse.Namespace) -> int:
    """Remove all but the newest checkpoints of a run that is not running."""
    output_dir = run_directory(args.path, args.command)
    sizes = {told.name: told.nbytes() for told in survey(output_dir).checkpoints}

    def protected() -> set[str]:
        copied_to = [uploads.owed(output_dir, args.upload_dir)] if args.upload_dir else []
        return {*push_queue.owed(output_dir)}.union(*copied_to)

    recovered: list[commit.Recovery] = []
    if args.dry_run:
        found = survey(output_dir)
        kept = {*protected(), *([found.latest] if found.latest else [])}
        kept.update(name for name in sizes if commit.is_being_read(output_dir / name))
        removed = retention.plan(list(sizes), args.keep, kept)
    else:
        with _claimed(output_dir, args) as (claim, recovered):
            removed = retention.prune(output_dir, claim, args.keep, protected)
    kept_names = [told.name for told in survey(output_dir).checkpoints if told.name not in removed]
    if args.json:
        print_json(
            {
                "path": str(output_dir),
                "dry_run": args.dry_run,
                "removed": removed,
                "kept": kept_names,
                "recovered": [asdict(recovery) for recovery in recovered],
            }
        )
        return FINE
    for action, name, attempt, reason in _recovered_rows(recovered):
        print_line(f"{action} {name}, attempt {attempt}: {reason}")
    for name in removed:
        print_line(f"{'would remove' if args.dry_run else 'removed'} {name} ({human_bytes(sizes.get(name, 0))})")
    print_line(f"{'would keep' if args.dry_run else 'kept'} {', '.join(kept_names) or 'nothing'}")
    return FINE


def recover(args: argparse.Namespace) -> int:
    """Finish or discard what a killed run has left behind."""
    output_dir = run_directory(args.path, args.command)
    garbage = _garbage(output_dir)
    if args.dry_run:
        found = survey(output_dir)
        if found.live and not args.take_over:
            raise RunIsLive(f"{output_dir}: {found.live[0]} is running and saves there; it recovers by itself")
        told = {"pending": [asdict(pending) for pending in found.pending]}
        rows = [[left.fate, left.name, f"{left.epoch}.{left.attempt}", left.reason] for left in found.pending]
    else:
        with _claimed(output_dir, args) as (_, recovered):
            pass
        told = {"recovered": [asdict(recovery) for recovery in recovered]}
        rows = _recovered_rows(recovered)
    if args.json:
        print_json({"path": str(output_dir), "dry_run": args.dry_run, **told, "garbage": garbage})
        return FINE
    rows += [["delete" if args.dry_run else "deleted", path, "-", "thrown away before"] for path in garbage]
    if rows:
        print_table([["WOULD" if args.dry_run else "DID", "CHECKPOINT", "ATTEMPT", "BECAUSE"], *rows])
    else:
        print_line("nothing to recover")
    return FINE


def _garbage(output_dir: Path) -> list[str]:
    """What earlier runs have thrown away and not yet deleted, relative to the output directory."""
    folder = output_dir / names.TRASH
    return [f"{names.TRASH}/{of}/{entry}" for of in disk.list_dir(folder) for entry in disk.list_dir(folder / of)]


@contextmanager
def _claimed(output_dir: Path, args: argparse.Namespace) -> Iterator[tuple[epoch.Epoch, list[commit.Recovery]]]:
    """Own the directory like a run, which is refused while one is live; recover it first, like a run."""
    mine = epoch.claim_number(
        output_dir, f"roll-ckpt {args.command}", {"command line": 1}, None, take_over=args.take_over
    )
    try:
        yield mine, commit.recover(output_dir, epoch=mine)
    finally:
        mine.release()


def _recovered_rows(recovered: Sequence[commit.Recovery]) -> list[list[str]]:
    return [[found.action, found.name, f"{found.epoch}.{found.attempt}", found.reason] for found in recovered]


# --- hub-dev ------------------------------------------------------------------------------------------------


def hub_dev(args: argparse.Namespace) -> int:
    """Serve a local Hub until a signal ends it."""
    from .hub_dev import LocalHub  # HTTP takes a while to import; no other command needs it

    write_token, read_token = _token(args.token_env), _token(args.read_token_env)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = args.part_mib << 20
    serving = LocalHub(args.root, port=args.port, write_token=write_token, read_token=read_token, part_bytes=parts)
    with suppress(KeyboardInterrupt), serving as hub:
        told = {"url": hub.url, "root": str(args.root), "log": str(hub.log_path)}
        print(json.dumps(told) if args.json else hub.url, flush=True)
        say(f"a local Hub, for tests only; requests are logged in {hub.log_path}. For its clients:")
        print(f"  export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1", file=sys.stderr)
        threading.Event().wait()
    return FINE


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if token := os.environ.get(variable):
        return token
    raise ConfigError(f"the environment variable {variable}, which should hold a token, is not set or empty")


# --- the command line ---------------------------------------------------------------------------------------

_ABOUT = """\
Look after the checkpoints of roll_ckpt: list and show them, read every byte
again, remove old ones, clean up after a crash, push and pull. PATH is the
output_dir of a run, the save_dir of a DeepSpeed script, or one checkpoint in it.

  roll-ckpt ls runs/demo
  roll-ckpt verify runs/demo/checkpoint-9
"""

_LS = """\
List the committed checkpoints, the oldest first, one row each. Attempts that are
being written, or that a crash has left, stand below the table: they are no
checkpoints yet. Reads records only, no contents.

  roll-ckpt ls runs/demo
  roll-ckpt ls runs/demo --json | jq '.checkpoints[].name'
"""
_SHOW = """\
Show what one checkpoint holds: its clusters with their world sizes, and every
file with its size. Given a run's directory it shows the newest checkpoint; given
a cluster's directory in a checkpoint, the files of that cluster.

  roll-ckpt show runs/demo/checkpoint-9
  roll-ckpt show runs/demo/checkpoint-9/actor_train
"""
_VERIFY = """\
Read every byte of a checkpoint, or of all checkpoints of a run, and compare it
with the digests taken on the way to disk. Names each file that is damaged,
missing, too long or too short, no file, of another checkpoint, or that does not
belong there; then the exit code is 3. Changes nothing. The digests catch
accidents, not forgery.

  roll-ckpt verify runs/demo
  roll-ckpt verify runs/demo/checkpoint-9 --json
"""
_PRUNE = """\
Remove all but the newest N committed checkpoints. The one that `latest` names and
those that somebody reads just now, or that are owed to the Hub, stay in any case.
Refuses while a live run owns the directory (a run prunes by itself:
max_ckpt_to_keep); recovers the directory first, as the next start of the run would.

  roll-ckpt prune runs/demo --keep 2 --dry-run
  roll-ckpt prune runs/demo --keep 2 --upload-dir /mnt/archive/demo
"""
_HUB_DEV = """\
Serve a local Hugging Face Hub for development and tests without internet: model
repositories in DIR, on 127.0.0.1 only. Never for production. The first line on
stdout is its address; Ctrl-C or SIGTERM ends it, and DIR stays for the next start.

  roll-ckpt hub-dev --root runs/hub --port 8600
  export HF_ENDPOINT=http://127.0.0.1:8600 HF_HUB_DISABLE_XET=1 HF_TOKEN=anything

It has no Xet storage. HF_HUB_DISABLE_XET=1 must be set before the client starts, or
else uploads of large files end with an error that says so; with it, they use LFS.
Datasets, spaces, buckets and pull requests are not there.

Any token may write, unless --token-env names the variable with the one that may.
What is private needs a token to be seen. Requests are logged in DIR/log, one JSON
object a line, and at GET /__requests__; tokens never are. To make the second
commit fail after it was made, and then behave again:

  curl -d '{"route": "commit", "call": 2, "status": 500, "landed": true}' \\
      http://127.0.0.1:8600/__faults__
  curl -X DELETE http://127.0.0.1:8600/__faults__

Keys of a fault: route (a name from the log, or "*"), call (the first that fails,
from now on; 1), times (how many; 1, or 0 for all), status with message, code
(X-Error-Code) and retry_after_s, stall_s (seconds of silence first), cut_at (cut the
connection after so many bytes of the answer; 0 before it), landed (do it, then fail).
"""
_RECOVER = """\
Finish what a killed run had decided to commit, or for which all votes are there;
discard all else that it left, and delete what was thrown away already. One row
tells of each. Committed checkpoints are not touched, damaged ones neither:
`roll-ckpt verify` names those. The next start of the run does the same by itself.
Refuses while a live run owns the directory.

  roll-ckpt recover runs/demo --dry-run
  roll-ckpt recover runs/demo --json | jq '.recovered[].action'
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="roll-ckpt",
        description=_ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], short: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=short,
            description=about,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("path", metavar="PATH", help="an output directory, or one checkpoint in it")
        added.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        added.set_defaults(run=run)
        return added

    command("ls", ls, "list the checkpoints", _LS)
    command("show", show, "show what one checkpoint holds", _SHOW)
    command("verify", check, "read every byte again", _VERIFY)
    pruning = command("prune", prune, "remove all but the newest", _PRUNE)
    pruning.add_argument("--keep", type=_positive, required=True, metavar="N", help="how many checkpoints stay")
    pruning.add_argument(
        "--upload-dir", type=Path, metavar="DIR", help="keep also what has no complete copy in this directory"
    )
    recovering = command("recover", recover, "clean up after a crash", _RECOVER)
    cli_hub.add_commands(commands)
    serving = commands.add_parser(
        "hub-dev",
        help="serve a local Hub, for tests without internet",
        description=_HUB_DEV,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serving.add_argument("--root", type=Path, required=True, metavar="DIR", help="its repositories; made if missing")
    serving.add_argument("--port", type=int, default=0, metavar="N", help="0, the default: any that is free")
    serving.add_argument("--token-env", metavar="NAME", help="variable with the one token that may write")
    serving.add_argument("--read-token-env", metavar="NAME", help="variable with a token that may only read")
    serving.add_argument(
        "--part-mib", type=_positive_mib, default=64, metavar="N", help="larger files are uploaded in parts (64)"
    )
    serving.add_argument("--json", action="store_true", help="print one JSON document instead of the address")
    serving.set_defaults(run=hub_dev)
    for changing in (pruning, recovering):
        changing.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
        changing.add_argument(
            "--take-over", action="store_true", help="although a run seems live: it is known to be dead"
        )
    return parser


def _positive_mib(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of checkpoints; at least 1 stays")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. SystemExit(2) on wrong usage."""
    if argv is None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `roll-ckpt ls | head` ends quietly
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except Damaged as error:
        say(str(error))
        return DAMAGED
    except RollCkptError as error:
        say(str(error))
        return ERROR
    except OSError as error:
        say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return ERROR
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
