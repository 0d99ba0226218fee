"""roll-ckpt doctor: what is installed, what a file system can do, and whether a command runs through roll_ckpt."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from roll_ckpt.activation import variable
from roll_ckpt.cli import installed, judging, watching
from roll_ckpt.cli.installed import Package
from roll_ckpt.cli.judging import Verdict
from roll_ckpt.cli.parsing import Commands, add_parser
from roll_ckpt.cli.paths import argument
from roll_ckpt.cli.printing import ERROR, FINE, USAGE, human_bytes, notice, print_json, print_line, print_table, say
from roll_ckpt.cli.watching import Watched
from roll_ckpt.disk import abilities, tree
from roll_ckpt.errors import ConfigError

_ABOUT = """\
Tell what is installed, in which versions, and whether roll_ckpt supports them;
whether this interpreter switches roll_ckpt on by itself; and what the file system of
DIRECTORY can do (default: the current directory), by doing it in a temporary
directory there, which is removed. Changes nothing else.

With -- COMMAND it then runs the command, with its own input and output, and tells of
each process that imported DeepSpeed or Megatron-core whether it runs through
roll_ckpt, and of processes that it could not ask. It looks at this host only, and not
at workers of a Ray cluster that ran before.

  roll-ckpt doctor runs/demo
  roll-ckpt doctor --seconds 120 -- torchrun --nproc-per-node 8 train.py
"""
_EPILOG = """\
Exit codes: 0 all is well, and with COMMAND all its training processes run through
roll_ckpt; 1 something is not; 2 wrong usage. The command's own exit code is printed.
"""

_INSTEAD = {
    "whole directories renamed": (
        "a kill or a crash may leave half a checkpoint under its name: no guarantee of roll_ckpt holds here. Save to "
        "another file system"
    ),
    "fsync of files": "nothing can be made durable, so every save fails. Save to another file system",
    "fsync of directories": (
        "files are durable, their names may not survive a power failure; each manifest notes that, and `roll-ckpt "
        "show` says so"
    ),
    "hard links": "what is decided is named by a rename that replaces nothing, or else by directories; as safe",
    "rename without replacing": "needed only where there are no hard links; directories decide then; as safe",
    "exchange of two names": "a save under an existing name moves the old one aside first: for a moment there is none",
    "direct I/O": "files are written and read through the page cache, which takes memory and time from training",
    "locks": "whether a run is alive is known by its heartbeat alone: a start after a crash may wait 20 s",
}
"""What roll_ckpt does where a file system lacks an ability."""
_FATAL = ("whole directories renamed", "fsync of files")

_SHARED = (
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "smbfs", "glusterfs", "wekafs", "9p"),
    *("virtiofs", "afs", "orangefs", "pvfs2", "panfs", "ocfs2", "gfs2", "fuse.glusterfs", "fuse.ceph", "fuse.juicefs"),
)
_LOCAL = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "ntfs", "ntfs3", "vfat", "exfat")


def add_command(commands: Commands) -> None:
    """Add `doctor` to the command line."""
    parser = add_parser(commands, "doctor", doctor, "what is installed, and would a command be protected", _ABOUT)
    parser.epilog = _EPILOG
    parser.usage = "roll-ckpt doctor [-h] [--json] [--seconds N] [DIRECTORY] [-- COMMAND ...]"
    parser.add_argument("directory", metavar="DIRECTORY", nargs="?", default=".", help="where checkpoints would go")
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="N",
        help=f"stop COMMAND after N seconds: SIGTERM to all its processes, SIGKILL {watching.GRACE_S:g} s later",
    )


def doctor(args: argparse.Namespace) -> int:
    """Print what was found, section by section; with a command, run it and judge its processes."""
    if args.watched == [] or (args.seconds is not None and (args.watched is None or args.seconds <= 0)):
        say("give a command after --, and --seconds, above 0, only with a command; see `roll-ckpt doctor --help`")
        return USAGE
    document: dict[str, Any] = {}
    directory = argument(args.directory)
    problems = [
        *_environment(args.json, document),
        *_activation(args.json, document),
        *_file_system(directory, args.json, document),
    ]
    code = ERROR if problems else FINE
    if args.watched:
        try:
            watched = watching.watch(args.watched, args.seconds, stdout_to_stderr=args.json)
        except (FileNotFoundError, PermissionError) as error:
            say(f"{args.watched[0]}: the command cannot be run: {error.strerror}")
            return USAGE
        verdicts = judging.judge(watched.processes)
        fine = judging.all_through_us(verdicts)
        code = FINE if fine else ERROR
        document["command"] = _told(args.watched, watched, verdicts, fine)
        if not args.json:
            _print_command(watched, verdicts, fine)
    if args.json:
        print_json({**document, "problems": problems})
        return code
    for problem in problems:
        _print_hint("problem", problem)
    return code


# --- what is installed --------------------------------------------------------------------------------------


def _environment(as_json: bool, document: dict[str, Any]) -> list[str]:
    """Tell of the packages; the problems."""
    with notice("importing what is installed ..."):
        packages = installed.packages()
    document["packages"] = [asdict(package) for package in packages]
    if not as_json:
        _print_packages(packages)
    return [f"{package.name}: {package.problem}" for package in packages if package.problem]


def _print_packages(packages: Sequence[Package]) -> None:
    rows = [[f"  {p.name}", p.version or "-", p.supported, p.verdict] for p in packages]
    print_table([["INSTALLED", "VERSION", "SUPPORTED", ""], *rows])
    for package in packages:
        if package.note:
            _print_hint("", f"{package.name}: {package.note}")


# --- what switches roll_ckpt on -------------------------------------------------------------------------------


def _activation(as_json: bool, document: dict[str, Any]) -> list[str]:
    """Tell whether processes of this interpreter get roll_ckpt by themselves; the problems."""
    has_pth, value = installed.has_pth(), variable.value()
    pth = "in this interpreter: each of its processes sees ROLL_CKPT"
    if not has_pth:
        pth = (
            "not in this interpreter, so ROLL_CKPT does nothing here: `pip install` roll_ckpt into it (a checkout on "
            "PYTHONPATH is not enough). `import roll_ckpt.deepspeed` and `-m roll_ckpt.run` work without"
        )
    says, problems = _variable()
    if value and not has_pth:
        problems.append(f"ROLL_CKPT is set, and roll_ckpt.pth is {pth}")
    document["activation"] = {"pth": has_pth, variable.NAME: value, "says": says, "problems": problems}
    if not as_json:
        print_line("")
        _print_hint("SWITCHED ON", "by the environment, without a change of the script", first="")
        _print_hint("roll_ckpt.pth", pth)
        _print_hint("ROLL_CKPT", says)
    return problems


def _variable() -> tuple[str, list[str]]:
    """What ROLL_CKPT says, in words; the problems."""
    if not variable.is_on():
        return "not set: it switches nothing on. ROLL_CKPT=1 switches on", []
    try:
        settings = variable.settings()
    except (ConfigError, ImportError) as error:
        return "set, and cannot be used: training will stop at its start", [str(error)]
    given = settings.model_dump(exclude_unset=True) if settings else {}
    return f"set: every engine and strategy goes through roll_ckpt, {f'with {given}' if given else 'as by default'}", []


# --- the file system ----------------------------------------------------------------------------------------


def _file_system(asked: Path, as_json: bool, document: dict[str, Any]) -> list[str]:
    """Tell of the file system on which `asked`, or its nearest parent that exists, lies; the problems."""
    directory = next(path for path in (asked, *asked.parents) if tree.is_dir(path))
    mount = abilities.mount_of(directory)
    facts = {"path": str(directory), **asdict(mount), "place": str(mount.place), "kept": _kept(mount.kind)}
    facts["free_bytes"] = tree.free_bytes(directory)
    facts["staging"] = _staging()
    document["file_system"] = facts
    try:
        lacks = {ability: why for ability, why in abilities.measure(directory).items() if why}
    except OSError as error:
        facts["problem"] = f"nothing can be written in {directory}: {error.strerror}"
        lacks = {}
    facts["lacks"] = lacks
    if not as_json:
        _print_file_system(asked, facts)
    problems = [
        f"{directory} has no {ability} ({lacks[ability]}): {_INSTEAD[ability]}"
        for ability in _FATAL
        if ability in lacks
    ]
    return problems + ([facts["problem"]] if "problem" in facts else [])


def _kept(kind: str) -> str:
    """Who sees what is written there, as far as the type of a file system tells."""
    if kind in _SHARED:
        return "shared: all hosts that mount it see it"
    if kind in _LOCAL:
        return "local, unless several hosts mount its disk: ranks on other hosts do not see it"
    if kind in ("tmpfs", "ramfs"):
        return "memory of this host: a restart of the host empties it"
    if kind == "overlay":
        return "a container's own layer: it goes with the container, and ranks on other hosts do not see it"
    return "its type does not tell whether other hosts see it"


def _staging() -> str:
    """The default of `staging.arena_bytes` here, in words."""
    try:
        from roll_ckpt.config import Settings  # pydantic, which the command line starts without
        from roll_ckpt.save import arena
    except ImportError as error:
        return f"unknown: {error}"
    ranks = arena.local_world_size()
    cap = arena.arena_bytes(Settings()) * ranks
    return (
        f"up to {human_bytes(cap)} for all ranks of this host: a quarter of {human_bytes(arena.memory_bytes())}, its "
        "memory or the limit of its cgroup"
    )


def _print_file_system(asked: Path, facts: dict[str, Any]) -> None:
    print_line("")
    missing = "" if str(asked) == facts["path"] else f", the nearest parent of {asked} that exists"
    _print_hint("FILE SYSTEM", f"of {facts['path']}{missing}", first="")
    _print_hint("type", f"{facts['kind']}, mounted at {facts['place']}")
    _print_hint("", facts["kept"])
    _print_hint("free room", human_bytes(facts["free_bytes"]))
    _print_hint("staging", f"{facts['staging']}; `staging.arena_bytes` sets another cap")
    if "problem" in facts:
        return
    has = [ability for ability in abilities.ABILITIES if ability not in facts["lacks"]]
    _print_hint("has", ", ".join(has) or "nothing of what was tried")
    for ability, why in facts["lacks"].items():
        _print_hint("lacks", f"{ability} ({why}): {_INSTEAD[ability]}")


def _print_hint(head: str, text: str, *, first: str = "  ") -> None:
    """One fact, in lines of at most 80 columns."""
    indent = " " * 16
    for number, line in enumerate(textwrap.wrap(text, 80 - len(indent), break_on_hyphens=False) or [""]):
        print_line((f"{first}{head}".ljust(len(indent)) if not number else indent) + line)


# --- the command --------------------------------------------------------------------------------------------


def _told(command: Sequence[str], watched: Watched, verdicts: Sequence[Verdict], fine: bool) -> dict[str, Any]:
    return {
        "command": list(command),
        "exit_code": watched.code,
        "seconds": round(watched.seconds, 1),
        "stopped": watched.stopped,
        "left_running": watched.left,
        "all_through_roll_ckpt": fine,
        "processes": [asdict(verdict) for verdict in verdicts],
    }


def _print_command(watched: Watched, verdicts: Sequence[Verdict], fine: bool) -> None:
    print_line("")
    how = f"signal {-watched.code}" if watched.code < 0 else f"exit code {watched.code}"
    _print_hint(
        "COMMAND",
        f"ended with {how} after {watched.seconds:.0f} s{watched.stopped and f': {watched.stopped}'}",
        first="",
    )
    for verdict in verdicts:
        who = f"rank {_numbers(verdict.ranks)}, " if verdict.ranks else ""
        _print_hint(verdict.state, f"{who}process {_numbers(verdict.pids)}: {verdict.chain}")
        _print_hint("", verdict.reason)
        _print_hint("", f"interpreter {verdict.interpreter}")
        if verdict.advice:
            _print_hint("", f"do: {verdict.advice}")
    if watched.left:
        _print_hint("still there", f"process {_numbers(watched.left)}: the command left it running")
    print_line(_conclusion(verdicts, fine))


def _conclusion(verdicts: Sequence[Verdict], fine: bool) -> str:
    if fine:
        return "All training processes of the command run through roll_ckpt."
    if not verdicts:
        return "No process of the command imported DeepSpeed or Megatron-core."
    if all(verdict.state in (judging.IDLE, judging.LAUNCHER) for verdict in verdicts):
        return "roll_ckpt was on, but no process built an engine before the command ended."
    return "NOT all training processes of the command run through roll_ckpt."


def _numbers(numbers: Sequence[int]) -> str:
    """Numbers in few words: `0-3, 7`."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number <= spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
