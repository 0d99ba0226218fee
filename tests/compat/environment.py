"""Makes the environment of a row: its packages, a copy of the repository, the extension, DeepSpeed's CPU operation.

A large base with torch lies under build/compat/base/, one for each Python and torch; where the Python that runs this
has the right ones, its own environment is the base. A row's environment sees the packages of its base, and has its own
in front of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rows import ROOT, Row

BUILD = ROOT / "build" / "compat"
TOOLS = ("pip", "setuptools", "wheel", "pybind11", "ninja", "packaging")
TEST_TOOLS = ("pytest", "hypothesis", "accelerate", "rich", "einops")
LEFT_BEHIND = (".git", ".venv", "build", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis", "*.so")
BUILD_COMM_OP = "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load()"
NEEDS_PYTHON_3_12 = (0, 17)
"""Megatron-core says so from this version on; it runs on earlier ones all the same, where it is tried."""

PURELIB = "import sysconfig; print(sysconfig.get_path('purelib'))"
MINOR = "import sys; print('%d.%d' % sys.version_info[:2])"
TORCH = "import importlib.metadata as m; print(m.version('torch').partition('+')[0])"


class CannotBuild(Exception):
    """An environment that cannot be had, and why."""


class NoPython(CannotBuild):
    """No interpreter of that version is on this machine."""


@dataclass(frozen=True)
class Environment:
    """Where a row's commands run."""

    row: Row
    directory: Path
    base: Path

    @property
    def python(self) -> str:
        return str(self.directory / "venv" / "bin" / "python")

    @property
    def tree(self) -> Path:
        """The copy of the repository whose tests run."""
        return self.directory / "tree"

    def variables(self) -> dict[str, str]:
        """As the Makefile sets them for .venv, and nothing of ours from outside."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ROLL_CKPT", "PYTHON"))}
        path = os.pathsep.join([str(self.directory / "venv" / "bin"), str(self.base / "bin"), os.environ["PATH"]])
        return {
            **kept,
            "PATH": path,
            "PYTHONPATH": str(self.tree),
            "TORCH_EXTENSIONS_DIR": str(self.directory / "torch_extensions"),
            "DS_ACCELERATOR": "cpu",
            "DS_BUILD_OPS": "0",
            "ROLL_CKPT_CUDA": "0",  # what nvcc compiles knows neither Python nor torch
            "OMP_NUM_THREADS": "1",
        }

    def run(self, step: str, command: Sequence[str]) -> str:
        """`run` in the tree, with the row's variables and log."""
        return run(step, command, self.directory.with_suffix(".log"), cwd=self.tree, env=self.variables())

    def pip(self, step: str, *arguments: str) -> None:
        pins = self.row.pins_file
        constraints = ["-c", str(pins)] if pins.exists() else []
        self.run(step, [self.python, *PIP, *constraints, *arguments])


PIP = ("-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--no-build-isolation")


def run(step: str, command: Sequence[str], log: Path, **options: object) -> str:
    """Run a command; what it prints goes to the log as it comes, and is returned.

    Raises:
        CannotBuild: it failed; the last line is in the message.
    """
    with open(log, "a+", encoding="utf-8") as file:
        print(f"== {step}: {' '.join(command)}", file=file, flush=True)
        start = file.tell()
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options)  # type: ignore[call-overload]
        file.seek(start)
        printed = file.read()
    if done.returncode:
        told = [line for line in printed.splitlines() if line.strip()]
        raise CannotBuild(f"{step} failed: {told[-1] if told else 'no word'}; the whole output is in {log}")
    return printed


def find_python(version: str) -> str:
    """The interpreter of that minor version: on PATH or under pyenv, whichever starts first.

    Raises:
        NoPython
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    under_pyenv = sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"), reverse=True)
    for found in (sys.executable, shutil.which(f"python{version}"), *map(str, under_pyenv)):
        if found and _answer(found, MINOR) == version:
            return found
    raise NoPython(f"python{version} is neither on PATH nor under {pyenv}")


def _answer(python: str, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def _prefix(python: str) -> Path:
    return Path(_answer(python, "import sys; print(sys.prefix)"))


def base_dir(row: Row) -> Path:
    """Where the row's base lies if it has to be made."""
    return BUILD / "base" / f"py{row.python}-torch{row.versions['torch']}"


def base_of(row: Row) -> Path:
    """The environment with the row's Python and torch: this one, or one under build/compat/base/, made if need be."""
    torch = row.versions["torch"]
    if _answer(sys.executable, MINOR) == row.python and _answer(sys.executable, TORCH) == torch:
        return _prefix(sys.executable)
    made = base_dir(row)
    if not (made / "ready").exists():
        python = find_python(row.python)
        shutil.rmtree(made, ignore_errors=True)
        made.parent.mkdir(parents=True, exist_ok=True)
        log = made.with_suffix(f"{made.suffix}.log")
        pip = [str(made / "bin" / "python"), *PIP, "--no-cache-dir"]
        pins = ["-c", str(row.pins_file)] if row.pins_file.exists() else []
        run("Python environment", [python, "-m", "venv", str(made)], log)
        run("pip and build tools", [*pip, *pins, "--upgrade", *TOOLS], log)
        run(f"torch {torch}", [*pip, *pins, f"torch=={torch}", *row.pins], log)
        (made / "ready").touch()
    return made


def build(row: Row) -> Environment:
    """Make the row's environment anew.

    Raises:
        CannotBuild: names the step and why.
    """
    base = base_of(row)
    directory = BUILD / row.name
    shutil.rmtree(directory, ignore_errors=True)
    directory.with_suffix(".log").unlink(missing_ok=True)
    made = Environment(row, directory, base)
    shutil.copytree(ROOT, made.tree, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    base_python = str(base / "bin" / "python")
    made.run("Python environment", [base_python, "-m", "venv", "--without-pip", str(directory / "venv")])
    packages = Path(_answer(made.python, PURELIB))
    (packages / "base.pth").write_text(_answer(base_python, PURELIB) + "\n")
    for module in row.without:
        (packages / f"{module}.py").write_text(f"raise ImportError('{module} is left out of this environment')\n")
    _install(made, packages)
    if not row.pins_file.exists():
        row.pins_file.parent.mkdir(exist_ok=True)
        row.pins_file.write_text(_frozen(made))
    made.run("CPU communication operation of DeepSpeed", [made.python, "-c", BUILD_COMM_OP])
    return made


def _install(made: Environment, packages: Path) -> None:
    versions = {name: f"{name}=={version}" for name, version in made.row.versions.items()}
    megatron, number = versions["megatron-core"], made.row.versions["megatron-core"]
    too_new = tuple(map(int, number.split(".")[:2])) >= NEEDS_PYTHON_3_12 and made.row.python in ("3.10", "3.11")
    wanted = [*versions.values(), *made.row.pins, *TEST_TOOLS]
    if too_new:
        wanted.remove(megatron)
    made.pip("packages and roll_ckpt", *wanted, "-e", str(made.tree))
    if too_new:
        as_if = ["--python-version", "3.12", "--implementation", "cp", "--platform", "manylinux_2_28_x86_64"]
        flags = ["--target", str(packages), "--no-deps", "--only-binary=:all:"]
        made.pip("Megatron-core for a later Python", *flags, *as_if, megatron)
        if not _answer(made.python, "import triton; print('there')"):
            made.pip("triton, which it imports", "--no-deps", "triton")


def _frozen(made: Environment) -> str:
    listed = made.run("list of packages", [made.python, "-m", "pip", "list", "--format=freeze"])
    lines = [line.partition("+")[0] for line in listed.splitlines() if "==" in line]
    kept = [line for line in lines if not line.startswith(("roll-ckpt==", "roll_ckpt=="))]
    return f"# Written by the first build of {made.row.name}; remove it to have versions resolved anew.\n" + "\n".join(
        [*sorted(kept, key=str.lower), ""]
    )


def clean(row: Row, later: Sequence[Row]) -> None:
    """Remove what a row's environment takes on disk, and its base unless a later row needs it; the log stays."""
    shutil.rmtree(BUILD / row.name, ignore_errors=True)
    if base_dir(row) not in map(base_dir, later):
        shutil.rmtree(base_dir(row), ignore_errors=True)
