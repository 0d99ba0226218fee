"""Thousands of small saves in one process, some of which fail; what is left of them, as a table of samples.

    python long_runs.py transaction FOLDER SAVES     without torch: votes, settling, pruning
    python long_runs.py corridor FOLDER SAVES        tensors through the arena, under training

Prints one JSON line for each of SAMPLES moments, about evenly spaced: what this process and the directory hold.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import resource
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import runs

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.errors import NotFound, SaveFailed
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.records import Vote
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.native.image import Lifetime
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, claims, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import attempts, ballot, publication, reader_locks, retention, settlement

SAMPLES = 40
KEEP = 2
attempts._NAMES_KEPT = publication._REASONS_KEPT = 2  # so that the bounds are soon reached


def sample(output_dir: Path, roots: Iterable[object], seconds: list[float], **more: int) -> dict[str, Any]:
    """What is held at this moment; `roots` are objects of ours that no module knows."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "blocks": sys.getallocatedblocks(),
        "rss": int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
        "left": sorted(leftovers(output_dir)),
        "tables": dict(tables(roots)),
        "seconds": statistics.median(seconds),
        **more,
    }


def leftovers(output_dir: Path) -> Iterator[str]:
    """Every entry below the output directory that belongs to no checkpoint."""
    for folder, folders, files in os.walk(output_dir):
        inside = os.path.relpath(folder, output_dir)
        if inside == ".":
            folders[:] = [name for name in folders if names.step_of(name) is None]
        yield from (os.path.normpath(f"{inside}/{name}") for name in (*folders, *files))


def tables(roots: Iterable[object]) -> Counter[str]:
    """How many entries each container has that a module of ours, or an object of ours in it, holds."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()
    todo: list[tuple[str, object]] = [(f"({type(root).__name__})", root) for root in roots]
    for name, module in list(sys.modules.items()):
        if name.startswith("roll_ckpt"):
            todo += [(f"{name}.{key}", value) for key, value in vars(module).items() if not key.startswith("__")]
    while todo:
        path, value = todo.pop()
        if id(value) in seen or isinstance(value, type):
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | set | frozenset | tuple | deque):
            sizes[path] += len(value)
            todo += [(f"{path}[]", one) for one in (value.values() if isinstance(value, dict) else value)]
        elif type(value).__module__.startswith("roll_ckpt"):
            todo += [(f"{path}.{key}", one) for key, one in getattr(value, "__dict__", {}).items()]
    return sizes


def measured(
    saves: int, save: Callable[[int], None], look: Callable[[list[float]], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Save so many times; a sample each time that another part of SAMPLES is done."""
    seconds: list[float] = []
    gc.freeze()  # what was imported is not looked at again at each sample
    for step in range(1, saves + 1):
        began = time.process_time()  # a busy machine lets time pass, and does no work of ours
        save(step)
        seconds.append(time.process_time() - began)
        if step * SAMPLES // saves > (step - 1) * SAMPLES // saves:
            yield {"saves": step, **look(seconds)}
            seconds.clear()


# --- without torch ----------------------------------------------------------------------------------------------


def transaction(output_dir: Path, saves: int) -> Iterator[dict[str, Any]]:
    """Of ten saves one is voted down, one misses a vote, one is voted down and then made again."""
    runs.CLUSTERS = {"actor": 1, "critic": 1}
    runs.RANKS = [(cluster, 0) for cluster in runs.CLUSTERS]
    epoch = runs.claim(output_dir)

    def tried(step: int, last: str) -> bool:
        made = attempts.begin(epoch, names.checkpoint(step), step=step, expected=runs.CLUSTERS)
        runs.vote(made, "new", *runs.RANKS[0])
        if last == "no":
            ballot.cast(made, Vote("critic", 0, made.epoch, made.attempt, (), error="no"))
        elif last == "yes":
            runs.vote(made, "new", *runs.RANKS[1])
        return settlement.settle(made, lead=True, timeout_s=0 if last == "missing" else 10).committed

    def save(step: int) -> None:
        kind = {3: "no", 6: "missing", 9: "no"}.get(step % 10, "yes")
        assert tried(step, kind) == (kind == "yes")
        if step % 10 == 9:
            assert tried(step, "yes")
        retention.prune(output_dir, epoch, KEEP)
        with suppress(NotFound), reader_locks.reading(output_dir / names.checkpoint(step)):
            assert reader_locks.is_being_read(output_dir / names.checkpoint(step))

    yield from measured(saves, save, lambda seconds: sample(output_dir, [epoch], seconds))
    epoch.release()


# --- the corridor -----------------------------------------------------------------------------------------------


def corridor(output_dir: Path, saves: int) -> Iterator[dict[str, Any]]:
    """Of ten saves one cannot be begun, one is voted down, one raises, one meets a disk that takes no large file."""
    import torch

    from roll_ckpt import names
    from roll_ckpt.transaction import retention

    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = {"staging": {"arena_bytes": "1MiB"}, "io": {"block_bytes": "64KiB", "threads": 2}, "commit_timeout_s": 20}
    settings = Settings.parse(sizes, "the test")
    world, layouts = RankGroup(0, 1, None), Layouts()
    weights, moments = torch.randn(30_000), torch.zeros(20_000)
    running: list[Save] = []

    def prune(save: Save) -> None:
        retention.prune(output_dir, claims.epoch_of(output_dir), KEEP)

    def begun(step: int, problem: str | None = None) -> Save:
        request = Request(output_dir, names.checkpoint(step), step, {"model": 1})
        return begin(world, request, settings, nbytes=1 << 18, problem=problem, on_commit=prune)

    def stage(save: Save, step: int, kind: int) -> None:
        cluster_save = save.add_cluster("model", {"framework": "none"})
        state = {"weights": weights, "moments": moments, "step": step}
        image, _ = layouts.lay_out("model.pt", state, "model", lambda storage: Lifetime.UNTIL_FENCE)
        cluster_save.stage(save.attempt.checkpoint_dir / "model.pt", image, overlap=True)
        cluster_save.stage(save.attempt.checkpoint_dir / "state.json", FileImage.of_bytes(b"%d" % step), overlap=False)
        if kind == 3:
            cluster_save.fail(ValueError("no"))
        if kind == 6:
            raise KeyboardInterrupt

    def ended(save: Save, fine: bool) -> None:
        assert save._finished.wait(20)
        assert (save.failure is None) == fine, save.failure

    def save(step: int) -> None:
        kind = step % 10
        if kind == 1:
            with suppress(SaveFailed):
                begun(step, problem="the trainer has no state today")
        if kind == 9:
            for one in pending.pending():
                ended(one, True)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        made = begun(step)
        with suppress(KeyboardInterrupt), made.staging():
            stage(made, step, kind)
        running.append(made)
        pending.wait_copied(running)
        weights.add_(1)
        moments.mul_(0.5)
        if kind in (3, 6, 9):
            ended(made, False)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    def look(seconds: list[float]) -> dict[str, Any]:
        for one in pending.pending():
            ended(one, True)
        pending.wait_copied(running)
        staging = arena.mover(settings).arena
        roots = [claims.epoch_of(output_dir), layouts]
        return sample(output_dir, roots, seconds, used_bytes=staging.used_bytes, running=len(running))

    yield from measured(saves, save, look)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    how = {"transaction": transaction, "corridor": corridor}[sys.argv[1]]
    for found in how(Path(sys.argv[2]), int(sys.argv[3])):
        print(json.dumps(found), flush=True)
