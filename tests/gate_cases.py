"""Saves inside of saves: what the ranks of a world, and scripts of tests/test_gate.py, do."""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import roll_ckpt
from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import RollCkptError
from roll_ckpt.state import StateSaver


class Calls:
    """Pickled as an empty dictionary, after calling `action`: a callback of the user's in the middle of staging."""

    def __init__(self, action: Any) -> None:
        self.action = action

    def __reduce__(self) -> Any:
        self.action()
        return collections.OrderedDict, ()


def saver(**more: Any) -> StateSaver:
    values = {"staging": {"arena_bytes": 32 << 20}, "commit_timeout_s": 60, **more}
    return StateSaver(Settings.parse(values, "the test"))


def state(step: int, action: Any = None) -> dict[str, Any]:
    made: dict[str, Any] = {"weight": torch.full((1000, 100), float(step)), "step": step}
    return made if action is None else {**made, "called": Calls(action)}


def inner_save(out: str) -> list[list[str]]:
    """A callback saves and loads, on every rank and then on rank 1 alone; what was said inside and outside."""
    with process.installed(process.Process()):
        ours = saver()
        ours.save(state(0), Path(out) / "step_0")
        told = []
        for name, on in (("all", {0, 1}), ("one", {1})):
            inside: list[str] = []

            def again(inside: list[str] = inside) -> None:
                for call in (lambda: ours.save(state(9), Path(out) / "inner"), lambda: ours.load(Path(out) / "step_0")):
                    try:
                        call()
                    except RollCkptError as problem:
                        inside.append(str(problem))
                raise ValueError("; ".join(inside))

            action = again if not dist.is_initialized() or dist.get_rank() in on else None
            try:
                ours.save(state(1, action), Path(out) / f"step_{name}")
                inside.append("saved")
            except Exception as problem:
                inside.append(f"{type(problem).__name__}: {problem}")
            told.append(inside)
        ours.save(state(2), Path(out) / "step_2")
        assert ours.load(Path(out) / "step_2")["step"] == 2
    return told


def two_threads(out: str, engines: int) -> list[str]:
    """Two threads save one after the other on each rank, and the main thread loads; the errors."""
    with process.installed(process.Process()):
        savers = [saver(async_save=True) for _ in range(engines)]
        inside, errors = threading.Event(), []

        def hold() -> None:
            inside.set()
            time.sleep(0.3)

        def save(step: int, action: Any) -> None:
            try:
                savers[step % engines].save(state(step, action), Path(out) / f"step_{step}", step=step).wait(60)
            except Exception as problem:
                errors.append(f"{type(problem).__name__}: {problem}")

        first = threading.Thread(target=save, args=(1, hold))
        first.start()
        inside.wait(60)
        second = threading.Thread(target=save, args=(2, None))
        second.start()
        for thread in (first, second):
            thread.join(60)
        errors += [str(saver().load(Path(out) / f"step_{step}")["step"]) for step in (1, 2)]
    return errors


def handler_saves(out: str, asynchronous: str, how: str) -> None:
    """A script whose handler saves and exits. The signal comes in the middle of staging (`how` is "inside"), or from
    another thread at a random moment of many saves (a number, the seed)."""
    ours = saver(async_save=asynchronous == "True")

    def handler(number: int, frame: object) -> None:
        ours.save(state(99), Path(out) / "emergency", step=99)
        sys.exit(7)

    signal.signal(signal.SIGUSR1, handler)
    if how == "inside":
        ours.save(state(1, lambda: os.kill(os.getpid(), signal.SIGUSR1)), Path(out) / "step_1", step=1)
        raise AssertionError("the handler did not run when the save was staged")
    pause = random.Random(how).uniform(0, 0.3)
    threading.Thread(target=lambda: (time.sleep(pause), os.kill(os.getpid(), signal.SIGUSR1)), daemon=True).start()
    for step in range(10_000):
        ours.save(state(step), Path(out) / f"step_{step}", step=step)
        if asynchronous == "True" and step % 5 == 0:
            roll_ckpt.wait_pending()


def handlers_in_order() -> list[Any]:
    """Which handlers ran while the gate was held, and after it; whether each is installed again."""
    from roll_ckpt.ranks.group import RankGroup
    from roll_ckpt.save import gate

    came: list[Any] = []
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    mine = [signal.getsignal(number) for number in numbers]
    with contextlib.suppress(KeyError), gate.entered(RankGroup.current(), "save x", 60):
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
            signal.raise_signal(number)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the user's own change inside stays
        inside = list(came)
        raise KeyError
    installed = [signal.getsignal(number) for number in numbers]
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    return [inside, came, installed == [mine[0], signal.SIG_IGN, mine[2]]]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
