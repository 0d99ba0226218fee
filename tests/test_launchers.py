"""ROLL_CKPT alone switches roll_ckpt on, whatever starts the processes, and off again: the engine is asked.

Ray and Jupyter are not needed by anything else here: `make test-long` installs them into a folder of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import activated
import pytest
from worlds import ROOT

HOSTS = ROOT / ".venv" / "hosts"
LAUNCHED = str(ROOT / "tests" / "launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LIMIT_S = 300.0
OURS, STOCK = "roll_ckpt.", ("deepspeed.", "megatron.")

CONSOLE_SCRIPT = """#!{python}
# As `llamafactory-cli train` and others do: the launcher is started from within.
import subprocess, sys
sys.exit(subprocess.run({torchrun} + sys.argv[1:]).returncode)
"""

NOTEBOOK = """
import sys
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3", startup_timeout=120)
try:
    answer = client.execute_interactive("import launched; launched.alone(); launched.engine({folder!r})", timeout=300)
    print(answer["content"])
    sys.exit(answer["content"]["status"] != "ok")
finally:
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


def is_installed(package: str) -> bool:
    return (HOSTS / package).is_dir() or importlib.util.find_spec(package) is not None


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed; `make .venv/hosts/.installed` does it"
    return pytest.mark.skipif(not is_installed(package), reason=reason)


def command(launcher: str, folder: Path) -> tuple[list[str], int]:
    """The words that start the launcher, and how many ranks report."""
    asked = [LAUNCHED, str(folder)]
    if launcher == "console script":
        script = folder / "train-cli"
        script.write_text(CONSOLE_SCRIPT.format(python=sys.executable, torchrun=TORCHRUN))
        script.chmod(0o755)
        return [str(script), *asked, "engine"], 2
    beside = Path(sys.executable).parent
    return {
        "torchrun": ([*TORCHRUN, *asked, "engine"], 2),
        "deepspeed": (
            [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", *asked, "engine"],
            2,
        ),
        "accelerate": (
            [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", *asked, "accelerate"],
            1,
        ),
        "ray": ([sys.executable, *asked, "ray"], 2),
        "notebook": ([sys.executable, "-c", NOTEBOOK.format(folder=str(folder))], 1),
        "megatron": ([*TORCHRUN, *asked, "megatron"], 2),
        "python": ([str(beside / "python"), *asked, "engine"], 1),
    }[launcher]


def start(launcher: str, folder: Path, site: Path, **extra: str) -> list[str]:
    """Whose code moves the bytes, on each rank that the launcher started."""
    folder.mkdir()
    words, ranks = command(launcher, folder)
    told = activated.environment(site, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0", **extra)
    told["PYTHONPATH"] += f"{os.pathsep}{HOSTS}"
    done = subprocess.run(words, env=told, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [(folder / str(rank)).read_text() for rank in range(ranks)]


long = pytest.mark.long


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        pytest.param("deepspeed", marks=long),
        pytest.param("accelerate", marks=long),
        pytest.param("console script", marks=long),
        pytest.param("megatron", marks=long),
        pytest.param("ray", marks=[long, needs("ray")]),
        pytest.param("notebook", marks=[long, needs("ipykernel")]),
    ],
)
def test_the_variable_alone_switches_us_on_and_off_again(launcher: str, tmp_path: Path) -> None:
    on = start(launcher, tmp_path / "on", tmp_path / "site", ROLL_CKPT="1")
    assert all(whose.startswith(OURS) for whose in on), on
    off = start(launcher, tmp_path / "off", tmp_path / "site", ROLL_CKPT="0")
    assert all(whose.startswith(STOCK) for whose in off), off
