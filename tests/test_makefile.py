"""Every target of the Makefile starts: what it runs is found, with the environment that the Makefile gives it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGETS = re.findall(r"^([a-z-]+):.*?## ", (ROOT / "Makefile").read_text(), re.MULTILINE)

SHORT = {
    "help": "",
    "metrics": "",
    "run": "ARGS=--help",
    "run-worlds": "ARGS=--help",
    "torture": 'N=1 ARGS="--part real"',  # as it ran: with the imports of a fresh clone, no path set by a test
    "fuzz": "SECONDS=1 ARGS='--parser manifest'",
    "bench-gpu": "ARGS=--help",
    "bench-megatron": "ARGS=--help",
    "bench-push": "ARGS=--help",
    "compat": "ARGS=--help",
    "matrix": "ARGS=--collect-only",
    "test-long": "ARGS=--collect-only",
}
"""How each target is tried here, in seconds."""

ELSEWHERE = {
    "train": "its script is the one that `make run` starts",
    "test": "it runs this test",
    "lint": ".ci/run runs it",
    "format": "it changes the tree; its commands are those of lint",
    "clean": "it removes the environment that this test needs",
    "bench": "it installs the peers; test_benchmark.py runs its module without them",
    "bench-quick": "the same",
    "megatron-lm": "it needs a checkout of Megatron-LM; without one it says so",
    "bench-megatron-lm": "the same",
    "sanitize": "it builds the extension twice, for minutes; its command line is checked below",
}


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in ("PYTHONPATH", "MFLAGS")}
    command = ["bash", "-c", f"make --no-print-directory {' '.join(arguments)}"]
    return subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=400)


def test_each_target_is_tried_here_or_elsewhere() -> None:
    assert set(TARGETS) == {*SHORT, *ELSEWHERE}


@pytest.mark.parametrize("target", SHORT)
def test_a_target_starts_and_ends_well(target: str) -> None:
    done = make(target, SHORT[target])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.strip()


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_that_a_target_names_are_there(target: str) -> None:
    shown = make("-n", target).stdout
    scripts = re.findall(r"(?<![\w/.])((?:tests|benchmarks|examples|csrc)/[\w/.]+\.(?:py|cpp|h|cu))", shown)
    modules = [name.replace(".", "/") for name in re.findall(r"-m ((?:examples|benchmarks)[\w.]*)", shown)]
    missing = [path for path in scripts if not (ROOT / path).exists()]
    missing += [path for path in modules if not ((ROOT / path).is_dir() or (ROOT / f"{path}.py").exists())]
    assert not missing
