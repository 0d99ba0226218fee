"""Libraries that tests preload into a process (LD_PRELOAD), compiled where they are needed."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent


def build(name: str, folder: Path) -> Path:
    """Compile tests/<name>.cpp to a library in `folder`."""
    library = folder / f"{name}.so"
    compiler = (sysconfig.get_config_var("CXX") or "g++").split()[0]
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", library, HERE / f"{name}.cpp", "-ldl"]
    subprocess.run(command, check=True, timeout=120)
    return library
