"""Runs an unchanged DeepSpeed training script with roll_ckpt installed: `python -m roll_ckpt.run train.py ...`.

Under torchrun: `torchrun ... -m roll_ckpt.run train.py ...`. To run a module: `... -m roll_ckpt.run -m package.train`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

USAGE = "usage: python -m roll_ckpt.run (script.py | -m module) [arguments of the script]"


def main() -> None:
    """Install roll_ckpt in DeepSpeed, then run the script or module as `__main__` with its own arguments."""
    arguments = sys.argv[1:]
    if not arguments or arguments in (["-h"], ["--help"]) or arguments == ["-m"]:
        print(USAGE, file=sys.stderr)
        raise SystemExit(0 if arguments and arguments[0] in ("-h", "--help") else 2)
    if arguments[0] != "-m" and not Path(arguments[0]).is_file():
        print(f"roll_ckpt.run: no such script: {arguments[0]}\n{USAGE}", file=sys.stderr)
        raise SystemExit(2)

    import roll_ckpt.deepspeed  # noqa: F401  (installs itself)

    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, "")
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
