"""Stock Megatron saves whose bytes we move: the hook of the process, on real Megatron-core, CPU and gloo."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from megatron_worlds import MISSING, Worlds
from worlds import ROOT, environment

from roll_ckpt.backends.megatron import handover
from roll_ckpt.backends.megatron.handover import Handover

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def call(megatron: Worlds, case: str, *args: Any) -> list[Any]:
    return megatron.at("DP2").call(f"megatron_install_cases:{case}", *args)


def test_every_way_to_save_comes_to_us_and_stock_loads_it(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "every_way", str(tmp_path)):
        assert len(told) == 13 and set(told.values()) == {(1, True)}, told


def test_the_first_save_says_that_it_goes_through_us(megatron: Worlds, tmp_path: Path) -> None:
    first, second = call(megatron, "log_of_two_saves", str(tmp_path))
    assert second == []
    assert len(first) == 1 and "every torch_dist checkpoint of Megatron-core in this process" in first[0]


def test_wrappers_of_others_go_on_working(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "wrapped_by_others", str(tmp_path / "run")):
        assert told == ["after", "before", "1 by us"]


def test_the_later_of_two_saves_in_one_directory_wins_on_every_rank(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "two_saves_in_one_directory", tmp_path):
        assert told == {"early": False, "loaded": 20, "tracker": "2"}


def test_ranks_that_are_not_switched_on_alike_are_told_at_the_start(megatron: Worlds, tmp_path: Path) -> None:
    first, second = call(megatron, "begin_unlike", tmp_path)
    assert first[0] == second[0] and first[0].startswith("ConfigError: Megatron-core: run_id is 'rank 0' on rank 0 and")
    assert first[1].startswith("UnsupportedError: Megatron-core: rank 1 cannot save through roll_ckpt")
    assert second[1] == "stock" and first[2] == second[2] == "none"


def test_if_one_rank_fails_all_raise_and_the_directory_is_incomplete(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "fail_on_one_rank", str(tmp_path / "run")):
        assert len(told) == 3
        for error, left, after in told.values():
            assert ("the disk is gone" in error and "rank 1" in error) or error.startswith("OSError")
            assert "metadata.json" not in left and not any(name.endswith(".new") for name in left)
            assert after == 3


def test_if_the_common_state_cannot_be_saved_all_raise(megatron: Worlds, tmp_path: Path) -> None:
    own, told = call(megatron, "fail_to_save_the_common_state", str(tmp_path / "run"))
    assert "pickle" in own and "rank 0" in told and "pickle" in told


def test_the_mark_of_completeness_goes_first_and_comes_last(megatron: Worlds, tmp_path: Path) -> None:
    rank0, _ = call(megatron, "order_on_disk", str(tmp_path / "run"))
    assert rank0 == [
        ("unlink", "metadata.json"),
        ("unlink", ".metadata"),
        ("fsync_dir", "run"),
        *[("rename", f"__0_{number}.distcp") for number in range(sum("distcp" in name for _, name in rank0))],
        ("fsync_dir", "run"),
        *[("fsync", "common.pt")] * (("fsync", "common.pt") in rank0),
        ("fsync", ".metadata"),
        ("fsync_dir", "run"),
        ("fsync_dir", tmp_path.name),
        ("rename", "metadata.json"),
        ("fsync_dir", "run"),
    ]


def test_a_kill_never_leaves_a_complete_directory_that_is_torn(tmp_path: Path) -> None:
    """Before each disk operation of a save over an older checkpoint, the process is killed."""
    script = str(ROOT / "tests" / "megatron_install_cases.py")
    ended = subprocess.run(
        [sys.executable, script, str(tmp_path)],
        env=environment(TORCHDYNAMO_DISABLE="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    told = [line.split(maxsplit=2) for line in ended.stdout.splitlines()]
    assert len(told) > 8, ended.stderr[-3000:]
    assert told[0][1:] == ["True", "1"]  # killed before the mark was removed
    assert told[-1][1:] == ["False", "2"]
    assert {found for _, _, found in told} == {"1", "2", "incomplete"}


def test_what_is_not_supported_is_refused_before_anything_is_written(megatron: Worlds, tmp_path: Path) -> None:
    for told in call(megatron, "refusals", str(tmp_path / "run")):
        assert told["twice"].startswith("ConfigError") and "two different settings" in told["twice"]
        assert told["same"] == "none"
        assert told["both"].startswith("ConfigError") and "settings twice" in told["both"]
        assert told["msc"].startswith("UnsupportedError") and "multi-storage client" in told["msc"]
        assert told["left"] == []


# --- the wait that crosses to another process ----------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_another_process_waits_until_the_files_are_durable(method: str) -> None:
    begun = Handover()
    other = multiprocessing.get_context(method).Process(target=handover.wait, args=(begun,))
    other.start()
    other.join(1.5)
    assert other.is_alive() and not begun.ended
    begun.end()
    other.join(60)
    assert other.exitcode == 0 and begun.ended
    begun.wait()


def test_a_wait_that_comes_late_ends_at_once() -> None:
    first = Handover()
    told = pickle.dumps(first)
    first.end()
    second = Handover()  # which has the descriptor of the first one
    late = pickle.loads(told)
    assert late.wait() is None
    second.end()


def test_a_wait_ends_when_the_training_process_dies() -> None:
    receive, send = os.pipe()
    trainer = os.fork()
    if trainer == 0:
        os.write(send, pickle.dumps(Handover()))
        time.sleep(600)
    begun = pickle.loads(os.read(receive, 1 << 16))
    waiting = threading.Thread(target=begun.wait, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    os.kill(trainer, signal.SIGKILL)
    os.waitpid(trainer, 0)
    waiting.join(60)
    assert not waiting.is_alive()
