"""What the ranks of a world do in tests/test_megatron_install.py, and the process whose children are killed there."""

from __future__ import annotations

import functools
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_cpu
import torch
import torch.distributed as dist

megatron_cpu.install()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing import ShardedTensor, serialization  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402
from megatron.core.msc_utils import MultiStorageClientFeature  # noqa: E402

from roll_ckpt import process  # noqa: E402
from roll_ckpt.backends.megatron import files, install, planning, version  # noqa: E402
from roll_ckpt.backends.megatron import tracker as tracker_file  # noqa: E402
from roll_ckpt.backends.megatron.files import Files  # noqa: E402
from roll_ckpt.backends.megatron.strategy import SaveStrategy  # noqa: E402
from roll_ckpt.config import Settings  # noqa: E402
from roll_ckpt.disk import failpoints  # noqa: E402

OURS = Settings(commit_timeout_s=60)
CALLS: list[str] = []
MCORE = {} if planning.DEFAULT == planning.MCORE else {"async_strategy": planning.MCORE}

WRAPPED = (
    *((TorchDistSaveShardedStrategy, name) for name in ("async_save", planning.HOOK)),
    (serialization, "save_config"),
    *version.savers_of_common_state(),
    *((queue, "schedule_async_request") for queue in planning.queues()),
)


@contextmanager
def hooked(settings: Settings | None = OURS) -> Iterator[None]:
    """Installed inside the block, and stock again after it: other tests share this world."""
    before = [(owner, name, getattr(owner, name)) for owner, name in WRAPPED]
    with mock.patch.dict(process.current()._parts):
        process.current()._parts.pop(install.Installed, None)
        install.install(settings)
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)


def state(value: float) -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor = torch.full((64, 64), value + rank)
    return {"weight": ShardedTensor.from_rank_offsets("weight", tensor, (0, rank, size)), "value": value}


def told_of(directory: Path) -> Any:
    """What stock loads: the value of the common state, if every tensor says the same."""
    loaded = dist_checkpointing.load(state(0), str(directory))
    same = bool((loaded["weight"] == loaded["value"] + dist.get_rank()).all())
    return loaded["value"] if same else "torn"


def made(directory: Path) -> str:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return str(directory)


def save(directory: Path, value: float, strategy: Any = None) -> None:
    dist_checkpointing.save(state(value), made(directory), strategy)


def save_async(directory: Path, value: float, *, persistent: bool = False, strategy: Any = None) -> None:
    """Through Megatron's queue; the tensors change as soon as it has taken the request."""
    queue = AsyncCallsQueue(persistent=persistent)
    sharded = state(value)
    told = {} if planning.DEFAULT == planning.MCORE else {"async_strategy": planning.MCORE}
    request = dist_checkpointing.save(sharded, made(directory), strategy, async_sharded_save=True, **told)
    assert request is not None
    queue.schedule_async_request(request)
    sharded["weight"].data.fill_(-1)
    try:
        while queue.get_num_unfinalized_calls():
            queue.maybe_finalize_async_calls()
        queue.maybe_finalize_async_calls(blocking=True)
    finally:
        queue.close(abort=True)


def save_without_threads(directory: Path, value: float, strategy: Any) -> None:
    with mock.patch.object(files.threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
        request = dist_checkpointing.save(state(value), made(directory), strategy, async_sharded_save=True, **MCORE)
    queue = AsyncCallsQueue()
    queue.schedule_async_request(request)
    queue.maybe_finalize_async_calls(blocking=True)


def error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def two_saves_in_one_directory(directory: str) -> dict[str, Any]:
    """Both in a queue, the older one slow on rank 1; with a tracker that is written by another spelling of its path."""
    root, rename, slow = Path(directory), Files._rename_written, [dist.get_rank() == 1, False]
    strategy, queue = TorchDistSaveShardedStrategy("torch_dist", 1), AsyncCallsQueue()
    tracker = root / tracker_file.NAME
    told = {} if planning.DEFAULT == planning.MCORE else {"async_strategy": planning.MCORE}

    def patiently(files: Files) -> None:
        if slow.pop(0):
            time.sleep(1)
        rename(files)

    with hooked(), mock.patch.object(Files, "_rename_written", patiently):
        path = made(root / "iter_0000002")
        for value in (10, 20):
            request = dist_checkpointing.save(state(value), path, strategy, async_sharded_save=True, **told)
            queue.schedule_async_request(request)
        if dist.get_rank() == 0:
            os.chdir(root)
            with tracker_file.opened(open, tracker_file.NAME, "w") as file:
                file.write("2")
                os.fsync(file.fileno())  # as careful hosts do
        early = tracker.exists()
        queue.maybe_finalize_async_calls(blocking=True)
    return {"early": early, "loaded": told_of(root / "iter_0000002"), "tracker": tracker.read_text()}


def begin_unlike(directory: str) -> list[str]:
    """What `begin` says of other settings on rank 1, and of a rank that is left to stock."""
    said = []
    for settings in (Settings(run_id=f"rank {dist.get_rank()}"), None, OURS):
        with hooked(settings or OURS):
            if settings is None and dist.get_rank() == 1:
                install.leave_to_stock()
                said.append("stock")
            else:
                said.append(error_of(install.begin))
    return said


# --- every way in --------------------------------------------------------------------------------------------


def every_way(directory: str) -> dict[str, Any]:
    """Each way to save through stock's strategies: how often it came to us, and what stock loads then."""
    root, stock = Path(directory), TorchDistSaveShardedStrategy
    existing = stock("torch_dist", 1)
    wrapper = FullyParallelSaveStrategyWrapper(stock("torch_dist", 1, True, 2, True))
    ways: dict[str, Callable[[Path, float], None]] = {
        "default": save,
        "existing": lambda path, value: save(path, value, existing),
        "fully parallel": lambda path, value: save(path, value, wrapper),
        "fully parallel again": lambda path, value: save(path, value, wrapper),
        "fully parallel, cached plan": lambda path, value: save(path, value, wrapper),
        "queue": lambda path, value: save_async(path, value, strategy=existing),
        "queue, fully parallel": lambda path, value: save_async(path, value, strategy=wrapper),
        "persistent queue": lambda path, value: save_async(path, value, persistent=True, strategy=existing),
        "ours, as stock's": lambda path, value: save(path, value, SaveStrategy("torch_dist", 1, settings=OURS)),
        "ours, by keyword": lambda path, value: save(path, value, SaveStrategy(backend="torch_dist", version=1)),
        "ours, settings alone": lambda path, value: save(path, value, SaveStrategy(OURS, cached_metadata=True)),
        "queue, where no thread can be started": lambda path, value: save_without_threads(path, value, existing),
        "over an older one": lambda path, value: save(root / "default", value),
    }
    found: dict[str, Any] = {}
    for value, (way, save_) in enumerate(ways.items(), 1):
        path = root / way if way != "over an older one" else root / "default"
        finish = Files.finish
        with mock.patch.object(Files, "finish", autospec=True, side_effect=finish) as finished, hooked():
            save_(path, value)
        found[way] = (finished.call_count, told_of(path) == value)
    return found


def log_of_two_saves(directory: str) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("roll_ckpt")
    logger.addHandler(handler)
    try:
        with hooked(None):
            save(Path(directory) / "a", 1)
            save(Path(directory) / "b", 2)
    finally:
        logger.removeHandler(handler)
    return lines


def wrapped_by_others(directory: str) -> list[str]:
    """Somebody wraps stock's method before us, and somebody after us; then we are installed again."""
    CALLS.clear()

    def wrap(who: str) -> None:
        function = TorchDistSaveShardedStrategy.async_save

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            CALLS.append(who)
            return function(*args, **kwargs)

        TorchDistSaveShardedStrategy.async_save = wrapper

    finish, original = Files.finish, TorchDistSaveShardedStrategy.async_save
    try:
        wrap("before")
        with hooked(), mock.patch.object(Files, "finish", autospec=True, side_effect=finish) as finished:
            wrap("after")
            install.install()
            save(Path(directory), 1)
    finally:
        TorchDistSaveShardedStrategy.async_save = original
    assert told_of(Path(directory)) == 1
    return [*CALLS, f"{finished.call_count} by us"]


# --- failures and refusals -----------------------------------------------------------------------------------


def fail_on_one_rank(directory: str) -> dict[str, Any]:
    """A disk that refuses one file of rank 1, over a complete checkpoint; then the next save."""
    found = {}
    for way in (save, save_async, functools.partial(save_async, persistent=True)):
        with hooked():
            save(Path(directory), 1)
            with mock.patch.object(failpoints, "observer", _refuse_rename if dist.get_rank() == 1 else None):
                error = error_of(functools.partial(way, Path(directory), 2))
            dist.barrier()
            left = sorted(os.listdir(directory))
            dist.barrier()
            save(Path(directory), 3)
            found[str(len(found))] = (error, left, told_of(Path(directory)))
    return found


def _refuse_rename(operation: str, paths: tuple[str, ...]) -> None:
    if operation == "rename" and paths[-1].endswith(".distcp"):
        raise OSError(5, "the disk is gone", paths[-1])


def fail_to_save_the_common_state(directory: str) -> str:
    """What only rank 0 writes cannot be pickled."""
    with hooked():
        sharded = {**state(1), "value": (lambda: None) if dist.get_rank() == 0 else 1}
        made(Path(directory))
        return error_of(lambda: dist_checkpointing.save(sharded, directory, validate_access_integrity=False))


def order_on_disk(directory: str) -> list[tuple[str, str]]:
    """What rank 0 does to the disk in a save over an older checkpoint, without the temporary names."""
    with hooked():
        save(Path(directory), 1)
        seen: list[tuple[str, str]] = []
        with mock.patch.object(failpoints, "observer", lambda did, paths: seen.append((did, Path(paths[-1]).name))):
            save(Path(directory), 2)
    return [(operation, name) for operation, name in seen if not name.endswith(".new")]


def refusals(directory: str) -> dict[str, Any]:
    made(Path(directory))
    with hooked(OURS):
        twice = error_of(lambda: install.install(Settings(commit_timeout_s=5)))
        same = error_of(lambda: install.install(Settings(commit_timeout_s=60)))
        both = error_of(lambda: SaveStrategy(OURS, settings=OURS))
        with mock.patch.object(MultiStorageClientFeature, "is_enabled", return_value=True):
            msc = error_of(lambda: TorchDistSaveShardedStrategy("torch_dist", 1).async_save({}, Path(directory)))
    return {"twice": twice, "same": same, "both": both, "msc": msc, "left": os.listdir(directory)}


# --- kills ---------------------------------------------------------------------------------------------------


def kill_at_every_operation(root: Path) -> None:
    """Print, for each disk operation of a save over an older checkpoint, what a kill before it leaves; see the test."""
    for number in range(1000):
        directory = root / str(number)
        child = os.fork()
        if child == 0:
            _save_twice_and_die(directory, number)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if not (directory / "metadata.json").exists():
            print(number, killed, "incomplete", flush=True)
        else:
            reader = os.fork()
            if reader == 0:
                _alone()
                print(number, killed, told_of(directory), flush=True)
                os._exit(0)
            os.waitpid(reader, 0)
        if not killed:
            return


def _alone() -> None:
    dist.init_process_group("gloo", store=dist.FileStore(tempfile.mktemp(), 1), rank=0, world_size=1)


def _save_twice_and_die(directory: Path, number: int) -> None:
    _alone()
    save(directory, 1)
    left = number

    def die(operation: str, paths: tuple[str, ...]) -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    failpoints.observer = die
    save(directory, 2)
    os._exit(0)


if __name__ == "__main__":
    install.install(Settings(staging={"arena_bytes": 64 << 20}))  # type: ignore[arg-type]
    kill_at_every_operation(Path(sys.argv[1]))
