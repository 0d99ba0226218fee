"""roll-ckpt: list, show, verify, prune, recover, and the Hub. Imports nothing heavy, so that it answers at once.

Tables for people go to stdout, or JSON with --json; errors and progress go to stderr.
Exit codes: 0 fine, 1 error, 2 wrong usage, 3 something is damaged, 4 uploads are still owed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from roll_ckpt.cli import hub
from roll_ckpt.cli.listing import _LS, ls
from roll_ckpt.cli.printing import DAMAGED, ERROR, EXIT_CODES, say
from roll_ckpt.cli.prune import _PRUNE, _positive, prune
from roll_ckpt.cli.recover import _RECOVER, recover
from roll_ckpt.cli.show import _SHOW, show
from roll_ckpt.cli.verify import _VERIFY, check
from roll_ckpt.errors import Damaged, RollCkptError

_ABOUT = """\
Look after the checkpoints of roll_ckpt: list and show them, read every byte
again, remove old ones, clean up after a crash, push and pull. PATH is the
output_dir of a run, the save_dir of a DeepSpeed script, or one checkpoint in it.

  roll-ckpt ls runs/demo
  roll-ckpt verify runs/demo/checkpoint-9
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
    hub.add_commands(commands)
    for changing in (pruning, recovering):
        changing.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
        changing.add_argument(
            "--take-over", action="store_true", help="although a run seems live: it is known to be dead"
        )
    return parser


def _tool_path() -> str:
    """Where programs called roll-ckpt-NAME are looked for, which `roll-ckpt NAME` starts: beside Python, then PATH."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code. SystemExit(2) on wrong usage."""
    if argv is None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `roll-ckpt ls | head` ends quietly
    words = sys.argv[1:] if argv is None else list(argv)
    if words and (tool := shutil.which(f"roll-ckpt-{words[0]}", path=_tool_path())):
        os.execv(tool, [tool, *words[1:]])
    args = _parser().parse_args(words)
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
