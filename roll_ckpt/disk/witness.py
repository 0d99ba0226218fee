"""What a process tells `roll-ckpt doctor` about itself while the doctor watches a command.

It needs the standard library alone. The doctor also copies this file into a directory of its own as `sitecustomize.py`,
so that interpreters which have no roll_ckpt tell when they import a framework.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

VARIABLE = "ROLL_CKPT_DOCTOR"
"""Names the directory in which processes leave what they tell, one file for each process id."""

FRAMEWORKS = ("deepspeed", "megatron.core")
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")


def tell(event: str, **facts: object) -> None:
    """Add one line to what this process has told; does nothing while no doctor watches. Any thread may call.

    Training must not fail because a doctor has gone: a directory that cannot be written to is passed over.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return
    ranks = [os.environ[name] for name in _RANKS if os.environ.get(name, "").isdigit()]
    told = {
        "event": event,
        "executable": sys.executable,
        "command": getattr(sys, "orig_argv", [sys.executable]),
        "parent": os.getppid(),
        "rank": int(ranks[0]) if ranks else None,
        **facts,
    }
    try:
        with open(os.path.join(folder, str(os.getpid())), "a") as file:
            file.write(repr(told) + "\n")
    except OSError:
        pass


class _Watch:
    """A finder that finds nothing and tells, once, when a module inside one of the frameworks is looked for.

    `import deepspeed` looks for many; a program that only asks whether DeepSpeed is there looks for none.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        for framework in FRAMEWORKS:
            if name.startswith(framework + ".") and framework not in self.told:
                self.told.add(framework)
                tell("imports", framework=framework, has_roll_ckpt=_has_roll_ckpt(), variable=_variable())


def _has_roll_ckpt() -> bool:
    return find_spec("roll_ckpt") is not None


def _variable() -> str:
    return os.environ.get("ROLL_CKPT", "")


def _hand_over() -> None:
    """Run the `sitecustomize` that this one stands before, if there is one."""
    here = os.path.dirname(os.path.abspath(__file__))
    own = sys.modules.pop("sitecustomize")
    sys.path[:] = [path for path in sys.path if os.path.abspath(path) != here]
    try:
        import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", own)


if __name__ == "sitecustomize":
    tell("starts")
    sys.meta_path.insert(0, _Watch())
    _hand_over()
