"""The demonstration: train, kill everything in the middle of a save, start again, and compare every loss.

    python -m examples.rlvr.demo                       one world of two ranks, killed and resumed
    python -m examples.rlvr.demo --worlds              actor and critic as two torchrun jobs that commit together
    python -m examples.rlvr.demo --repo me/rlvr-demo   pushed to the Hugging Face Hub; HF_TOKEN holds the token

Without --repo a local Hub stands for the real one, served by this process.

It may be repeated at will: it begins by emptying its two folders, `runs/demo` and `runs/demo-work`
(with `--worlds`: `runs/worlds` and `runs/worlds-work`), and no other.
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, TextIO

from rich.console import Console
from rich.markup import escape
from roll_ckpt_hub_dev import LocalHub

from examples.rlvr.job import RANKS, Job, JobFailed, wait
from examples.rlvr.journal import Launch, Place, read_journal, work_dir_of
from examples.rlvr.table import disk_tree, save_rows, save_table
from roll_ckpt import names

MARKER = ".rlvr-demo"
KILL_STEP, BEFORE = 9, 6
LOCAL_REPO = "demo/rlvr"

console = Console(highlight=False)


class DemoFailed(Exception):
    """What the demonstration is there to show is not so."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.rlvr.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--worlds", action="store_true", help="actor and critic as two torchrun jobs")
    parser.add_argument(
        "--repo", metavar="NAMESPACE/NAME", help="push there, on the real Hub; made if missing, private"
    )
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
            _killed_and_resumed(arguments.repo, ["--forget-rng"] if arguments.forget_rng else [])
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


def _killed_and_resumed(repo: str | None, resume_with: list[str]) -> None:
    output_dir = Path("runs/demo")
    work_dir = work_dir_of(output_dir)
    marker = _empty(output_dir, work_dir)
    with _hub(repo, work_dir / "hub") as uri:
        push = f"checkpoint_config={{type: hub, repo_id: {uri.removeprefix('hf://')}}}"
        _train_twice(output_dir, work_dir, push, resume_with)
        _pull_elsewhere(uri, output_dir, work_dir)
    _show_saves(output_dir, work_dir, ["rlvr"])
    marker.close()


@contextmanager
def _hub(repo: str | None, root: Path) -> Iterator[str]:
    """The repository's address, on the real Hub if one is named, else on a local one that answers meanwhile."""
    if repo is not None:
        if not os.environ.get("HF_TOKEN"):
            raise DemoFailed("--repo needs the Hub's token in the environment: export HF_TOKEN=…")
        yield f"hf://{repo}"
        return
    with LocalHub(root) as hub:
        os.environ |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "any-token", "HF_HOME": str(root)}
        os.environ.pop("HF_HUB_OFFLINE", None)
        yield f"hf://{LOCAL_REPO}"


def _train_twice(output_dir: Path, work_dir: Path, push: str, resume_with: list[str]) -> None:
    unbroken = work_dir / "unbroken"
    settings = ["--config", "configs/rlvr.yaml", "--output-dir"]

    _heading("1. A run that nobody disturbs, to compare with")
    with Job([*settings, str(unbroken)], work_dir_of(unbroken)) as job:
        _command(job)
        wait(job)

    _heading(f"2. The same run, pushed to the Hub, and killed while it saves step {KILL_STEP}")
    stop = ["--stop-at", f"vote.cast:checkpoint-{KILL_STEP}:actor_train"]
    with Job([*settings, str(output_dir), *stop, push], work_dir) as job:
        _command(job)
        job.wait_until_stopped()
        pids = job.kill()
        console.show_cursor()
    console.print(f"\n  SIGKILL to torchrun ({pids[0]}) and what it had started ({', '.join(map(str, pids[1:]))}).")
    console.print(f"  Every rank of actor_train has voted for checkpoint-{KILL_STEP}, none of critic.")
    console.print("  This is what lies on disk now:\n")
    console.print(disk_tree(output_dir))
    _must_not_exist(output_dir / names.checkpoint(KILL_STEP))

    _heading("3. The same command again")
    with Job([*settings, str(output_dir), *resume_with, push], work_dir) as job:
        _command(job)
        wait(job)
    console.print()
    _compare(work_dir_of(unbroken), work_dir)
    _verify(output_dir)


def _pull_elsewhere(uri: str, output_dir: Path, work_dir: Path) -> None:
    """What a colleague does: pull a checkpoint by its tag, and train on from it in a folder of their own."""
    source, pulled = f"{uri}@{names.checkpoint(KILL_STEP)}", work_dir / "pulled"
    _heading("4. Somebody else takes the checkpoint from the Hub")
    _roll_ckpt("pull", source, str(pulled))
    _compare_files(output_dir / names.checkpoint(KILL_STEP), pulled / names.checkpoint(KILL_STEP))
    _verify(pulled)
    elsewhere = work_dir / "elsewhere"
    resume = f"resume_from_checkpoint={source}"
    with Job(["--config", "configs/rlvr.yaml", "--output-dir", str(elsewhere), resume], work_dir_of(elsewhere)) as job:
        _command(job)
        wait(job)
    console.print()
    _compare(work_dir_of(work_dir / "unbroken"), work_dir_of(elsewhere), resumed_from=KILL_STEP)


def _compare_files(one: Path, other: Path) -> None:
    """DemoFailed unless both folders hold the same files with the same bytes."""
    paths = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    if paths[0] != paths[1]:
        raise DemoFailed(f"{one} and {other} differ in {sorted(map(str, paths[0] ^ paths[1]))}")
    for path in sorted(paths[0]):
        if not filecmp.cmp(one / path, other / path, shallow=False):
            raise DemoFailed(f"{other / path} is not {one / path}")
    console.print(f"  [green]✓[/] {other} is byte for byte what the run saved, {len(paths[0])} files")


def _compare(unbroken: Path, work_dir: Path, resumed_from: int = BEFORE) -> None:
    """DemoFailed if one bit of one loss differs from the unbroken run's."""
    for rank in range(RANKS):
        (reference,) = _launches(unbroken, "rlvr", rank)
        launches = _launches(work_dir, "rlvr", rank)
        resumed = launches[-1]
        if resumed.resumed_from != resumed_from:
            raise DemoFailed(f"rank {rank} resumed from {resumed.resumed_from}, not from step {resumed_from}")
        missing = set(range(resumed_from + 1, len(reference.steps))) - resumed.steps.keys()
        if missing:
            raise DemoFailed(f"rank {rank} did not train steps {sorted(missing)} after the resume")
        for launch in launches:
            when = "after the resume" if launch is resumed else "before the kill"
            for step, record in launch.steps.items():
                _compare_step(reference.steps[step].figures, record.figures, f"rank {rank}, step {step}, {when}")
    console.print(
        f"  [green]✓[/] every loss of steps {resumed_from + 1} to {max(resumed.steps)} is that of the unbroken run, "
        "bit for bit, on every rank",
        soft_wrap=True,
    )


def _compare_step(expected: dict[str, str], found: dict[str, str], where: str) -> None:
    for name in expected.keys() | found.keys():
        if expected.get(name) != found.get(name):
            raise DemoFailed(
                f"{where}: {name} is {found.get(name)}, in the unbroken run {expected.get(name)}; "
                "this is not the same run"
            )


def _step_of(checkpoint_dir: Path) -> int:
    return names.step_of(checkpoint_dir.name) or 0


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
    known = (names.LATEST, names.EPOCHS, names.TRASH, names.SUPERSEDED, names.HUB)
    return name in known or names.step_of(name) is not None or names.parse_attempt_dir(name) is not None


def _heading(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left", style="dim")


def _command(job: Job) -> None:
    console.print(f"  [dim]$ {job.command}[/]", soft_wrap=True)


def _launches(work_dir: Path, world: str, rank: int) -> list[Launch]:
    return read_journal(Place(work_dir, world, rank).journal)


def _verify(output_dir: Path) -> None:
    _roll_ckpt("verify", str(output_dir))
    console.print(f"  [green]✓[/] {output_dir}: every byte was read again and is sound")


def _roll_ckpt(*arguments: str) -> None:
    command = [sys.executable, "-m", "roll_ckpt", *arguments]
    console.print(f"  [dim]$ roll-ckpt {' '.join(arguments)}[/]", soft_wrap=True)
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    if result.returncode:
        raise DemoFailed(
            f"`roll-ckpt {' '.join(arguments)}` ended with {result.returncode}:\n{result.stdout}{result.stderr}"
        )


def _show_saves(output_dir: Path, work_dir: Path, worlds: list[str]) -> None:
    journals = [_launches(work_dir, world, rank) for world in worlds for rank in range(RANKS)]
    console.print()
    console.print(save_table(save_rows(journals), output_dir))


if __name__ == "__main__":
    sys.exit(main())
