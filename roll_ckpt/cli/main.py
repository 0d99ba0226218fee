"""The entry point of roll-ckpt: builds the parser, runs one command and turns errors into messages and exit codes.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from roll_ckpt.cli import doctor, ls, prune, pull, push, queue, recover, show, verify
from roll_ckpt.cli.printing import DAMAGED, ERROR, EXIT_CODES, say
from roll_ckpt.errors import Damaged, RollCkptError

_COMMANDS = (ls, show, verify, prune, recover, push, pull, queue, doctor)

_ABOUT = """\
Look after the checkpoints of roll_ckpt: list them, show what they hold, re-read
every byte, remove old ones, clean up after a crash, push to and pull from the Hub;
and find out whether a training command runs through it.
PATH is the output_dir of a run, the save_dir of a DeepSpeed script, or one
checkpoint in it.

  roll-ckpt ls runs/demo
  roll-ckpt verify runs/demo/checkpoint-9

`roll-ckpt hub-dev` starts a local Hub for development and tests.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="roll-ckpt",
        description=_ABOUT,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_command(commands)
    return parser


def _tool_path() -> str:
    """The directories in which `roll-ckpt NAME` looks for a program roll-ckpt-NAME: Python's own, then PATH."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _split(words: list[str]) -> tuple[list[str], list[str] | None]:
    """The words for roll-ckpt itself, and for `doctor` the command after `--`; None if there is no `--`."""
    if words[:1] != ["doctor"] or "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; SystemExit(2) on wrong usage.

    `roll-ckpt NAME` is replaced by the program roll-ckpt-NAME where one is installed, as for hub-dev.
    """
    if argv is None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `roll-ckpt ls | head` ends quietly
    words = sys.argv[1:] if argv is None else list(argv)
    if words and (tool := shutil.which(f"roll-ckpt-{words[0]}", path=_tool_path())):
        os.execv(tool, [tool, *words[1:]])
    own, watched = _split(words)
    args = _parser().parse_args(own)
    args.watched = watched
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
