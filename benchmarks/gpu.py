"""What a save of CUDA tensors costs: copies to the host, and what a training loop on the same device loses by them.

    python -m benchmarks.gpu                some minutes for 1 GiB; make bench-gpu

copies: until the last byte is on the host, beside one plain `copy_` of as many bytes into pinned memory and one such
`copy_` for each tensor. save(): until it returned, blocked: until the tensors may change as well, both beside
torch.save. Loops: short steps while one save is written, and a save at every step, of steps a little longer than it
takes a save to be durable. Each step multiplies matrices, waits at the fence, and changes every tensor. What was saved
is loaded and compared. Medians; quartiles in brackets. Writes build/bench-gpu.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.movement import machine, measure, report, systems
from benchmarks.movement.systems import State

RESULT = Path("build/bench-gpu.json")
MILLI = 1e3
SHORT_STEP_S = 0.05
STEPS = 5
"""Of a loop that saves at every one."""
ALONE, IN_FLIGHT, EVERY = "no save", "one save in flight", "a save at every step"

Samples = dict[str, list[float]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mib", type=int, default=1024, help="size of the first state: 400 tensors of very different sizes"
    )
    parser.add_argument("--small", type=int, default=20_000, help="tensors of 4 KiB in the second state")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of everything")
    parser.add_argument("--directory", type=Path, help="where checkpoints go; default a new one under the temporary")
    return parser.parse_args()


def require_device() -> None:
    if not torch.cuda.is_available():
        raise SystemExit(
            f"benchmarks.gpu measures saves of CUDA tensors, and torch {torch.__version__} finds no CUDA device here: "
            "run it where torch.cuda.is_available() is true; make bench measures tensors of the CPU"
        )
    from roll_ckpt.state import cuda_status

    if reason := cuda_status():
        raise SystemExit(f"torch finds a CUDA device, but roll_ckpt cannot use it: {reason}")


class Plain:
    """torch's copies of a state into pinned memory."""

    def __init__(self, state: State) -> None:
        self._tensors = list(state.values())
        self._flat = torch.cat([tensor.view(torch.uint8) for tensor in self._tensors])
        self._target = torch.empty(self._flat.numel(), dtype=torch.uint8, pin_memory=True)
        pieces = self._target.split([tensor.nbytes for tensor in self._tensors])
        self._targets = [piece.view(t.dtype) for piece, t in zip(pieces, self._tensors, strict=True)]

    def at_once(self) -> None:
        self._target.copy_(self._flat, non_blocking=True)
        torch.cuda.synchronize()

    def one_by_one(self) -> None:
        for target, tensor in zip(self._targets, self._tensors, strict=True):
            target.copy_(tensor, non_blocking=True)
        torch.cuda.synchronize()


def our_copies(ours: systems.Ours, state: State, directory: Path) -> float:
    """Seconds from the start of a transfer until its last byte was copied."""
    torch.cuda.synchronize()
    ours.save(state, directory)
    ours.handle()()
    shutil.rmtree(directory)
    return ours.copy_stats()["copy_s"]


def measure_state(ours: systems.Ours, state: State, root: Path, rounds: int) -> Samples:
    """Seconds of everything that is measured without a loop, by turns; the first round is thrown away."""
    plain = Plain(state)
    found: Samples = {}
    for number in range(rounds + 1):
        gc.collect()
        torch.cuda.synchronize()
        row = {"pinned copy_": machine.timed(plain.at_once), "copy_ by tensor": machine.timed(plain.one_by_one)}
        row["our copies"] = our_copies(ours, state, measure.directory_of(root, ours, f"copies-{time.monotonic_ns()}"))
        for system in (ours, systems.TorchSave()):
            directory = measure.directory_of(root, system, f"save-{time.monotonic_ns()}")
            row |= {f"{system.name}, {key}": s for key, s in measure.save_once(system, state, directory).items()}
            if number == 0 and system is ours:
                check(system.load(directory), state)
            shutil.rmtree(directory)
        for key, seconds in row.items() if number else ():
            found.setdefault(key, []).append(seconds)
    return found


def check(loaded: State, state: State) -> None:
    if not all(torch.equal(loaded[name].view(torch.uint8), t.cpu().view(torch.uint8)) for name, t in state.items()):
        raise SystemExit("what was loaded is not what was saved")


class Trainer:
    """Steps on the device: matrix products for a while, the fence, a change of every tensor, the loss's arrival."""

    def __init__(self, state: State, fence: Callable[[], None]) -> None:
        self._tensors = list(state.values())
        self._fence = fence
        self._left, self._right = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
        self._product = torch.empty_like(self._left)
        self._products = 1000
        self._product_s = min(self.step() for _ in range(4)) / self._products

    def last(self, seconds: float) -> None:
        self._products = max(1, round(seconds / self._product_s))

    def step(self, save: Callable[[], None] | None = None) -> float:
        """Seconds of one step, which begins with `save`."""
        began = time.perf_counter()
        if save is not None:
            save()
        for _ in range(self._products):
            torch.mm(self._left, self._right, out=self._product)
        self._fence()
        torch._foreach_neg_(self._tensors)
        torch.cuda.synchronize()
        return time.perf_counter() - began


def measure_loops(ours: systems.Ours, state: State, root: Path, rounds: int, durable_s: float) -> dict[str, Samples]:
    """Seconds of a step, the mean of one loop for each sample, by turns with and without saves."""
    trainer = Trainer(state, ours.fence)
    found: dict[str, Samples] = {"short": {ALONE: [], IN_FLIGHT: []}, "long": {ALONE: [], EVERY: []}}

    def save() -> None:
        ours.save(state, measure.directory_of(root, ours, f"loop-{time.monotonic_ns()}"))

    def in_flight(pool: ThreadPoolExecutor) -> list[float]:
        passed = [trainer.step(save)]
        writing = pool.submit(ours.handle())
        while not writing.done():
            passed.append(trainer.step())
        writing.result()
        return passed

    def every() -> list[float]:
        passed = [(trainer.step(save), ours.handle()) for _ in range(STEPS)]
        for _, wait in passed:
            wait()
        return [seconds for seconds, _ in passed]

    with ThreadPoolExecutor(1) as pool:
        for number in range(rounds + 1):
            trainer.last(SHORT_STEP_S)
            loops = {("short", IN_FLIGHT): in_flight(pool)}
            loops["short", ALONE] = [trainer.step() for _ in range(len(loops["short", IN_FLIGHT]))]
            trainer.last(max(SHORT_STEP_S, 1.25 * durable_s))
            loops["long", ALONE] = [trainer.step() for _ in range(STEPS)]
            loops["long", EVERY] = every()
            for (kind, name), passed in loops.items() if number else ():
                found[kind][name].append(statistics.fmean(passed))
            for directory in (root / ours.name).glob("loop-*"):
                shutil.rmtree(directory)
    return found


def verdicts(mixed: Samples, loops: dict[str, Samples]) -> list[report.Verdict]:
    median = report.median
    rate = median(mixed["pinned copy_"]) / median(mixed["our copies"])
    saved = median(mixed["roll_ckpt, save"]) / median(mixed["torch.save, save"])
    short = median(loops["short"][IN_FLIGHT]) / median(loops["short"][ALONE])
    every = median(loops["long"][EVERY]) / median(loops["long"][ALONE])
    return [
        report.Verdict("copies", ">= 90 % of pinned copy_", f"{rate:.1%}", rate >= 0.9),
        report.Verdict("save()", "<= 1 % of torch.save", f"{saved:.2%}", saved <= 0.01),
        report.Verdict(f"step, {IN_FLIGHT}", "<= 1.05 x", f"{short:.3f} x", short <= 1.05),
        report.Verdict(f"step, {EVERY}", "<= 1.05 x", f"{every:.3f} x", every <= 1.05),
    ]


def show(title: str, samples: Samples, nbytes: int = 0) -> None:
    print(title)
    for name, values in samples.items():
        found = machine.spread(values)
        told = f"{found['median'] * MILLI:10.2f} ms ({found['q1'] * MILLI:.2f}-{found['q3'] * MILLI:.2f})"
        rate = f"{nbytes / found['median'] / 1e9:10.2f} GB/s" if nbytes and not name.endswith(", save") else ""
        print(f"  {name:<28}{told:<36}{rate}")


def run(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    states = {
        "mixed": {name: t.cuda() for name, t in measure.make_state(arguments.mib << 20, 400).items()},
        "small": {f"small.{number}": torch.rand(1024, device="cuda") for number in range(arguments.small)},
    }
    nbytes = {name: measure.bytes_of(state) for name, state in states.items()}
    ours = systems.Ours(cap_bytes=int(1.25 * sum(nbytes.values())) + (256 << 20))
    systems.open_one(ours, states["mixed"])
    pinned = ours.wait_warm()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {machine.cores()} cores; staging {pinned}")
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "staging": pinned}
    for name, state in states.items():
        found[name] = measure_state(ours, state, root, arguments.rounds)
        show(f"{name} state: {nbytes[name] >> 20} MiB in {len(state)} tensors", found[name], nbytes[name])
    durable_s = report.median(found["mixed"]["roll_ckpt, durable"])
    found["loops"] = measure_loops(ours, states["mixed"], root, arguments.rounds, durable_s)
    for kind, samples in found["loops"].items():
        show(f"{kind} steps, with the mixed state", samples)
    told = verdicts(found["mixed"], found["loops"])
    print(*report.verdict_lines(told), sep="\n")
    return found | {"bytes": nbytes, "targets": [vars(one) for one in told], "arguments": vars(arguments)}


def main() -> None:
    arguments = parse()
    require_device()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", dir=arguments.directory) as folder:
        found = run(arguments, Path(folder))
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=2, default=str))
    print(f"all numbers in {RESULT}")


if __name__ == "__main__":
    main()
