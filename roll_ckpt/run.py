"""Runs an unchanged training script with roll_ckpt installed: `python -m roll_ckpt.run train.py ...`.

Under torchrun: `torchrun ... -m roll_ckpt.run train.py ...`; under DeepSpeed's launcher: `deepspeed ... --module
roll_ckpt.run train.py ...`. To run a module: `... -m roll_ckpt.run -m package.train`. Processes that the script starts
are served too, where the `.pth` file of the package is installed.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

from roll_ckpt.activation import switch

USAGE = "usage: python -m roll_ckpt.run (script.py | -m module) [arguments of the script]"

_LOCAL_RANK = re.compile(r"--local[_-]rank(=\d+)?")


def main() -> None:
    """Install roll_ckpt in each framework that the script imports, and run it as `__main__` with its own arguments."""
    launcher, arguments = _split(sys.argv[1:])
    if not arguments or arguments in (["-h"], ["--help"]) or arguments == ["-m"]:
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    if arguments[0] != "-m" and not Path(arguments[0]).is_file():
        print(f"roll_ckpt.run: no such script: {arguments[0]}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)

    switch.run()

    if arguments[0] == "-m":
        sys.argv = [arguments[1], *launcher, *arguments[2:]]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = [arguments[0], *launcher, *arguments[1:]]
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(what the launcher has put first, the rest): launchers put `--local_rank=0` before the script, which wants it."""
    if not arguments or not (found := _LOCAL_RANK.fullmatch(arguments[0])):
        return [], arguments
    taken = 1 if found.group(1) else 2
    return arguments[:taken], arguments[taken:]


if __name__ == "__main__":
    main()
