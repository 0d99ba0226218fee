"""The demonstration: train, kill everything in the middle of a save, start again, and compare every loss.

    python -m examples.rlvr.demo             one world of two ranks, killed and resumed
    python -m examples.rlvr.demo --worlds    actor and critic as two torchrun jobs that commit together

It may be repeated at will: it begins by emptying its two folders, `runs/demo` and `runs/demo-work`
(with `--worlds`: `runs/worlds` and `runs/worlds-work`), and no other.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console
from rich.markup import escape

from examples.rlvr.job import RANKS, Job, JobFailed, wait
from examples.rlvr.journal import Launch, Place, read_journal, work_dir_of
from examples.rlvr.table import disk_tree, save_rows, save_table
from roll_ckpt import names

MARKER = ".rlvr-demo"
KILL_STEP, BEFORE = 9, 6

console = Console(highlight=False)


class DemoFailed(Exception):
    """What the demonstration is there to show is not so."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.rlvr.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", action="store_true", help="actor and critic as two torchrun jobs")
    parser.add_argument(
        "--forget-rng",
        action="store_true",
        help="resume without the random numbers: the comparison must fail",
    )
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    began = time.monotonic()
    try:
        if arguments.worlds:
            _two_worlds()
        else:
            _killed_and_resumed(["--forget-rng"] if arguments.forget_rng else [])
    except (DemoFailed, JobFailed) as problem:
        console.print("\n[bold red]The demonstration failed:[/]", escape(str(problem)), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted; every process of the job is ended.")
        return 130
    finally:
        console.show_cursor()
    console.print(f"\n[bold green]Done[/] in {time.monotonic() - began:.0f} s.")
    return 0


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


# --- one world, killed and resumed ------------------------------------------------------------------------


def _killed_and_resumed(resume_with: list[str]) -> None:
    output_dir = Path("runs/demo")
    work_dir = work_dir_of(output_dir)
    marker = _empty(output_dir, work_dir)
    unbroken = work_dir / "unbroken"
    unbroken_work = work_dir_of(unbroken)
    settings = ["--config", "configs/rlvr.yaml", "--output-dir"]

    _heading("1. A run that nobody disturbs, to compare with")
    with Job([*settings, str(unbroken)], unbroken_work) as job:
        _command(job)
        wait(job)

    _heading(f"2. The same run, killed while it saves step {KILL_STEP}")
    stop = ["--stop-at", f"vote.cast:checkpoint-{KILL_STEP}:actor_train"]
    with Job([*settings, str(output_dir), *stop], work_dir) as job:
        _command(job)
        job.wait_until_stopped()
        pids = job.kill()
        console.show_cursor()
    console.print(f"\n  SIGKILL to torchrun ({pids[0]}) and its workers ({', '.join(map(str, pids[1:]))}).")
    console.print(f"  Every rank of actor_train has voted for checkpoint-{KILL_STEP}, none of critic.")
    console.print("  This is what lies on disk now:\n")
    console.print(disk_tree(output_dir))
    _must_not_exist(output_dir / names.checkpoint(KILL_STEP))

    _heading("3. The same command again")
    with Job([*settings, str(output_dir), *resume_with], work_dir) as job:
        _command(job)
        wait(job)

    _heading("4. What came of it")
    compared = _compare(unbroken_work, work_dir)
    console.print(f"  [green]✓[/] {compared}")
    _verify(output_dir)
    _show_saves(output_dir, work_dir, ["rlvr"])
    marker.close()


def _compare(unbroken: Path, work_dir: Path) -> str:
    """A sentence about the losses of both runs; DemoFailed if one bit of one differs."""
    for rank in range(RANKS):
        (reference,) = _launches(unbroken, "rlvr", rank)
        killed, resumed = _launches(work_dir, "rlvr", rank)
        if resumed.resumed_from != BEFORE:
            raise DemoFailed(f"rank {rank} resumed from {resumed.resumed_from}, not from step {BEFORE}")
        missing = set(range(BEFORE + 1, len(reference.steps))) - resumed.steps.keys()
        if missing:
            raise DemoFailed(f"rank {rank} did not train steps {sorted(missing)} after the resume")
        for launch, when in ((killed, "before the kill"), (resumed, "after the resume")):
            for step, record in launch.steps.items():
                _compare_step(reference.steps[step].figures, record.figures, f"rank {rank}, step {step}, {when}")
    steps = f"steps {BEFORE + 1} to {max(resumed.steps)}"
    return f"every loss of {steps} is that of the unbroken run, bit for bit, on every rank"


def _compare_step(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise DemoFailed(
                f"{where}: {name} is {found.get(name)}, in the unbroken run {expected.get(name)}; "
                "this is not the same run"
            )


def _step_of(unit: Path) -> int:
    return names.step_of(unit.name) or 0


def _must_not_exist(path: Path) -> None:
    if path.exists():
        raise DemoFailed(f"{path} exists although the critic never voted for it")


# --- two worlds ---------------------------------------------------------------------------------------------


def _two_worlds() -> None:
    output_dir = Path("runs/worlds")
    work_dir = work_dir_of(output_dir)
    marker = _empty(output_dir, work_dir)
    settings = ["--config", "configs/rlvr_worlds.yaml", "--output-dir", str(output_dir), "--only"]
    clusters = ["actor_train", "critic"]

    _heading("1. Two torchrun jobs that share nothing but the output directory")
    actor, critic = (Job([*settings, cluster], work_dir, cluster) for cluster in clusters)
    with actor, critic:
        _command(actor)
        _command(critic)
        wait(actor, critic)

    _heading("2. What came of it")
    console.print(disk_tree(output_dir, opened=max(output_dir.glob("checkpoint-*"), key=_step_of)))
    console.print()
    _verify(output_dir)
    _show_saves(output_dir, work_dir, clusters)
    marker.close()


# --- what both do -------------------------------------------------------------------------------------------


def _empty(output_dir: Path, work_dir: Path) -> TextIO:
    """Empty this demonstration's two folders; returns the open marker, whose lock keeps a second one out.

    A folder that is not ours (the marker is missing, or something else than checkpoints lies in the output
    directory) is left as it is.
    """
    marker = work_dir / MARKER
    if work_dir.exists() and not marker.is_file() and any(work_dir.iterdir()):
        raise DemoFailed(f"{work_dir} was not made by this demonstration ({MARKER} is missing); move it away")
    strange = [path.name for path in output_dir.iterdir() if not _is_ours(path.name)] if output_dir.exists() else []
    if output_dir.is_symlink() or work_dir.is_symlink() or strange:
        what = f"holds {strange[0]}" if strange else "or its work folder is a link"
        raise DemoFailed(f"{output_dir} {what}, which is none of this demonstration's; move it away")
    work_dir.mkdir(parents=True, exist_ok=True)
    handle = marker.open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DemoFailed(f"another demonstration is running in {work_dir}; wait for it or stop it") from None
    for path in [*work_dir.iterdir(), *([output_dir] if output_dir.exists() else [])]:
        if path.is_dir():
            shutil.rmtree(path)
        elif path != marker:
            path.unlink()
    return handle


def _is_ours(name: str) -> bool:
    known = (names.LATEST, names.EPOCHS, names.TRASH, names.SUPERSEDED)
    return name in known or names.step_of(name) is not None or names.parse_attempt_dir(name) is not None


def _heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def _command(job: Job) -> None:
    console.print(f"  [dim]$ {job.command}[/]", soft_wrap=True)


def _launches(work_dir: Path, world: str, rank: int) -> list[Launch]:
    return read_journal(Place(work_dir, world, rank).journal)


def _verify(output_dir: Path) -> None:
    command = [sys.executable, "-m", "roll_ckpt.cli", "verify", str(output_dir)]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise DemoFailed(
            f"`roll-ckpt verify {output_dir}` ended with {result.returncode}:\n{result.stdout}{result.stderr}"
        )
    console.print(f"  [green]✓[/] roll-ckpt verify {output_dir}: every byte was read again and is sound")


def _show_saves(output_dir: Path, work_dir: Path, worlds: list[str]) -> None:
    journals = [_launches(work_dir, world, rank) for world in worlds for rank in range(RANKS)]
    console.print()
    console.print(save_table(save_rows(journals), output_dir, work_dir / "uploads"))


if __name__ == "__main__":
    sys.exit(main())
