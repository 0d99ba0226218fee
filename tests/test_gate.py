"""Saves inside of saves: from callbacks, other threads and signal handlers."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import gate_cases
import pytest
from worlds import World, environment

from roll_ckpt.transaction import verification

CASES = "gate_cases"


def check_inner(told: list[list[str]], name: str, out: Path) -> None:
    saved, loaded, *_, outer = told  # the callback is called again, to name the entry that cannot be saved
    assert saved.startswith(f"save inner to {out}: refused") and f"inside of save step_{name} to {out}" in saved
    assert loaded.startswith(f"load {out}/step_0: refused")
    assert outer.startswith("SaveFailed: the save was not begun: rank ")
    assert "state['called']: cannot be saved: ValueError: save inner" in outer


def test_a_save_or_load_in_a_callback_is_refused_by_name(tmp_path: Path) -> None:
    told_all, told_one = gate_cases.inner_save(str(tmp_path))
    check_inner(told_all, "all", tmp_path)
    check_inner(told_one, "one", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[a-z]*")) == ["latest", "step_0", "step_2"]


def test_a_save_in_a_callback_on_one_rank_holds_no_rank_up(two_ranks: World, tmp_path: Path) -> None:
    first, second = two_ranks.call(f"{CASES}:inner_save", str(tmp_path))
    for told_all, _ in (first, second):
        check_inner(told_all, "all", tmp_path)
    check_inner(second[1], "one", tmp_path)
    assert first[1][0].startswith("SaveFailed: the save was not begun: rank 1: state['called']: cannot be saved")


@pytest.mark.parametrize("engines", [1, 2])
def test_a_thread_that_saves_waits_until_the_first_save_is_staged(tmp_path: Path, engines: int) -> None:
    assert gate_cases.two_threads(str(tmp_path), engines) == ["1", "2"]


@pytest.mark.parametrize("engines", [1, 2])
def test_threads_of_two_ranks_save_one_after_the_other(two_ranks: World, tmp_path: Path, engines: int) -> None:
    assert two_ranks.call(f"{CASES}:two_threads", str(tmp_path), engines) == [["1", "2"]] * 2


def test_handlers_run_after_the_gate_in_the_order_of_their_signals() -> None:
    inside, after, installed = gate_cases.handlers_in_order()
    assert inside == [] and after == [signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM] and installed


def run(*arguments: str) -> subprocess.Popen[str]:
    script = [sys.executable, str(Path(gate_cases.__file__)), *arguments]
    return subprocess.Popen(script, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("asynchronous", ["True", "False"])
def test_a_handler_that_saves_and_exits_finds_the_first_save_staged(tmp_path: Path, asynchronous: str) -> None:
    script = run("handler_saves", str(tmp_path), asynchronous, "inside")
    _, errors = script.communicate(timeout=120)
    assert script.returncode == 7, errors
    for name in ("step_1", "emergency"):
        assert verification.verify(tmp_path / name) == []


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 24), marks=pytest.mark.long)])
def test_a_signal_at_any_moment_loses_no_save(tmp_path: Path, seeds: range) -> None:
    for first in seeds[::4]:
        scripts = {
            seed: run("handler_saves", str(tmp_path / str(seed)), str(bool(seed % 2)), str(seed))
            for seed in range(first, first + 4)
        }
        for seed, script in scripts.items():
            _, errors = script.communicate(timeout=120)
            out = tmp_path / str(seed)
            assert script.returncode == 7, f"{seed}: {errors}"
            assert (out / "latest").read_text() == "emergency"
            saved = sorted(int(path.name[5:]) for path in out.glob("step_*"))
            assert saved == list(range(len(saved))), f"{seed}: one is missing"
            assert not list(out.glob(".*step_*")), f"{seed}: one was not finished"
