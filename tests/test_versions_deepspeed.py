"""Which DeepSpeed roll_ckpt installs itself in: a version without what it needs is refused by name at the import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from worlds import environment

SCRIPT = """
import deepspeed
from deepspeed.runtime import engine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage3
from deepspeed.utils import tensor_fragment
{change}
changed = dict(vars(DeepSpeedEngine))
try:
    import {module}
    print("installed")
except NotImplementedError as problem:
    print(type(problem).__name__, problem)
    assert dict(vars(DeepSpeedEngine)) == changed, "something was wrapped"
"""


def told(change: str, module: str = "roll_ckpt.deepspeed", **extra: str) -> tuple[str, str]:
    """What a script prints, and logs, that changes DeepSpeed and then imports `module`."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(change=change, module=module)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1], done.stderr


MISSING = {
    "a method": ("del DeepSpeedEngine._take_model_step", "DeepSpeedEngine._take_model_step"),
    "a function": (
        "del engine.get_fp32_state_dict_from_zero_checkpoint",
        "deepspeed.runtime.engine.get_fp32_state_dict_from_zero_checkpoint",
    ),
    "a class": ("del tensor_fragment.fragment_address", "deepspeed.utils.tensor_fragment.fragment_address"),
    "a module": (
        "import sys; sys.modules['deepspeed.runtime.hybrid_engine'] = None",
        "deepspeed.runtime.hybrid_engine.DeepSpeedHybridEngine",
    ),
    "an argument": (
        "DeepSpeedEngine.save_checkpoint = lambda self, save_dir, tag=None, client_state={}, save_latest=True: None",
        "argument exclude_frozen_parameters of DeepSpeedEngine.save_checkpoint",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_missing_is_named_and_nothing_is_installed(name: str) -> None:
    change, missing = MISSING[name]
    line, _ = told(change, "roll_ckpt.backends.deepspeed.cluster" if name == "a class" else "roll_ckpt.deepspeed")
    assert line.startswith("UnsupportedError DeepSpeed ") and f"has no {missing}" in line and "Use DeepSpeed" in line


def test_a_newer_version_that_has_it_all_runs_and_rank_0_warns_once() -> None:
    change = "deepspeed.__version__ = '0.99.1+git'; import roll_ckpt.deepspeed, roll_ckpt.backends.deepspeed.cluster"
    line, log = told(change)
    assert line == "installed" and log.count("DeepSpeed 0.99.1+git has all that roll_ckpt relies on") == 1
    line, log = told(change, RANK="1")
    assert line == "installed" and "0.99.1" not in log
