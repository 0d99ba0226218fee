"""Which DeepSpeed roll_ckpt installs itself in: a version without what it needs is refused by name at the import."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from worlds import environment

METHOD = "del DeepSpeedEngine._take_model_step"
FUNCTION = "del engine.get_fp32_state_dict_from_zero_checkpoint"
CLASS = "del sys.modules['deepspeed.utils.tensor_fragment'].fragment_address"
MODULE = "sys.modules['deepspeed.runtime.hybrid_engine'] = None"
ARGUMENT = "DeepSpeedEngine.save_checkpoint = lambda self, save_dir, tag=None, client_state={}, save_latest=True: None"
NEWER = "deepspeed.__version__ = '0.99.1+git'"
NEWER_ON_RANK_1 = f"os.environ['RANK'] = '1'; {NEWER}"

MISSING = {
    METHOD: "DeepSpeedEngine._take_model_step",
    FUNCTION: "deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint",
    CLASS: "deepspeed.utils.tensor_fragment.fragment_address",
    MODULE: "deepspeed.runtime.hybrid_engine.DeepSpeedHybridEngine",
    ARGUMENT: "argument exclude_frozen_parameters of DeepSpeedEngine.save_checkpoint",
}

SCRIPT = """
import json, logging, os, sys
import deepspeed
from deepspeed.runtime import engine
from deepspeed.runtime.engine import DeepSpeedEngine

def told(change):
    exec(change)
    changed, lines, handler = dict(vars(DeepSpeedEngine)), [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("roll_ckpt").addHandler(handler)
    for module in ("roll_ckpt.deepspeed", "roll_ckpt.backends.deepspeed.cluster", "roll_ckpt.deepspeed"):
        try:
            __import__(module)
        except Exception as problem:
            assert dict(vars(DeepSpeedEngine)) == changed, "something was wrapped"
            lines.append(f"{type(problem).__name__}: {problem}")
    return lines

for change in sys.argv[1:]:
    if not os.fork():
        os.write(1, (json.dumps({change: told(change)}) + chr(10)).encode())
        os._exit(0)
    assert os.wait()[1] == 0, change
"""


@pytest.fixture(scope="module")
def told() -> dict[str, list[str]]:
    """What is logged and raised by three imports, in a process of its own after each change of DeepSpeed."""
    command = [sys.executable, "-c", SCRIPT, *MISSING, NEWER, NEWER_ON_RANK_1]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        found |= json.loads(line) if line.startswith("{") else {}
    return found


@pytest.mark.parametrize("change", MISSING)
def test_what_is_missing_is_named_and_nothing_is_installed(told: dict[str, list[str]], change: str) -> None:
    assert len(told[change]) == 3
    for line in told[change]:
        assert line.startswith("UnsupportedError: DeepSpeed "), line
        assert f"has no {MISSING[change]}, which" in line and "Use DeepSpeed 0." in line, line


def test_a_newer_version_that_has_it_all_runs_and_rank_0_warns_once(told: dict[str, list[str]]) -> None:
    (line,) = told[NEWER]
    assert line.startswith("DeepSpeed 0.99.1+git has all that roll_ckpt relies on")
    assert told[NEWER_ON_RANK_1] == []
