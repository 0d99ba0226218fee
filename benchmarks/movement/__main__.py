"""How fast a state moves to disk and back, and what training loses by it: ours and the peers, in one run.

    python -m benchmarks.movement           about ten minutes for 1 GiB; make bench
    python -m benchmarks.movement --quick   under a minute; make bench-quick

saves the same state of CPU tensors through roll_ckpt and its peers, in turn, beside plain copies of memory and direct
writes and reads of the same bytes, and then trains with each of them. Peers: pip install '.[bench]'; one that is not
there is left out, with the reason. Prints tables and whether the targets were met, writes build/bench.json and
build/bench.png.

One row of the table: save() returned; blocked: save() and fence() at once, until the tensors may change, without an
fsync; durable: until everything is fsynced, by us where a peer does not; load: from a cold page cache into fresh
tensors; lost: by a training loop for each save, until the last one is durable; peak: memory above the idle process, of
a process of its own; pause: 99.9th percentile lateness of a thread that wants to run every millisecond, while a save is
written in the background.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from . import machine, measure, report, systems

BUILD = Path("build")
OFFLOAD_CAP_BYTES = 64 << 20
RESULT, PLOT = "bench.json", "bench.png"

LONG, SHORT, ROLLOUT = "long steps", "short steps", "rollouts"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.movement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 MiB, fewer rounds, one kind of loop")
    parser.add_argument("--mib", type=int, help="size of the state; default 1024, quick 256")
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--many", type=int, default=5000, help="tensors of the second state, saved by us alone")
    parser.add_argument("--rounds", type=int, help="measured saves of each contestant; default 7, quick 3")
    parser.add_argument("--loop-rounds", type=int, help="measured loops with each contestant; default 5, quick 2")
    parser.add_argument("--loop-saves", type=int, default=2, help="saves in one loop")
    parser.add_argument("--only", action="append", metavar="WORD", help="peers whose name has this word; repeatable")
    parser.add_argument("--directory", type=Path, help="where checkpoints go; default a new one under the temporary")
    parser.add_argument("--output", type=Path, default=BUILD, help="where bench.json and bench.png go; default build")
    parser.add_argument("--child", nargs=5, metavar="ARG", help=argparse.SUPPRESS)
    told = parser.parse_args()
    told.mib = told.mib or (256 if told.quick else 1024)
    told.rounds = told.rounds or (3 if told.quick else 7)
    told.loop_rounds = told.loop_rounds or (2 if told.quick else 5)
    return told


def tell(line: str) -> None:
    """What is being done, on one line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def run(told: argparse.Namespace, root: Path, results: report.Results) -> None:
    """Measure everything; `results` always holds what was measured so far."""
    tell("making the state")
    state = measure.make_state(told.mib << 20, told.tensors)
    results.nbytes = measure.bytes_of(state)
    target = machine.HugePages(results.nbytes)
    copier = machine.Copier(list(state.values()), target)
    disk = machine.RawDisk(root, target)
    contestants, results.missing = systems.open_all(state, told.only, quick=told.quick)
    results.loop_missing = {system.name: system.loop_reason for system in contestants if system.loop_reason}
    results.background = frozenset(system.name for system in contestants if system.background)
    results.about |= about_run(told, contestants)
    try:
        measure.measure_saves(contestants, state, root, copier, disk, told.rounds, tell, results.saves)
        for kind, memcpys in ((LONG, 3.0), (SHORT, 0.5), (ROLLOUT, 3.0))[: 1 if told.quick else 3]:
            results.steps_s[kind] = memcpys * report.median(results.saves.memcpy)
            trainer = measure.Trainer(state, results.steps_s[kind])
            step_s = min(machine.timed(lambda trainer=trainer: trainer.step(lambda: None)) for _ in range(3))
            interval = math.ceil(3 * report.best_write(results.saves) / step_s)
            loop = results.loops[kind] = measure.Loop(told.loop_saves * interval, told.loop_saves, kind == ROLLOUT)
            measure.measure_loop(contestants, state, root, trainer, copier, told.loop_rounds, tell, loop)
        if told.tensors < told.many:
            tell(f"a state of {told.many} tensors")
            many = measure.make_state(results.nbytes, told.many, 1)
            results.many += measure.measure_many(contestants[0], many, root, told.rounds)
        run_children(told, root, [system.name for system in contestants], results)
    finally:
        for system in contestants:
            system.close()


def run_children(told: argparse.Namespace, root: Path, names: list[str], results: report.Results) -> None:
    """First saves and peak memory, which only a fresh process can show."""
    results.cap_bytes = (told.mib << 20) // 4

    def child(name: str, cap_bytes: int, saves: int) -> Any:
        arguments = [name, str(told.mib << 20), str(told.tensors), str(cap_bytes), str(saves)]
        return measure.run_child([*arguments, "--directory", str(root)])

    for number in range(1 if told.quick else 5):
        tell(f"first save of process {number}")
        results.firsts.append(child(report.OURS, 0, 6))
    for name in names if not told.quick else [report.OURS]:
        tell(f"peak memory of {name}")
        results.memory[name] = child(name, results.cap_bytes if name == report.OURS else 0, 3)
    tell("offloaded state")
    results.borrowed = child(systems.Borrowed.name, OFFLOAD_CAP_BYTES, 3)


def stolen(before: dict[str, int], after: dict[str, int]) -> float:
    spent = {key: after[key] - before[key] for key in before}
    return spent.get("steal", 0) / max(1, sum(spent.values()))


def about_run(told: argparse.Namespace, contestants: list[systems.System]) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "safetensors", "torchsnapshot", "torch_checkpointing", "deepspeed"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": " ".join(["python -m benchmarks.movement", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cores": machine.cores(),
        "versions": versions,
        "tensors": told.tensors,
        "many_tensors": told.many,
        "rounds": told.rounds,
        "loop_rounds": told.loop_rounds,
        "contestants": [system.name for system in contestants],
    }


def main() -> None:
    told = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(machine.cores())
    if told.child is not None:
        name, nbytes, tensors, cap, saves = told.child
        measure.child_main(name, int(nbytes), int(tensors), int(cap) or None, int(saves), told.directory)
        return
    root = Path(tempfile.mkdtemp(prefix="movement-", dir=told.directory))
    results = report.Results()
    before, load_average = machine.processor_times(), os.getloadavg()[0]
    try:
        run(told, root, results)
    except KeyboardInterrupt:
        results.interrupted = True
        if any(name not in results.saves.systems for name in results.about.get("contestants", [""])):
            raise
        print("\ninterrupted: what was measured until then")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    tell("")
    results.about |= {
        "load_averages": [load_average, os.getloadavg()[0]],
        "stolen": stolen(before, machine.processor_times()),
    }
    figures = report.Figures(results)
    found = report.verdicts(figures)
    about = results.about
    print(
        f"{about['command']}: {results.nbytes / 2**20:.0f} MiB in {about['tensors']} tensors, {about['cores']} cores, "
        f"medians of {about['rounds']} saves and {about['loop_rounds']} loops"
    )
    for lines in (report.machine_lines(figures), report.table(figures), report.verdict_lines(found)):
        print("\n".join(["", *lines]))
    told.output.mkdir(parents=True, exist_ok=True)
    result = told.output / RESULT
    result.write_text(json.dumps(report.as_json(figures, found), indent=1, default=str) + "\n")
    print(f"\nall samples in {result}; {report.plot(figures, told.output / PLOT)}")


if __name__ == "__main__":
    main()
