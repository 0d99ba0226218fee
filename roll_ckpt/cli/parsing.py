"""How a command adds itself to the command line: a parser with its help text, --json and the list of exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeAlias

from roll_ckpt.cli.printing import EXIT_CODES

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_command` of each command adds a parser to."""


def add_parser(
    commands: Commands, name: str, run: Callable[[argparse.Namespace], int], short: str, about: str
) -> argparse.ArgumentParser:
    """Add the command `name`, which `run` carries out, returning the exit code. It has --json and no other argument."""
    parser = commands.add_parser(
        name,
        help=short,
        description=about,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=run)
    return parser


def add_path(parser: argparse.ArgumentParser) -> None:
    """Add the argument PATH."""
    parser.add_argument("path", metavar="PATH", help="an output directory, or one checkpoint in it")


def add_change_options(parser: argparse.ArgumentParser) -> None:
    """Add --dry-run and --take-over, for a command that changes an output directory; see `claiming.claimed`."""
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, change nothing")
    parser.add_argument(
        "--take-over", action="store_true", help="go on although a run seems to be live, because you know it is dead"
    )
