"""The contestants. Each saves the same flat dict of tensors and loads it back; each is told apart by `name`.

`save` is the call a trainer makes. `fence` returns when the tensors may change. `durable` returns when every byte
is durable, which for a peer that does not fsync is done here. One that is not installed is left out, with the
reason.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import machine

State = dict[str, torch.Tensor]


class System:
    name = ""
    background = False
    """Whether something is still written when `save` has returned and the tensors may change."""
    several = False
    """Whether a save may begin while the one before it is being written."""
    loop_reason = ""
    """Why it is not measured in a training loop."""
    shapes: dict[str, tuple[torch.Size, torch.dtype]]
    """Shape and dtype of what is loaded, for peers that load into tensors they are given."""

    def open(self, state: State) -> None:
        """Once, before the first save."""

    def save(self, state: State, directory: Path) -> None:
        raise NotImplementedError

    def fence(self) -> None:
        """Until the tensors may change."""

    def handle(self) -> Callable[[], None]:
        """What waits until the save that was just begun is durable."""
        raise NotImplementedError

    def load(self, directory: Path) -> State:
        raise NotImplementedError

    def allocate(self) -> State:
        """Tensors to load into."""
        return {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes.items()}

    def close(self) -> None:
        pass


class Ours(System):
    """Our own saver of state dictionaries, on one rank: begin, lay out, stage, vote, commit."""

    name = "roll_ckpt"
    background = True
    several = True

    def __init__(self, cap_bytes: int | None = None) -> None:
        from roll_ckpt.state import Lifetime, StateSaver

        self._unchanged = Lifetime.UNTIL_FENCE
        self._cap_bytes = cap_bytes
        self._saver = StateSaver()
        self._save: Any = None

    def open(self, state: State) -> None:
        from roll_ckpt.config import Settings
        from roll_ckpt.state import StateSaver

        nbytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        blocks = 2 * int(Settings().io.block_bytes)
        cap = nbytes + (nbytes >> 5) + blocks if self._cap_bytes is None else self._cap_bytes
        self._saver = StateSaver(Settings(staging={"arena_bytes": cap}, async_save=True))
        self._saver.warm(nbytes, max((tensor.get_device() for tensor in state.values()), default=-1))

    def save(self, state: State, directory: Path) -> None:
        self._save = self._saver.save(state, directory, unchanged=self._unchanged)

    def fence(self) -> None:
        if self._save is not None:
            self._save.fence()

    def handle(self) -> Callable[[], None]:
        save = self._save
        return lambda: save.wait(600)

    def load(self, directory: Path) -> State:
        state: State = self._saver.load(directory)
        return state

    def wait_warm(self) -> str:
        """Block until the arena is in memory; whether it is pinned for CUDA, or why not."""
        told: str = self._saver.wait_warm()
        return told

    def copy_stats(self) -> dict[str, float]:
        """Of the last save; see `Save.copy_stats`."""
        stats: dict[str, float] = self._save.copy_stats()
        return stats


class Leased(Ours):
    """Ours for a state that lies on the host until the save has ended, as an offloaded one does."""

    name = "roll_ckpt, offloaded state"

    def open(self, state: State) -> None:
        from roll_ckpt.state import Lifetime

        super().open(state)
        self._unchanged = Lifetime.UNTIL_WRITTEN

    @property
    def copied_bytes(self) -> int:
        """Bytes of the last save that were copied before it returned."""
        return int(self.copy_stats()["eager_bytes"])


class TorchSave(System):
    name = "torch.save"

    def save(self, state: State, directory: Path) -> None:
        directory.mkdir(parents=True)
        torch.save(state, directory / "model.pt")
        self._directory = directory

    def handle(self) -> Callable[[], None]:
        directory = self._directory
        return lambda: machine.fsync_tree(directory)

    def load(self, directory: Path) -> State:
        found: State = torch.load(directory / "model.pt", weights_only=True)
        return found


class DeepSpeedStock(TorchSave):
    """DeepSpeed's stock checkpoint engine."""

    name = "DeepSpeed stock engine"
    loop_reason = "it is torch.save"

    def open(self, state: State) -> None:
        from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self._engine = TorchCheckpointEngine()

    def save(self, state: State, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._engine.save(state, str(directory / "model.pt"))
        self._directory = directory

    def load(self, directory: Path) -> State:
        found: State = self._engine.load(str(directory / "model.pt"), map_location="cpu")
        return found


class Safetensors(System):
    name = "safetensors"

    def open(self, state: State) -> None:
        import safetensors.torch

        self._format = safetensors.torch

    def save(self, state: State, directory: Path) -> None:
        directory.mkdir(parents=True)
        self._format.save_file(state, directory / "model.safetensors")
        self._directory = directory

    def handle(self) -> Callable[[], None]:
        directory = self._directory
        return lambda: machine.fsync_tree(directory)

    def load(self, directory: Path) -> State:
        return _touched(self._format.load_file(directory / "model.safetensors"))


class DcpSave(System):
    """torch.distributed.checkpoint; it fsyncs its files itself."""

    name = "dcp.save"

    def open(self, state: State) -> None:
        import torch.distributed.checkpoint as dcp

        self._dcp = dcp

    def save(self, state: State, directory: Path) -> None:
        self._dcp.save(state, checkpoint_id=directory)

    def handle(self) -> Callable[[], None]:
        return lambda: None

    def load(self, directory: Path) -> State:
        state = self.allocate()
        self._dcp.load(state, checkpoint_id=directory)
        return state


class DcpAsync(DcpSave):
    name = "dcp.async_save"
    background = True

    def save(self, state: State, directory: Path) -> None:
        self._future = self._dcp.async_save(state, checkpoint_id=directory)

    def handle(self) -> Callable[[], None]:
        future = self._future
        return lambda: _done(future)


class DcpReused(DcpAsync):
    name = "dcp.async_save, reused stager"

    def open(self, state: State) -> None:
        super().open(state)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(StagingOptions(False, False, True, False))  # all but what needs an accelerator
        self._response: Any = None

    def save(self, state: State, directory: Path) -> None:
        self._response = self._dcp.async_save(state, checkpoint_id=directory, async_stager=self._stager)

    def fence(self) -> None:
        if self._response is not None:
            self._response.staging_completion.result()

    def handle(self) -> Callable[[], None]:
        future = self._response.upload_completion
        return lambda: _done(future)

    def close(self) -> None:
        self._stager.close()


class TorchCheckpointing(System):
    """Meta's torch_checkpointing: staged by a thread into shared memory, written by a process."""

    name = "torch_checkpointing"
    background = True

    def open(self, state: State) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        # Its direct I/O writes unaligned and fails on ext4.
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def save(self, state: State, directory: Path) -> None:
        self._future = self._manager.save(str(directory), {"model": state})
        self._directory = directory

    def fence(self) -> None:
        with self._manager.lock():
            pass

    def handle(self) -> Callable[[], None]:
        future, directory = self._future, self._directory

        def wait() -> None:
            future.result()
            machine.fsync_tree(directory)

        return wait

    def load(self, directory: Path) -> State:
        return _touched(self._manager.load(str(directory), into={"model": None})["model"])

    def close(self) -> None:
        self._manager.close()


class SnapshotTake(System):
    name = "torchsnapshot.take"

    def open(self, state: State) -> None:
        import torchsnapshot

        self._snapshots = torchsnapshot
        logging.getLogger("torchsnapshot").setLevel(logging.ERROR)

    def save(self, state: State, directory: Path) -> None:
        self._snapshots.Snapshot.take(str(directory), {"model": self._snapshots.StateDict(**state)})
        self._directory = directory

    def handle(self) -> Callable[[], None]:
        directory = self._directory
        return lambda: machine.fsync_tree(directory)

    def load(self, directory: Path) -> State:
        held = self._snapshots.StateDict(
            **{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self.shapes.items()}
        )
        self._snapshots.Snapshot(str(directory)).restore({"model": held})
        return dict(held)


class SnapshotAsync(SnapshotTake):
    name = "torchsnapshot.async_take"
    background = True

    def save(self, state: State, directory: Path) -> None:
        app_state = {"model": self._snapshots.StateDict(**state)}
        self._pending = self._snapshots.Snapshot.async_take(str(directory), app_state)
        self._directory = directory

    def handle(self) -> Callable[[], None]:
        pending, directory = self._pending, self._directory

        def wait() -> None:
            pending.wait()
            machine.fsync_tree(directory)

        return wait


OTHERS: tuple[type[System], ...] = (
    TorchSave,
    Safetensors,
    DcpSave,
    DcpAsync,
    DcpReused,
    TorchCheckpointing,
    SnapshotTake,
    SnapshotAsync,
    DeepSpeedStock,
)

ELSEWHERE = {"Megatron-core's strategies": "they need two ranks and a Megatron model: make bench-megatron"}


def open_all(state: State, only: list[str] | None, quick: bool) -> tuple[list[System], dict[str, str]]:
    """Every contestant that can be used here, ours first, and why the others cannot."""
    _one_rank()
    found: list[System] = []
    missing = dict(ELSEWHERE)
    for kind in (Ours, *OTHERS):
        if only is not None and kind is not Ours and not any(word in kind.name for word in only):
            missing[kind.name] = "left out by --only"
            continue
        if quick and kind.loop_reason:
            missing[kind.name] = f"left out by --quick: {kind.loop_reason}"
            continue
        try:
            found.append(open_one(kind(), state))
        except ImportError as problem:
            missing[kind.name] = f"not installed ({problem}); pip install '.[bench]'"
    return found, missing


def open_one(system: System, state: State) -> System:
    _one_rank()
    system.shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        system.open(state)
    return system


def _one_rank() -> None:
    """A process group of one rank, which DCP's asynchronous saves ask for."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def _done(future: Any) -> None:
    future.result()


def _touched(state: State) -> State:
    """Some loads only map the file: read one byte of every page, so that the tensors are there."""
    for tensor in state.values():
        if tensor.numel():
            tensor.view(-1).view(torch.uint8)[::4096].sum()
    return state
