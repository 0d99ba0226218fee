"""An environment whose Python processes have roll_ckpt.pth, also where the package is not installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import worlds
from worlds import ROOT

from roll_ckpt.cli import installed


@cache
def _is_installed() -> bool:
    return installed.has_pth()


def environment(site: Path, **extra: str) -> dict[str, str]:
    """That of `worlds.environment`, without ROLL_CKPT unless `extra` has it. `site` is a directory for the .pth file,
    made by setup.py, if this interpreter has none: a `sitecustomize` runs it."""
    told = {name: value for name, value in worlds.environment().items() if not name.startswith("ROLL_CKPT")}
    if not _is_installed():
        if not site.exists():
            command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
            subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
            for made in ("roll_ckpt", "roll_ckpt_hub_dev"):
                shutil.rmtree(site / made)
            (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
        told["PYTHONPATH"] += f"{os.pathsep}{site}"
    return {**told, **extra}
