"""The measurements. All of them return plain lists of numbers, which `report` turns into medians and verdicts."""

from __future__ import annotations

import gc
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import machine, systems
from .systems import State, System

Rows = dict[str, list[float]]


def make_state(nbytes: int, tensors: int, seed: int = 0) -> State:
    """About `nbytes` random bytes in `tensors` tensors of very different sizes, a third of them bf16.

    Their sizes are spread evenly over four decades, as those of a transformer's norms, biases and matrices are.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [math.exp(x * math.log(1e4)) for x in torch.rand(tensors, generator=generator).tolist()]
    scale = nbytes / sum(weights)
    state = {}
    for number, weight in enumerate(weights):
        dtype = torch.bfloat16 if number % 3 == 2 else torch.float32
        numel = max(64, int(weight * scale) // dtype.itemsize // 64 * 64)
        raw = torch.randint(-(2**63), 2**63 - 1, (numel * dtype.itemsize // 8,), generator=generator)
        raw &= 0x3FFF3FFF3FFF3FFF  # no exponent of a NaN or an infinity
        state[f"layers.{number}.weight"] = raw.view(dtype)
    return state


def bytes_of(state: State) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


# --- one save ------------------------------------------------------------------------------------------------


def save_once(system: System, state: State, directory: Path) -> dict[str, float]:
    """Seconds until `save` returned, until the tensors may change, until the bytes are durable."""
    gc.collect()
    began = time.perf_counter()
    system.save(state, directory)
    saved = time.perf_counter()
    system.fence()
    fenced = time.perf_counter()
    system.handle()()
    durable = time.perf_counter()
    return {"save": saved - began, "blocked": fenced - began, "durable": durable - began}


def load_once(system: System, state: State, directory: Path, check: bool) -> dict[str, float]:
    """Seconds until a cold checkpoint stands in fresh tensors, and the share of it that could not be made cold."""
    cached = machine.drop_cache(directory)
    began = time.perf_counter()
    loaded = system.load(directory)
    seconds = time.perf_counter() - began
    if check and not (
        loaded.keys() == state.keys()
        and all(torch.equal(loaded[name].view(torch.int16), state[name].view(torch.int16)) for name in state)
    ):
        raise SystemExit(f"{system.name}: what was loaded is not what was saved")
    return {"load": seconds, "cached": cached}


def directory_of(root: Path, system: System, name: str) -> Path:
    return root / "".join(c if c.isalnum() else "_" for c in system.name) / name


@dataclass
class Saves:
    """What each contestant needed for saving and loading the state, and the machine for the same bytes."""

    systems: dict[str, Rows] = field(default_factory=dict)
    raw: dict[str, list[float]] = field(default_factory=dict)
    memcpy: list[float] = field(default_factory=list)

    def add(self, name: str, row: dict[str, float]) -> None:
        for key, value in row.items():
            self.systems.setdefault(name, {}).setdefault(key, []).append(value)


def measure_saves(
    contestants: Sequence[System],
    state: State,
    root: Path,
    copier: machine.Copier,
    disk: machine.RawDisk,
    rounds: int,
    tell: Callable[[str], None],
    found: Saves,
) -> None:
    """Every contestant and the raw disk in turn, `rounds` times; a round before them warms up and is thrown away."""
    turns: list[tuple[str, Callable[[bool], None]]] = []

    def contest(system: System) -> Callable[[bool], None]:
        def turn(warm_up: bool) -> None:
            directory = directory_of(root, system, f"save-{time.monotonic_ns()}")
            row = save_once(system, state, directory)
            row |= load_once(system, state, directory, check=warm_up)
            shutil.rmtree(directory)
            if not warm_up:
                found.add(system.name, row)

        return turn

    def raw(depth: int) -> Callable[[bool], None]:
        def turn(warm_up: bool) -> None:
            row = {f"write {depth}": disk.write(depth), f"read {depth}": disk.read(depth)}
            disk.remove()
            for key, seconds in row.items() if not warm_up else ():
                found.raw.setdefault(key, []).append(seconds)

        return turn

    turns += [(system.name, contest(system)) for system in contestants]
    for number, depth in enumerate(machine.DEPTHS):
        turns.insert(1 + number * 3, (f"raw disk, {depth} in flight", raw(depth)))
    for number in range(rounds + 1):
        shift = number * 5 % len(turns)
        for name, turn in turns[shift:] + turns[:shift]:
            tell(f"saves, round {number} of {rounds}: {name}")
            os.sync()
            memcpy = copier()
            turn(number == 0)
            if number:
                found.memcpy.append(memcpy)


def measure_many(ours: System, state: State, root: Path, rounds: int) -> list[float]:
    """Seconds of our `save` alone for a state of many tensors."""
    found = []
    for number in range(rounds + 1):
        os.sync()
        directory = directory_of(root, ours, f"many-{number}")
        row = save_once(ours, state, directory)
        shutil.rmtree(directory)
        if number:
            found.append(row["save"])
    return found


# --- a training loop -----------------------------------------------------------------------------------------


class Trainer:
    """Steps that keep all cores busy with arithmetic for a while, and then change every tensor of the state."""

    _WIDTH = 512

    def __init__(self, state: State, arithmetic_s: float) -> None:
        self._tensors = list(state.values())
        self._host: list[torch.Tensor] = []
        self._left, self._right = torch.randn(2, self._WIDTH, self._WIDTH)
        self._product = torch.empty(self._WIDTH, self._WIDTH)
        self._multiply(20)
        each_s = min(machine.timed(lambda: self._multiply(20)) for _ in range(3)) / 20
        self._times = max(1, round(arithmetic_s / each_s))

    def _multiply(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._left, self._right, out=self._product)

    def busy(self) -> None:
        """Forward and backward."""
        self._multiply(self._times)

    def step(self, fence: Callable[[], None]) -> None:
        """Forward and backward; the fence; the optimizer's step."""
        self.busy()
        fence()
        torch._foreach_neg_(self._tensors)

    def roll_out(self, fence: Callable[[], None]) -> None:
        """Move the state to other memory and what was there away, as for a rollout; the rollout; and back."""
        if not self._host:
            self._host = [torch.empty_like(tensor) for tensor in self._tensors]
        fence()
        torch._foreach_copy_(self._host, self._tensors)
        torch._foreach_zero_(self._tensors)
        self.busy()
        torch._foreach_copy_(self._tensors, self._host)


@dataclass
class Loop:
    """What a loop of steps took, from its first step until its last save was durable."""

    steps: int
    saves: int
    rollouts: bool = False
    """Whether each save is followed by moving the state away and back."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    pauses: dict[str, list[float]] = field(default_factory=dict)
    memcpy: list[float] = field(default_factory=list)


WITHOUT = "without saves"


def measure_loop(
    contestants: Sequence[System],
    state: State,
    root: Path,
    trainer: Trainer,
    copier: machine.Copier,
    rounds: int,
    tell: Callable[[str], None],
    found: Loop,
) -> None:
    """The same loop without saves and with each contestant's, in turn."""
    entrants: list[System | None] = [system for system in contestants if not system.loop_reason]
    entrants[len(entrants) // 2 : len(entrants) // 2] = [None]
    entrants.insert(0, None)
    for number in range(rounds):
        shift = number * 3 % len(entrants)
        for system in entrants[shift:] + entrants[:shift]:
            name = WITHOUT if system is None else system.name
            tell(f"loop of {found.steps} steps, round {number + 1} of {rounds}: {name}")
            os.sync()
            gc.collect()
            found.memcpy.append(copier())
            seconds, pauses = _one_loop(system, state, root, trainer, found)
            found.seconds.setdefault(name, []).append(seconds)
            found.pauses.setdefault(name, []).extend(pauses)


def _one_loop(
    system: System | None, state: State, root: Path, trainer: Trainer, loop: Loop
) -> tuple[float, list[float]]:
    waiting: list[tuple[threading.Thread, list[float]]] = []
    directories = []
    windows: list[tuple[float, list[float]]] = []
    fence = (lambda: None) if system is None else system.fence
    with machine.Ticker() as ticker:
        began = time.perf_counter()
        for _ in range(loop.saves):
            if system is not None:
                if waiting and not system.several:
                    waiting[-1][0].join()
                directories.append(directory_of(root, system, f"loop-{time.monotonic_ns()}"))
                system.save(state, directories[-1])
                waiting.append(_wait_in_thread(system.handle()))
                windows.append((time.perf_counter(), waiting[-1][1]))
            if loop.rollouts:
                trainer.roll_out(fence)
            for _ in range(loop.steps // loop.saves):
                trainer.step(fence)
        for thread, _ in waiting:
            thread.join()
        ended = time.perf_counter()
    failed = [told for _, told in waiting if not told]
    for directory in directories:
        shutil.rmtree(directory)
    if failed:
        raise SystemExit(f"{system.name if system else ''}: a save in the loop failed")
    if system is None:
        return ended - began, ticker.pauses([(began, ended)])
    if not system.background:
        return ended - began, []
    return ended - began, ticker.pauses((start, told[0]) for start, told in windows)


def _wait_in_thread(wait: Callable[[], None]) -> tuple[threading.Thread, list[float]]:
    """A thread that ends when the save is durable, and notes when that was."""
    told: list[float] = []

    def run() -> None:
        wait()
        told.append(time.perf_counter())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, told


# --- processes of their own ----------------------------------------------------------------------------------


def run_child(arguments: Sequence[str]) -> Any:
    """Run this benchmark in a fresh process as `child_main`, and return what it prints."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.movement", "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def offloaded(state: State) -> State:
    """The state in pages of its own, as pinned host memory is."""
    moved = {}
    for name, tensor in state.items():
        pages = mmap.mmap(-1, tensor.numel() * tensor.element_size())
        moved[name] = torch.frombuffer(pages, dtype=tensor.dtype)
        moved[name].copy_(tensor)
    return moved


def child_main(name: str, nbytes: int, tensors: int, cap_bytes: int | None, saves: int, directory: Path) -> None:
    """The first saves of a process and the memory they need; prints JSON."""
    state = make_state(nbytes, tensors)
    if name == systems.Borrowed.name:
        state = offloaded(state)
    kinds: dict[str, Callable[[], System]] = {kind.name: kind for kind in systems.OTHERS}
    kinds[systems.Ours.name] = lambda: systems.Ours(cap_bytes)
    kinds[systems.Borrowed.name] = lambda: systems.Borrowed(cap_bytes)
    system = kinds[name]()
    ours = isinstance(system, systems.Ours)
    root = directory / f"child-{os.getpid()}"
    root.mkdir()
    gc.collect()
    if not ours:  # what a peer imports is not what its saves need
        systems.open_one(system, state)
    idle = machine.rss("VmRSS")
    machine.reset_peak_rss()
    if ours:
        systems.open_one(system, state)
    Trainer({}, 1.0).busy()  # a training makes its first step before its first save
    rows = []
    told: dict[str, Any] = {"idle": idle}
    for number in range(saves):
        os.sync()
        path = directory_of(root, system, f"save-{number}")
        rows.append(save_once(system, state, path))
        if ours:
            told["crc"] = _crcs(next(path.rglob("state_rank_0.pt")))
        shutil.rmtree(path)
    if isinstance(system, systems.Borrowed):
        told["copied"] = system.copied_bytes
    told |= {"rows": rows, "peak": machine.rss("VmHWM") - idle}
    system.close()
    shutil.rmtree(root)
    print(json.dumps(told))


def _crcs(path: Path) -> int:
    """One number for all bytes of a file."""
    import zlib

    crc = 0
    with path.open("rb") as file:
        while block := file.read(machine.BLOCK_BYTES):
            crc = zlib.crc32(block, crc)
    return crc
