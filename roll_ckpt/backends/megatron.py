"""The Megatron-core backend: what `dist_checkpointing` saves goes through us, and stays what stock reads.

`SaveStrategy` is given to `dist_checkpointing.save(sharded_strategy=...)`, alone or inside Megatron's
`FullyParallelSaveStrategyWrapper`: stock code still plans who writes which shard, we move the bytes. `save` and
`load` are the same under the commit: the directory appears under its name when every rank has voted.
`attach` returns both for a model with its distributed optimizer, scheduler and random states.

Written against Megatron-core 0.16 (`dist_checkpointing/serialization.py`, `strategies/torch.py`).
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import queue
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron.core
import numpy
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.msc_utils import MultiStorageClientFeature
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import arena, disk, errors, loader, names, native, retention, saver
from roll_ckpt.config import Settings
from roll_ckpt.image import FileImage
from roll_ckpt.layout import dcp
from roll_ckpt.world import LONGEST_S, World

log = logging.getLogger("roll_ckpt")

COMMON, DCP_METADATA, MARKER = "common.pt", ".metadata", "metadata.json"
"""What stock code writes on rank 0 beside the `.distcp` files; the marker comes last."""

RESHARDABLE = {
    "dp_reshardable": "on any number of data parallel ranks",
    "fully_reshardable": "in any layout",
}
"""Forms of the distributed optimizer that can be saved, and where they can be loaded."""

FRAMEWORK = "megatron-core"
_RNG = "roll_ckpt.rng"
_CLIENT_STATE = "roll_ckpt.client_state"
_OPTIMIZER_BYTES = 12  # of one parameter: a main copy and two moments in fp32


# --- the strategy --------------------------------------------------------------------------------------------


class SaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Stock's `torch_dist` strategy with our files: one for each rank, staged, written and fsynced natively.

    Under stock `dist_checkpointing.save` every file is durable under its name before `.metadata`, and that
    before `metadata.json`, which stays the marker of a complete checkpoint. With `async_sharded_save=True` the
    request goes into Megatron's `AsyncCallsQueue` (not its persistent worker: that one pickles the request):
    scheduling it returns when everything was copied.
    """

    def __init__(self, settings: Settings | None = None, **stock: Any) -> None:
        super().__init__("torch_dist", 1, **{"thread_count": 1, **stock})
        self.settings = settings or Settings()
        self._ticket: saver.Ticket | None = None

    @contextmanager
    def under(self, ticket: saver.Ticket) -> Iterator[None]:
        """Inside the block, what is saved is a part of `ticket`."""
        self._ticket = ticket
        try:
            yield
        finally:
            self._ticket = None

    def async_save(self, *args: Any, **kwargs: Any) -> AsyncRequest:
        if MultiStorageClientFeature.is_enabled():
            raise errors.UnsupportedError(
                "roll_ckpt does not support Megatron's multi-storage client in this version: the commit needs a "
                "directory of a file system; disable it"
            )
        with _without_results_process():
            return super().async_save(*args, **kwargs)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *rest: Any) -> AsyncRequest:
        """Stock's hook between planning and writing. `planned`: the writer, `.metadata`'s content on the
        coordinator, and the group that planned."""
        _, metadata, group = planned
        if self._ticket is not None:
            _stage(self._ticket, writer, metadata, group)
            return AsyncRequest(None, (), [])
        files = _Files(self.settings, writer, metadata, group)
        return AsyncRequest(_write, (None, None, None), [files.finish], {}, preload_fn=files.begin)


@dataclass
class _LaidOut:
    path: Path
    image: FileImage
    results: list[WriteResult]


def _lay_out(writer: Any) -> list[_LaidOut]:
    """One image for each file that stock code wants this rank to write; they now hold the tensors, not `writer`."""
    files = []
    for path, name, (objects, tensors) in writer.write_buckets or ():
        plan = [*objects, *tensors]
        image, spans = dcp.lay_out((item.index.fqn, _plain(value)) for item, value in plan)
        results = [
            WriteResult(item.index, span.length, _StorageInfo(name, span.offset, span.length))
            for (item, _), span in zip(plan, spans, strict=True)
        ]
        files.append(_LaidOut(Path(path), image, results))
    writer.write_buckets = None
    return files


def _plain(value: Any) -> torch.Tensor | bytes:
    """A planned item: a tensor, or what Megatron has pickled into a stream."""
    return value.detach() if isinstance(value, torch.Tensor) else bytes(value.getbuffer())


def _stage(ticket: saver.Ticket, writer: Any, metadata: Any, group: Any) -> None:
    """Stage this rank's files; the coordinator adds `.metadata`. Every rank calls, also one that has failed."""
    results: list[WriteResult] = []
    try:
        for file in _lay_out(writer):
            ticket.stage(file.path, file.image, overlap=False)
            results += file.results
    except Exception as problem:
        ticket.fail(problem)
    gathered = group.gather_object(results)
    if group.is_coordinator:
        writer.finish(metadata, gathered)
        ticket.adopt(Path(writer.path) / DCP_METADATA)


class _Files:
    """This rank's files of one save by stock code: written beside their names, then renamed.

    Between `begin` and `finish` stock code meets at a barrier: an error on one rank waits for `finish`.
    """

    def __init__(self, settings: Settings, writer: Any, metadata: Any, group: Any) -> None:
        self._settings = settings
        self._writer = writer
        self._metadata = metadata
        self._group = group
        self._results: list[WriteResult] = []
        self._moving: list[tuple[Path, Path, native.Transfer]] = []
        self._problem: Exception | None = None
        self._pid = os.getpid()

    def begin(self) -> _Files:
        """Copy everything, and start to write; returns when the tensors may change."""
        try:
            mover = arena.mover(self._settings)
            for file in _lay_out(self._writer):
                temporary = file.path.with_name(names.temporary_file(file.path.name))
                transfer = mover.save(temporary, saver.native_image(file.image), overlap=False)
                self._moving.append((temporary, file.path, transfer))
                self._results += file.results
        except Exception as problem:
            self._problem = problem
        return self

    def write(self) -> None:
        """Wait until the files are durable under their names. In a forked child, which has no threads of ours,
        it does nothing: `finish` comes back to it in the parent."""
        if os.getpid() != self._pid:
            return
        try:
            while self._moving and self._problem is None:
                temporary, path, transfer = self._moving[0]
                transfer.wait_written()
                disk.rename(temporary, path)
                disk.fsync_dir(path.parent)
                self._moving.pop(0)
        except Exception as problem:
            self._problem = problem
        for temporary, _, transfer in self._moving:
            transfer.abandon()
            disk.discard_file(temporary)
        self._moving.clear()

    def finish(self) -> None:
        """Every rank calls, on the training thread: `.metadata`, once all files of all ranks are durable.

        Raises:
            SaveFailed: on every rank, if it failed on any; the directory has no `metadata.json` then.
        """
        world = World.current()
        world.together(self._check, LONGEST_S)
        gathered = self._group.gather_object(self._results)

        def write_metadata() -> None:
            if self._group.is_coordinator:
                path = Path(self._writer.path)
                self._writer.finish(self._metadata, gathered)
                disk.fsync_file(path / DCP_METADATA)
                disk.fsync_dir(path)

        world.together(write_metadata, LONGEST_S)

    def _check(self) -> None:
        self.write()
        if self._problem is not None:
            raise self._problem


def _write(rank: object, files: _Files, unused: object) -> None:
    """What Megatron's queue runs, in a forked child or here."""
    files.write()


@contextmanager
def _without_results_process() -> Iterator[None]:
    """Stock code starts a manager process to collect results from writer processes; we have none of them."""
    stock = filesystem_async._results_queue
    filesystem_async._results_queue = stock or queue.SimpleQueue()
    try:
        yield
    finally:
        filesystem_async._results_queue = stock


# --- our own save and load -----------------------------------------------------------------------------------


def save(
    sharded_state_dict: dict[str, Any],
    directory: str | os.PathLike[str],
    *,
    step: int | None = None,
    settings: Settings | None = None,
    cluster: str = "model",
    content_metadata: dict[str, Any] | None = None,
    strategy: Any = None,
    save_latest: bool = True,
) -> saver.Save:
    """Save what `dist_checkpointing.save` would, as one transaction on `directory`; every rank calls.

    Returns when committed, or with `async_save` once everything is copied; then `wait()` of the result tells.
    `strategy` is a `SaveStrategy`, which may be wrapped for fully parallel saves; default a new one.

    Raises:
        UnsupportedError: a form of the optimizer that cannot be saved. As `saver.begin`, on every rank.
    """
    settings = settings or Settings()
    strategy = strategy or SaveStrategy(settings)
    check_form(content_metadata)
    path = Path(directory).absolute()
    world = World.current()
    request = saver.Request(path.parent, path.name, step, {cluster: world.size}, None, save_latest)
    nbytes, problem = 0, None
    try:
        names.check_name("tag", path.name)
        nbytes = estimate_bytes(sharded_state_dict)
    except Exception as found:
        problem = str(found)
    begun = saver.begin(world, request, settings, nbytes=nbytes, problem=problem, on_commit=_prune)
    with begun.staging():
        ticket = begun.ticket(cluster, describe(content_metadata))
        stage(ticket, begun.attempt.unit, sharded_state_dict, strategy, content_metadata)
    if not settings.async_save:
        saver.wait_together(world, begun, uploaded=True)
    return begun


def _prune(done: saver.Save) -> None:
    keep, output_dir = done.settings.max_ckpt_to_keep, done.attempt.output_dir
    if done.lead and keep:
        retention.prune(output_dir, saver.epoch_of(output_dir), keep=keep, protected=set())


def stage(
    ticket: saver.Ticket,
    directory: Path,
    sharded_state_dict: dict[str, Any],
    strategy: Any,
    content_metadata: dict[str, Any] | None = None,
) -> None:
    """Let stock `dist_checkpointing.save` write into `directory`, inside the attempt of `ticket`; every rank calls.

    Returns when everything is copied; not durable.
    """
    ours = getattr(strategy, "base_strategy", strategy)
    if not isinstance(ours, SaveStrategy):
        raise errors.ConfigError(f"strategy is {type(ours).__name__}; give a {SaveStrategy.__name__}, wrapped or not")
    disk.make_dirs(directory)
    with ours.under(ticket), _quiet_about_our_files():
        request = dist_checkpointing.save(
            sharded_state_dict,
            str(directory),
            strategy,
            async_sharded_save=True,
            content_metadata=dict(content_metadata) if content_metadata is not None else None,
        )
    for finalize in request.finalize_fns:  # stock's: the marker; it is in the vote like any file, and no marker yet
        finalize()
    if ticket.rank == 0:
        ticket.adopt(directory / COMMON)
        ticket.adopt(directory / MARKER)


@contextmanager
def _quiet_about_our_files() -> Iterator[None]:
    """Stock code warns of an old checkpoint in a directory with anything in it; the votes of this save are."""
    theirs = logging.getLogger("megatron.core.dist_checkpointing.serialization")

    def other(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Overwriting old")

    theirs.addFilter(other)
    try:
        yield
    finally:
        theirs.removeFilter(other)


def load(
    sharded_state_dict: dict[str, Any],
    directory: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    strategy: Any = None,
    check_names: bool = True,
    verified: bool = False,
) -> dict[str, Any]:
    """What `dist_checkpointing.load` returns, after every byte was verified; every rank calls.

    Checkpoints that stock wrote are loaded with a warning. `strategy` is a stock load strategy; `verified` says
    that the ranks have just read every byte.

    Raises:
        NotFound: there is no complete checkpoint in `directory`. Damaged: bytes differ. ModelMismatch: other
            names or shapes. On every rank, and before a tensor was read.
    """
    settings = settings or Settings()
    path, world = Path(directory).absolute(), World.current()
    saver.wait_pending()
    world.together(lambda: _check_complete(path), settings.commit_timeout_s)
    with loader.reading(path, settings) as reader:
        if reader.unit is not None and not verified:
            loader.check_bytes(world, reader.unit.directory)
        if check_names:
            world.together(lambda: _compare(sharded_state_dict, path), settings.commit_timeout_s)
        loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict, str(path), strategy)
        return loaded


def _check_complete(path: Path) -> None:
    for name in (MARKER, DCP_METADATA):
        if not disk.exists(path / name):
            raise errors.NotFound(
                f"{path}: no complete Megatron checkpoint: it has no {name}, which is written last; load another one"
            )


def _compare(sharded_state_dict: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint whose tensors are not those that this rank wants."""
    try:
        stored = TorchDistLoadShardedStrategy().load_tensors_metadata(path)
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as problem:
        raise errors.Damaged(
            f"{path / DCP_METADATA}: cannot be read, it is truncated or damaged: {problem}"
        ) from problem
    saved = {name: {"shape": list(tensor.global_shape)} for name, tensor in stored.items()}
    live = {tensor.key: {"shape": list(tensor.global_shape)} for tensor in _tensors(sharded_state_dict)}
    if live and not saved:
        raise errors.ModelMismatch(f"{path} holds no tensors")
    loader.compare_models({name: saved[name] for name in live if name in saved} or saved, live, str(path))


def _tensors(sharded_state_dict: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded_state_dict):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values({"": value.build()}) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


# --- what we read off a state --------------------------------------------------------------------------------


def check_form(content_metadata: Mapping[str, Any] | None) -> None:
    """Refuse forms of the distributed optimizer that cannot be saved or that were not tried.

    Raises:
        UnsupportedError: names the form and those to choose from.
    """
    form = (content_metadata or {}).get("distrib_optim_sharding_type")
    if form is not None and form not in RESHARDABLE:
        raise errors.UnsupportedError(
            f"roll_ckpt does not support distrib_optim_sharding_type {form!r}: Megatron cannot save it as whole "
            f"tensors, or it was not tried; choose one of {', '.join(sorted(RESHARDABLE))}"
        )


def content_metadata_of(form: str) -> dict[str, Any]:
    """What Megatron's `sharded_state_dict` functions are told, and what the checkpoint records of it."""
    return {
        "distrib_optim_sharding_type": form,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def parallel_layout() -> dict[str, int]:
    """Sizes of the parallel dimensions of this job."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def describe(content_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts for the manifest: framework, parallel sizes, form of the optimizer."""
    return {
        "framework": FRAMEWORK,
        "framework_version": megatron.core.__version__,
        "layout": parallel_layout(),
        "distrib_optim_sharding_type": (content_metadata or {}).get("distrib_optim_sharding_type"),
    }


def estimate_bytes(sharded_state_dict: dict[str, Any]) -> int:
    """About what this rank will write, in bytes; all ranks together write the sum."""
    return sum(
        value.data.numel() * value.data.element_size()
        for value in nested_values(sharded_state_dict)
        if isinstance(value, ShardedTensor | ShardedTensorFactory)
        and isinstance(value.data, torch.Tensor)
        and is_main_replica(value.replica_id)
    )


# --- a model with everything that resumes it -----------------------------------------------------------------


class Attached:
    """A Megatron model, its optimizer, scheduler and random states on this rank, to save and load as one.

    Made by `attach`. All methods are called by every rank.
    """

    framework = FRAMEWORK

    def __init__(
        self,
        model: Sequence[Any],
        optimizer: Any,
        scheduler: Any,
        settings: Settings,
        cluster: str,
        form: str,
        save_only_model: bool = False,
    ) -> None:
        self.model = list(model)
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.settings = settings
        self.cluster = cluster
        self.form = form
        self._save_only_model = save_only_model
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        self.strategy = FullyParallelSaveStrategyWrapper(SaveStrategy(settings), group)

    def estimate_bytes(self) -> int:
        """About what this rank will write, in bytes, without making the state."""
        parameters = [parameter for chunk in self.model for parameter in chunk.parameters()]
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if not self._save_only_model:
            nbytes += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _OPTIMIZER_BYTES
        return nbytes // parallel_layout()["dp"]

    def state(
        self, step: int = 0, *, form: str | None = None, loading: bool = False, with_rng: bool = True
    ) -> dict[str, Any]:
        """The sharded state of everything attached. `fully_reshardable` gathers the optimizer on data parallel
        rank 0 unless `loading`."""
        told = content_metadata_of(form or self.form)
        state: dict[str, Any] = {key: chunk.sharded_state_dict(metadata=told) for key, chunk in self._chunks().items()}
        if self._save_only_model:
            return state
        whole = dict(state) if len(self.model) > 1 else state["model"]
        state["optimizer"] = self.optimizer.sharded_state_dict(whole, is_loading=loading, metadata=told)
        state |= {"iteration": step, "checkpoint_version": 3.0}
        if self.scheduler is not None:
            state["opt_param_scheduler"] = self.scheduler.state_dict()
        if with_rng:
            state["rng_state"] = _rng_object()
        return state

    def save(self, directory: str | os.PathLike[str], step: int) -> saver.Save:
        """See `save` of this module."""
        return save(
            self.state(step),
            directory,
            step=step,
            settings=self.settings,
            cluster=self.cluster,
            content_metadata=content_metadata_of(self.form),
            strategy=self.strategy,
        )

    def load(self, directory: str | os.PathLike[str]) -> int:
        """Restore everything from `directory` and return its step; see `load` of this module.

        The random states come back where the parallel layout is the one that saved; elsewhere a warning says so.

        Raises:
            UnsupportedError: the optimizer was saved in a form that this layout cannot load. Nothing was read.
        """
        path = Path(directory).absolute()
        saver.wait_pending()
        World.current().together(lambda: _check_complete(path), self.settings.commit_timeout_s)
        step: int = self.restore(path, verified=False)["iteration"]
        return step

    def restore(self, path: Path, *, verified: bool) -> dict[str, Any]:
        """Load `path`, which is complete, and return the state that it held; see `load`."""
        saved = _recorded(path, self.cluster)
        self._check_layout(path, saved)
        told = saved or dist_checkpointing.load_content_metadata(str(path)) or {}
        check_form(told)
        with_rng = saved.get("layout") == parallel_layout()
        if not with_rng:
            log.warning("%s: saved by another parallel layout, or by stock code: random states are not restored", path)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        loaded = load(
            self.state(form=told.get("distrib_optim_sharding_type"), loading=True, with_rng=with_rng),
            path,
            settings=self.settings,
            cluster=self.cluster,
            strategy=FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),
            verified=verified,
        )
        for key, chunk in self._chunks().items():
            chunk.load_state_dict(loaded[key])
        with torch.no_grad():  # Megatron writes into views of parameters that require a gradient
            self.optimizer.load_state_dict(loaded["optimizer"])
        if self.scheduler is not None and "opt_param_scheduler" in loaded:
            self.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        if with_rng:
            _restore_rng(loaded["rng_state"])
        return loaded

    def check(self, path: Path) -> None:
        """Raise unless `path`, a checkpoint of ours, can be loaded here; nothing is loaded. No collective."""
        _check_complete(path)
        saved = _recorded(path, self.cluster)
        check_form(saved)
        self._check_layout(path, saved)
        told = content_metadata_of(self.form)
        _compare({key: chunk.sharded_state_dict(metadata=told) for key, chunk in self._chunks().items()}, path)

    def _chunks(self) -> dict[str, Any]:
        bare = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in self.model]
        return {"model": bare[0]} if len(bare) == 1 else {f"model{index}": chunk for index, chunk in enumerate(bare)}

    def _check_layout(self, path: Path, saved: Mapping[str, Any]) -> None:
        before, now = saved.get("layout"), parallel_layout()
        if before is None or saved.get("distrib_optim_sharding_type") != "dp_reshardable":
            return
        changed = [
            f"{key} {before.get(key)} to {now[key]}" for key in now if key != "dp" and before.get(key) != now[key]
        ]
        if changed:
            raise errors.UnsupportedError(
                f"{path}: its optimizer was saved as dp_reshardable, which loads {RESHARDABLE['dp_reshardable']} and "
                f"in no other layout; this job changes {', '.join(changed)}. Start it as it was saved, and save with "
                "fully_reshardable to change the layout"
            )


def attach(
    model: Any,
    optimizer: Any,
    scheduler: Any = None,
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    form: str = "dp_reshardable",
    save_only_model: bool = False,
) -> Attached:
    """Bind a model (a module, or the list of its virtual pipeline stages), its optimizer and scheduler.

    `form` is Megatron's `distrib_optim_sharding_type`, see `RESHARDABLE`; with `save_only_model` the weights alone
    are saved. Every optimizer step fences the saves that are pending. No collective.

    Raises:
        UnsupportedError: Megatron's FSDP, `overlap_param_gather`, or a form that cannot be saved.
    """
    names.check_name("cluster", cluster)
    check_form({"distrib_optim_sharding_type": form})
    chunks = list(model) if isinstance(model, list | tuple) else [model]
    for chunk in chunks:
        config = getattr(chunk, "ddp_config", None)
        if getattr(config, "use_megatron_fsdp", False):
            raise errors.UnsupportedError(
                "roll_ckpt does not support Megatron's FSDP in this version: it was not tried"
            )
        if getattr(config, "overlap_param_gather", False):
            raise errors.UnsupportedError(
                "roll_ckpt does not support overlap_param_gather in this version: parameters are old after the "
                "optimizer step until the next forward pass gathers them; turn it off"
            )
    _fence_at_step(optimizer)
    return Attached(chunks, optimizer, scheduler, settings or Settings(), cluster, form, save_only_model)


# --- a cluster of a pipeline ---------------------------------------------------------------------------------


class Model:
    """What `attach` bound, as a cluster of a pipeline: see `cluster.Backend`."""

    framework = FRAMEWORK

    def __init__(self, attached: Attached) -> None:
        self.world = World.current()
        self._attached = attached

    def prepare(self) -> int:
        return self._attached.estimate_bytes()

    def fence(self) -> None:
        saver.fence()

    def stage(self, save: saver.Save, directory: Path, client_state: Mapping[str, Any]) -> saver.Ticket:
        ours = self._attached
        told = content_metadata_of(ours.form)
        ticket = save.ticket(ours.cluster, describe(told))
        state = {**ours.state(save.attempt.step or 0), _CLIENT_STATE: dict(client_state)}
        stage(ticket, directory, state, ours.strategy, told)
        return ticket

    def check(self, opened: loader.Unit, where: str) -> None:
        self._attached.check(opened.directory / self._attached.cluster)

    def load(self, unit: Path, name: str) -> Mapping[str, Any]:
        loaded = self._attached.restore(unit / self._attached.cluster, verified=True)
        client_state: Mapping[str, Any] = loaded.get(_CLIENT_STATE, {})
        return client_state


def _fence_at_step(optimizer: Any) -> None:
    stock: Callable[..., Any] = optimizer.step
    if hasattr(stock, "__wrapped__"):
        return

    @functools.wraps(stock)
    def step(*args: Any, **kwargs: Any) -> Any:
        saver.fence()
        return stock(*args, **kwargs)

    optimizer.step = step


def _recorded(path: Path, cluster: str) -> Mapping[str, Any]:
    """The facts that the manifest holds of a cluster; nothing for a checkpoint that stock wrote."""
    unit = loader.Unit.around(path)
    if unit is None:
        return {}
    clusters = unit.manifest.clusters
    return clusters[cluster if cluster in clusters else next(iter(clusters))]


def _rng_object() -> ShardedObject:
    """Every random state of this rank, under the rank's place in the layout."""
    state = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject(_RNG, state, (size,), (rank,), replica_id=0)


def _restore_rng(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
