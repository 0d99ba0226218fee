"""The Megatron-core backend: what `dist_checkpointing` saves goes through us, and stays what stock reads.

`SaveStrategy` is given to `dist_checkpointing.save(sharded_strategy=...)`, alone or inside Megatron's
`FullyParallelSaveStrategyWrapper`: stock code still plans who writes which shard, we move the bytes. `save` and
`load` are the same under the commit: the directory appears under its name when every rank has voted.
`attach` returns both for a model with its distributed optimizer, scheduler and random states.

Written against Megatron-core 0.16.1 (`dist_checkpointing/serialization.py`, `strategies/torch.py`). A version that
lacks what this module takes hold of is refused when the module is imported, with `UnsupportedError`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import json
import logging
import math
import os
import pickle
import queue
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import arena, commit, disk, errors, loader, names, native, retention, saver, seal
from roll_ckpt.config import Settings
from roll_ckpt.image import FileImage
from roll_ckpt.layout import dcp, dcp_index, torch_zip
from roll_ckpt.world import LONGEST_S, World

TESTED_WITH = "0.16.1"

try:
    import megatron.core
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.core import CheckpointingConfig
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
        is_main_replica,
    )
    from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY as CONTENT_METADATA
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelLoadStrategyWrapper,
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.dist_checkpointing.strategies.torch import (
        TorchDistLoadShardedStrategy,
        TorchDistSaveShardedStrategy,
    )
    from megatron.core.dist_checkpointing.utils import (
        _clean_metadata_for_serialization,
        extract_nonpersistent,
        extract_sharded_base,
    )
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.msc_utils import MultiStorageClientFeature
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
except ImportError as problem:
    raise errors.UnsupportedError(
        f"this Megatron-core is not one that roll_ckpt knows, or there is none: {problem}; "
        f"pip install megatron-core=={TESTED_WITH}"
    ) from problem

log = logging.getLogger("roll_ckpt")

COMMON, DCP_METADATA, MARKER = "common.pt", ".metadata", "metadata.json"
"""What a checkpoint has beside the `.distcp` files; in a save by stock code the marker comes last."""

_MARKER = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()

RESHARDABLE = {
    "dp_reshardable": "on any number of data parallel ranks",
    "fully_reshardable": "in any layout",
}
"""Forms of the distributed optimizer that can be saved, and where they can be loaded."""

FRAMEWORK = "megatron-core"
_RNG = "roll_ckpt.rng"
_CLIENT_STATE = "roll_ckpt.client_state"
_OPTIMIZER_BYTES = 12  # of one parameter: a main copy and two moments in fp32


# --- the version of Megatron-core ----------------------------------------------------------------------------


def _check_megatron() -> None:
    """Refuse a Megatron-core without what this module takes hold of, beside the names imported above.

    Raises:
        UnsupportedError: names what is missing.
    """
    strategy, wrapper = TorchDistSaveShardedStrategy, FullyParallelSaveStrategyWrapper
    writer = filesystem_async.FileSystemWriterAsync
    has = {
        "TorchDistSaveShardedStrategy._get_save_and_finalize_callbacks": hasattr(
            strategy, "_get_save_and_finalize_callbacks"
        ),
        "TorchDistSaveShardedStrategy.async_save(sharded_state_dict, checkpoint_dir)": list(
            inspect.signature(strategy.async_save).parameters
        )
        == ["self", "sharded_state_dict", "checkpoint_dir"],
        "TorchDistSaveShardedStrategy.use_cached_ckpt_structure": _sets(strategy, "use_cached_ckpt_structure"),
        "FullyParallelSaveStrategyWrapper.base_strategy": _sets(wrapper, "base_strategy"),
        "FullyParallelSaveStrategyWrapper.cached_distribution": _sets(wrapper, "cached_distribution"),
        "FileSystemWriterAsync.write_buckets": _sets(writer, "write_buckets"),
        "filesystem_async._results_queue": hasattr(filesystem_async, "_results_queue"),
        "AsyncRequest.preload_fn": "preload_fn" in AsyncRequest._fields,
        "dist_checkpointing.load_content_metadata": hasattr(dist_checkpointing, "load_content_metadata"),
    }
    missing = [name for name, there in has.items() if not there]
    if missing:
        raise errors.UnsupportedError(
            f"Megatron-core {megatron.core.__version__} has no {', '.join(missing)}, which roll_ckpt relies on; "
            f"pip install megatron-core=={TESTED_WITH}"
        )
    if megatron.core.__version__ != TESTED_WITH:
        log.warning("Megatron-core %s: roll_ckpt was tested with %s", megatron.core.__version__, TESTED_WITH)


def _sets(kind: type, attribute: str) -> bool:
    """Whether a method of `kind` itself gives a value to the attribute."""
    methods = (inspect.unwrap(member) for member in vars(kind).values() if inspect.isfunction(member))
    return any(
        step.opname == "STORE_ATTR" and step.argval == attribute
        for method in methods
        for step in dis.get_instructions(method)
    )


_check_megatron()


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
        self.use_cached_ckpt_structure: bool
        self.plan: Plan | None = None
        """What the last save under our commit planned, if this rank could lay it out."""
        self._planned: list[Any] | None = None
        self._warned: set[str] = set()

    def warn_unloadable(self, common: dict[str, Any], image: FileImage, directory: Path, settings: Settings) -> None:
        """Warn, once, of each entry of the common state, laid out as `image`, that a safe load would refuse."""
        for key, found in torch_zip.unsafe_parts(common, image, loader.allowed(settings)).items():
            if key not in self._warned:
                self._warned.add(key)
                log.warning(
                    "%s: the entry %r holds %s, which a safe load refuses; keep plain values and tensors in it, or "
                    "add these names to load.allow",
                    directory / COMMON,
                    key,
                    ", ".join(found),
                )

    def planned_by_stock(self, outer: Any, sharded: dict[str, Any], directory: Path) -> tuple[Any, Any, Any]:
        """Who writes what, as stock code plans it: its writer, `.metadata`'s content on the coordinator, and the
        group that planned. `outer` is this strategy or what wraps it. Every rank calls; writes nothing, but makes
        `directory` if it is missing.

        Stock's own caches are left out: they trust that the structure never changes.
        """
        kept, self.use_cached_ckpt_structure = self.use_cached_ckpt_structure, False
        if isinstance(outer, FullyParallelSaveStrategyWrapper):
            outer.cached_distribution = None
        self._planned = []
        try:
            outer.async_save(sharded, directory)
            writer, metadata, group = self._planned
        finally:
            self._planned = None
            self.use_cached_ckpt_structure = kept
        return writer, metadata, group

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
        if self._planned is not None:
            self._planned += [writer, metadata, group]
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
    strategy = strategy or SaveStrategy(settings)
    check_form(content_metadata)
    _strategy_of(strategy)

    def stage_it(ticket: saver.Ticket, directory: Path, prepared: Prepared) -> None:
        stage(ticket, directory, sharded_state_dict, strategy, content_metadata, prepared=prepared)

    return _transact(
        lambda: prepare(sharded_state_dict, strategy, content_metadata),
        stage_it,
        Path(directory).absolute(),
        step=step,
        settings=settings or Settings(),
        cluster=cluster,
        facts=lambda: describe(content_metadata),
        save_latest=save_latest,
    )


def _transact(
    prepare_it: Callable[[], Prepared],
    stage_it: Callable[[saver.Ticket, Path, Prepared], None],
    path: Path,
    *,
    step: int | None,
    settings: Settings,
    cluster: str,
    facts: Callable[[], dict[str, Any]],
    save_latest: bool,
) -> saver.Save:
    """Prepare, begin, stage, commit. What `prepare_it` raises on one rank is raised on all."""
    world = World.current()
    request = saver.Request(path.parent, path.name, step, {cluster: world.size}, None, save_latest)
    prepared: Prepared | None = None
    problem = None
    try:
        names.check_name("tag", path.name)
        prepared = prepare_it()
    except errors.RollCkptError as found:
        problem = str(found)
    except Exception as found:
        problem = f"{type(found).__name__}: {found}"
    begun = saver.begin(
        world,
        request,
        settings,
        nbytes=prepared.nbytes if prepared else 0,
        problem=problem,
        plans={cluster: prepared.plan if prepared else None},
        on_commit=_prune,
    )
    assert prepared is not None, "a rank with a problem does not begin"
    with begun.staging():
        stage_it(begun.ticket(cluster, facts()), begun.attempt.unit, prepared)
    if not settings.async_save:
        saver.wait_together(world, begun, uploaded=True)
    return begun


def _prune(done: saver.Save) -> None:
    keep, output_dir = done.settings.max_ckpt_to_keep, done.attempt.output_dir
    if done.lead and keep:
        retention.prune(output_dir, saver.epoch_of(output_dir), keep=keep, protected=set())


@dataclass(frozen=True)
class Prepared:
    """A state taken apart for one save, on this rank; made by `prepare`."""

    state: dict[str, Any]
    common: dict[str, Any]
    parts: list[Any]
    """Its `ShardedTensor`s and `ShardedObject`s, in the order of the state."""
    structure: list[Any]
    nbytes: int
    objects: list[FileImage]
    """What `plan` wants pickled, in its order."""
    plan: str | None
    """Names the plan of an earlier save that fits, for `saver.begin`; None: this rank needs a new one."""


def prepare(
    sharded_state_dict: dict[str, Any], strategy: Any, content_metadata: Mapping[str, Any] | None = None
) -> Prepared:
    """Take a state apart and look whether the last plan of `strategy` fits it. No collective.

    Objects are pickled now. As in stock's save, factories in `sharded_state_dict` are built in place.

    Raises:
        ConfigError: not a strategy of ours.
    """
    plan = _strategy_of(strategy).plan
    if content_metadata is not None:
        sharded_state_dict[CONTENT_METADATA] = dict(content_metadata)
    apply_factories(sharded_state_dict)
    _, persistent = extract_nonpersistent(sharded_state_dict)
    sharded, common = extract_sharded_base(persistent)
    if CONTENT_METADATA in common:
        common[CONTENT_METADATA] = _clean_metadata_for_serialization(common[CONTENT_METADATA])
    parts = list(nested_values(sharded))
    structure = [_structure_of(part) for part in parts]
    objects: list[FileImage] = []
    fits = plan is not None and plan.structure == structure
    if plan is not None and fits:
        objects = plan.pickled(parts)
        fits = all(image.nbytes <= slot.length for image, slot in zip(objects, plan.slots, strict=True))
    name = plan.name if plan is not None and fits else None
    nbytes = sum(_main_bytes(part) for part in parts)
    return Prepared(sharded_state_dict, common, parts, structure, nbytes, objects, name)


def stage(
    ticket: saver.Ticket,
    directory: Path,
    sharded_state_dict: dict[str, Any],
    strategy: Any,
    content_metadata: Mapping[str, Any] | None = None,
    *,
    prepared: Prepared | None = None,
    stable: torch_zip.Stable = lambda storage: False,
) -> None:
    """Stage what stock `dist_checkpointing.save` would write into `directory`, inside the attempt of `ticket`;
    every rank calls.

    Returns when everything but the `stable` storages is copied; not durable. The strategy's last plan is used again
    where it fits on every rank: `saver.begin` knows, from the `plan` of what `prepare` returned; without `prepared`
    there is a rendezvous here. Otherwise stock code plans, with collectives of its own. An error becomes this rank's
    no vote, so that no rank waits for it in a collective.
    """
    ours = _strategy_of(strategy)
    replay = ticket.cluster in ticket.save.replays
    if prepared is None:
        prepared, replay = _prepare_together(ticket, sharded_state_dict, strategy, content_metadata)
    try:
        disk.make_dirs(directory)
    except Exception as problem:
        ticket.fail(problem)  # but plan with the others: they would wait for this rank
    try:
        if not replay:
            _plan_together(ticket, prepared, strategy)
        if ours.plan is None or ticket.error is not None:
            return  # this rank has voted no
        objects = prepared.objects if replay else ours.plan.pickled(prepared.parts)
        _stage_planned(ticket, directory, ours, ours.plan, prepared, objects, stable)
    except Exception as problem:
        ticket.fail(problem)


def _strategy_of(strategy: Any) -> SaveStrategy:
    ours = getattr(strategy, "base_strategy", strategy)
    if not isinstance(ours, SaveStrategy):
        raise errors.ConfigError(f"strategy is {type(ours).__name__}; give a {SaveStrategy.__name__}, wrapped or not")
    return ours


def _prepare_together(
    ticket: saver.Ticket, state: dict[str, Any], strategy: Any, content_metadata: Mapping[str, Any] | None
) -> tuple[Prepared, bool]:
    """`prepare`, and whether every rank names the same plan; one rendezvous."""
    mine: dict[str, Any] = {"plan": None, "problem": None}
    prepared: Prepared | None = None
    try:
        prepared = prepare(state, strategy, content_metadata)
        mine["plan"] = prepared.plan
    except Exception as found:
        mine["problem"] = f"{type(found).__name__}: {found}"

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [f"rank {rank}: {post['problem']}" for rank, post in enumerate(posts) if post["problem"]]
        if problems:
            raise errors.SaveFailed(f"{ticket.save.attempt.label}: {ticket.cluster}: " + "; ".join(problems))
        plan = posts[0]["plan"]
        return {"replay": plan is not None and all(post["plan"] == plan for post in posts)}

    verdict = World.current().agree(mine, decide, ticket.save.settings.commit_timeout_s)
    assert prepared is not None, "a rank with a problem has none of this"
    return prepared, verdict["replay"]


def _stage_planned(
    ticket: saver.Ticket,
    directory: Path,
    strategy: SaveStrategy,
    plan: Plan,
    prepared: Prepared,
    objects: Sequence[FileImage],
    stable: torch_zip.Stable,
) -> None:
    """Every file of this rank, by the plan. Small ones go first: their bytes need not wait behind large copies."""
    if ticket.rank == 0:
        small = {
            COMMON: torch_zip.lay_out(prepared.common, Path(COMMON).stem),
            DCP_METADATA: FileImage.of_bytes(plan.metadata),
            MARKER: FileImage.of_bytes(_MARKER),
        }
        strategy.warn_unloadable(prepared.common, small[COMMON], directory, ticket.save.settings)
        for name, image in small.items():
            ticket.stage(directory / name, image, overlap=False)
    rest = iter(objects)
    for file in plan.files:
        ticket.stage(directory / file.name, file.image(prepared.parts, rest, stable), overlap=True)


# --- the plan ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedFile:
    """A file of this rank: a form that tensors fill, and behind it a slot for each pickled object.

    Numbers are places in `Prepared.parts`.
    """

    name: str
    form: dcp.Form
    tensors: tuple[int, ...]
    objects: tuple[tuple[int, ...], ...]
    slots: tuple[dcp.Span, ...]

    def image(self, parts: Sequence[Any], objects: Iterator[FileImage], stable: torch_zip.Stable) -> FileImage:
        """The file as it is to be written now; takes its share of `objects`."""
        tensors = self.form.fill((parts[at].data for at in self.tensors), stable)
        slotted = [(slot, next(objects)) for slot in self.slots]
        return dcp.join([(dcp.Span(0, tensors.nbytes), tensors), *slotted])


@dataclass(frozen=True)
class Plan:
    """Who writes what, as stock code planned it, for every later save of the same structure.

    Each rank holds its own share; all made it in the same save, whose name it bears. Holds no tensor.
    """

    name: str
    structure: list[Any]
    files: tuple[PlannedFile, ...]
    metadata: bytes
    """The bytes of `.metadata`, on the coordinator."""

    @property
    def slots(self) -> list[dcp.Span]:
        return [slot for file in self.files for slot in file.slots]

    def pickled(self, parts: Sequence[Any]) -> list[FileImage]:
        """What goes into the slots now; larger than its slot where it has grown too much."""
        return [
            _pickled([parts[at] for at in places], slot.length)
            for file in self.files
            for places, slot in zip(file.objects, file.slots, strict=True)
        ]


def _structure_of(part: Any) -> tuple[Any, ...]:
    """Everything about a part of a state that the plan and the layout of its tensor follow from."""
    if isinstance(part, ShardedObject):
        return part.key, part.global_shape, part.global_offset, part.replica_id
    return (
        *(part.key, part.dtype, part.local_shape, part.global_shape, part.global_offset, part.replica_id),
        *(part.axis_fragmentations, part.prepend_axis_num, part.allow_shape_mismatch),
        *(type(part.data), None if part.data is None else part.data.device),
    )


def _main_bytes(part: Any) -> int:
    """About what the ranks together write of a part, counted on the rank that Megatron calls its main replica."""
    if not isinstance(part, ShardedTensor) or not is_main_replica(part.replica_id):
        return 0
    nbytes: int = math.prod(part.local_shape) * part.dtype.itemsize
    return nbytes


def _pickled(parts: Sequence[Any], at_least: int = 0) -> FileImage:
    """One item as an archive of its own: a list of objects, as Megatron has them, or a tensor of a class of its own."""
    tensor = isinstance(parts[0], ShardedTensor)
    value = parts[0].data.detach() if tensor else [part.data for part in parts]
    return replace(torch_zip.lay_out(value, dcp.ARCHIVE, at_least=at_least), pieces=())


def _slot_bytes(nbytes: int) -> int:
    """Room for a pickled object, so that it may grow a little before the ranks have to plan again."""
    return (nbytes + nbytes // 4 + 1024) // 64 * 64


def _plan_together(ticket: saver.Ticket, prepared: Prepared, strategy: Any) -> None:
    """Let stock code plan, and keep what it planned; every rank calls, also one that cannot lay its part out: it
    votes no and has no plan then.

    Raises:
        SaveFailed: on every rank, if stock code finds the state invalid, which it says on rank 0 alone.
    """
    ours, attempt = _strategy_of(strategy), ticket.save.attempt
    ours.plan = None
    sharded: dict[str, Any] = {}
    World.current().together(
        lambda: sharded.update(save_preprocess(prepared.state)[0]), ticket.save.settings.commit_timeout_s
    )
    # Planned for a directory that is there: stock code would make the attempt's again after it was thrown away.
    writer, metadata, group = ours.planned_by_stock(strategy, sharded, attempt.output_dir)
    files: list[PlannedFile] = []
    results: list[WriteResult] = []
    problem = None
    try:
        for _, name, (objects, tensors) in writer.write_buckets or ():
            file, found = _plan_file(name, [item for item, _ in (*objects, *tensors)], prepared.parts)
            files.append(file)
            results += found
    except Exception as found_problem:
        problem = found_problem
    writer.write_buckets = None
    gathered = group.gather_object(results)
    try:
        if problem is not None:
            raise problem
        written = _dcp_metadata(metadata, gathered) if group.is_coordinator else b""
        ours.plan = Plan(str(attempt.unit), prepared.structure, tuple(files), written)
    except Exception as found_problem:
        ticket.fail(found_problem)


def _plan_file(name: str, items: Sequence[Any], parts: Sequence[Any]) -> tuple[PlannedFile, list[WriteResult]]:
    """Lay out what stock code wants in one file. Items are told apart by key, and by offset where one rank writes
    several pieces of a tensor."""
    places: dict[tuple[str, Any], list[int]] = {}
    for at, part in enumerate(parts):
        if is_main_replica(part.replica_id):  # as the distribution has left it
            if isinstance(part, ShardedObject):
                places.setdefault((part.unique_key, None), []).append(at)
            else:
                places.setdefault((part.key, tuple(part.global_offset)), []).append(at)
    tensors: list[tuple[Any, int]] = []
    objects: list[tuple[Any, tuple[int, ...]]] = []
    for item in items:
        offset = None if item.type is WriteItemType.BYTE_IO else tuple(item.index.offset or ())
        found = places[item.index.fqn, offset]
        if offset is not None and torch_zip.is_plain(parts[found[0]].data.detach()):
            tensors.append((item, found[0]))
        else:
            objects.append((item, tuple(found)))
    form, spans = dcp.form((item.index.fqn, _shaped(parts[at])) for item, at in tensors)
    slots: list[dcp.Span] = []
    end = form.image.nbytes
    for _, group in objects:
        slots.append(dcp.place(end, _slot_bytes(_pickled([parts[at] for at in group]).nbytes)))
        end = slots[-1].end
    file = PlannedFile(name, form, tuple(at for _, at in tensors), tuple(found for _, found in objects), tuple(slots))
    planned = [item for item, _ in (*tensors, *objects)]
    results = [
        WriteResult(item.index, span.length, _StorageInfo(name, span.offset, span.length))
        for item, span in zip(planned, (*spans, *slots), strict=True)
    ]
    return file, results


def _shaped(part: Any) -> torch.Tensor:
    """The tensor as stock code stores it: with the axes that the global shape has before it."""
    data: torch.Tensor = part.data.detach().contiguous()
    return data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))


def _dcp_metadata(metadata: Any, gathered: Sequence[Sequence[WriteResult]]) -> bytes:
    """What stock's writer puts into `.metadata`, less the path and the name of one save."""
    metadata.version = getattr(dcp_filesystem, "CURRENT_DCP_VERSION", None)
    metadata.storage_data = {result.index: result.storage_data for results in gathered for result in results}
    metadata.storage_meta = StorageMeta()
    return pickle.dumps(metadata)


# --- load ----------------------------------------------------------------------------------------------------


def load(
    sharded_state_dict: dict[str, Any],
    directory: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    strategy: Any = None,
    verified: bool = False,
) -> dict[str, Any]:
    """What `dist_checkpointing.load` returns, after every byte was verified; every rank calls.

    Checkpoints that stock wrote are loaded with a warning. `strategy` is a stock load strategy; `verified` says
    that the ranks have just read every byte.

    Raises:
        NotFound: there is no complete checkpoint in `directory`. Damaged: bytes differ. ModelMismatch: other
            names or shapes. UnsupportedError: stock wrote it with another backend than torch_dist. On every rank,
            and before a tensor was read.
    """
    settings = settings or Settings()
    path, world = Path(directory).absolute(), World.current()
    saver.wait_pending()
    world.together(lambda: _check_complete(path), settings.commit_timeout_s)
    _agree_on_manifest(world, path, settings)
    with loader.reading(path, settings) as reader:
        if reader.unit is not None and not verified:
            loader.check_bytes(world, reader.unit.directory)
        if reader.unit is None:
            world.together(lambda: _told_by_stock(path, settings), settings.commit_timeout_s)
        world.together(lambda: _check_content(sharded_state_dict, path, settings, world), LONGEST_S)
        with torch.serialization.safe_globals(loader.allowed(settings)):
            loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict, str(path), strategy)
        return loaded


def _agree_on_manifest(world: World, path: Path, settings: Settings) -> None:
    """Refuse on every rank a checkpoint whose ranks see different manifests: one would verify what others trust."""
    mine: dict[str, Any] = {"manifest": None}

    def look() -> None:
        unit = loader.Unit.around(path)
        if unit is not None:
            mine["manifest"] = seal.sha256(disk.read_bytes(unit.directory / names.MANIFEST))

    world.together(look, settings.commit_timeout_s)

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        others = [str(rank) for rank, post in enumerate(posts) if post != posts[0]]
        if others:
            raise errors.RanksDisagree(
                f"{path}: rank {', '.join(others)} and rank 0 see different manifests, or none; nothing was loaded. "
                "Give every rank the same directory"
            )
        return {}

    world.agree(mine, decide, settings.commit_timeout_s)


def _check_complete(path: Path) -> None:
    for name in (MARKER, DCP_METADATA, COMMON):
        if not disk.exists(path / name):
            later = " (Megatron-core later than 0.16 writes none, and 0.16 cannot read it)" if name == COMMON else ""
            raise errors.NotFound(f"{path}: no complete Megatron checkpoint: it has no {name}{later}; load another one")


def _told_by_stock(path: Path, settings: Settings) -> dict[str, Any]:
    """The content metadata of a checkpoint that has no manifest.

    Raises:
        UnsupportedError: another backend wrote it. Damaged: the marker or the common state cannot be read, or a safe
            load refuses it.
    """
    try:
        marker = json.loads(disk.read_bytes(path / MARKER))
    except ValueError as problem:
        raise errors.Damaged(f"{path / MARKER}: cannot be read, it is truncated or damaged: {problem}") from problem
    if marker != json.loads(_MARKER):
        raise errors.UnsupportedError(
            f"{path / MARKER}: {marker} wrote this checkpoint; roll_ckpt loads what torch_dist, version 1, wrote. "
            "Load it with Megatron, and save it again as torch_dist"
        )
    allowed = loader.allowed(settings)
    dcp_index.check_file(path / COMMON, allowed)
    with torch.serialization.safe_globals(allowed):
        return dist_checkpointing.load_content_metadata(str(path)) or {}


def _check_content(sharded_state_dict: dict[str, Any], path: Path, settings: Settings, world: World) -> None:
    """Refuse what stock code would unpickle without restriction, or stumble over (the index, the common state, and
    this rank's share of the objects), and tensors that are not those that this rank wants. No collective."""
    allowed = loader.allowed(settings)
    index = dcp_index.read(path, [kind for kind in allowed if isinstance(kind, type)])
    dcp_index.check_file(path / COMMON, allowed)
    _compare(sharded_state_dict, path, index)
    dcp_index.check_objects(path, index, allowed, part=world.rank, parts=world.size)


def _compare(sharded_state_dict: dict[str, Any], path: Path, index: Metadata) -> None:
    stored = index.state_dict_metadata.items()
    saved = {name: {"shape": list(kind.size)} for name, kind in stored if isinstance(kind, TensorStorageMetadata)}
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
        self._fence = Fence.of(optimizer, self.model)

    def estimate_bytes(self) -> int:
        """About what this rank will write, in bytes, without making the state."""
        parameters = [parameter for chunk in self.model for parameter in chunk.parameters()]
        nbytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        if not self._save_only_model:
            nbytes += sum(parameter.numel() for parameter in parameters if parameter.requires_grad) * _OPTIMIZER_BYTES
        return int(nbytes // parallel_layout()["dp"])

    def state(
        self, step: int = 0, *, form: str | None = None, loading: bool = False, with_rng: bool = True
    ) -> dict[str, Any]:
        """The sharded state of everything attached. Unless `loading`, `fully_reshardable` gathers the optimizer on
        data parallel rank 0, and parameters whose gather is overlapped with the forward pass are gathered.

        Raises:
            SaveFailed: the optimizer has made no step yet; on every rank where a collective would follow.
        """
        told = content_metadata_of(form or self.form)
        if not loading:
            self._ready_to_save()
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
        """See `save` of this module. With `async_save` it returns while what only the optimizer's step changes is
        still being copied; the step waits for that.

        Raises:
            SaveFailed: also of an earlier save, if `fail_training` is set.
        """
        self.fence()
        told = content_metadata_of(self.form)
        return _transact(
            lambda: self.prepare(self.state(step)),
            lambda ticket, unit, prepared: self.stage(ticket, unit, prepared.state, prepared),
            Path(directory).absolute(),
            step=step,
            settings=self.settings,
            cluster=self.cluster,
            facts=lambda: describe(told),
            save_latest=True,
        )

    @property
    def alone(self) -> bool:
        """Whether a rank makes its state without the others: nothing is gathered for it."""
        return self.form != "fully_reshardable" and not any(_gathers_late(chunk) for chunk in self.model)

    def prepare(self, state: dict[str, Any]) -> Prepared:
        """`prepare` of this module for `state` of this model."""
        return prepare(state, self.strategy, content_metadata_of(self.form))

    def stage(
        self, ticket: saver.Ticket, directory: Path, state: dict[str, Any], prepared: Prepared | None = None
    ) -> None:
        """`stage` of this module for `state` of this model, copied under training; `fence` ends that."""
        self._fence.add(ticket.save)
        stable = stable_storages(self.model, self.optimizer) if self.settings.staging.overlap else frozenset()
        stage(
            ticket,
            directory,
            state,
            self.strategy,
            content_metadata_of(self.form),
            prepared=prepared,
            stable=lambda storage: storage._cdata in stable,
        )

    def fence(self) -> None:
        """Wait until no save reads this model's tensors any more; not for the disk.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        self._fence.wait()

    def _ready_to_save(self) -> None:
        if not self._save_only_model:
            if self.alone:
                self._check_stepped()
            else:  # a rank that stays away from a gather would leave the others in it
                World.current().together(self._check_stepped, self.settings.commit_timeout_s)
        for chunk in self.model:
            if _gathers_late(chunk):
                chunk.start_param_sync(force_sync=True)

    def _check_stepped(self) -> None:
        for part in _distributed(self.optimizer):
            inner = part.optimizer
            if any(not inner.state.get(parameter) for group in inner.param_groups for parameter in group["params"]):
                raise errors.SaveFailed(
                    f"cluster {self.cluster}: the optimizer has made no step yet (or has skipped them all), it has "
                    f"no moments, and Megatron can neither gather it nor load it back from {self.form}; save after "
                    "the first step"
                )

    def find(self, output_dir: str | os.PathLike[str]) -> Path | None:
        """The newest complete checkpoint in `output_dir`, the same on every rank; None if there is none. What a killed
        run left there is finished or discarded first."""
        path, world = Path(output_dir).absolute(), World.current()
        saver.wait_pending()

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            saver.recover(path, self.settings, {self.cluster: world.size})
            newest = commit.find(path)
            return {"name": None if newest is None else newest.name}

        name = world.agree({}, decide, self.settings.commit_timeout_s)["name"]
        return None if name is None else path / name

    def load(self, directory: str | os.PathLike[str]) -> int:
        """Restore everything from `directory` and return its step; see `load` of this module.

        The random states come back where the parallel layout is the one that saved; elsewhere a warning says so.

        Raises:
            UnsupportedError: the optimizer was saved in a form that this layout cannot load, or `save_only_model` is
                set. Nothing was read.
        """
        path = Path(directory).absolute()
        self.fence()
        saver.wait_pending()
        World.current().together(lambda: _check_complete(path), self.settings.commit_timeout_s)
        step: int = self.restore(path, verified=False)["iteration"]
        return step

    def restore(self, path: Path, *, verified: bool) -> dict[str, Any]:
        """Load `path`, which is complete, and return the state that it held; see `load`."""
        self._check_resumes(path)
        _agree_on_manifest(World.current(), path, self.settings)
        saved = _recorded(path, self.cluster)
        self._check_layout(path, saved)
        told = dict(saved)
        if not saved:
            World.current().together(
                lambda: told.update(_told_by_stock(path, self.settings)), self.settings.commit_timeout_s
            )
        check_form(told)
        form = told.get("distrib_optim_sharding_type")
        with_rng = saved.get("layout") == parallel_layout()
        if not with_rng:
            log.warning("%s: saved by another parallel layout, or by stock code: random states are not restored", path)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        try:
            loaded = load(
                self.state(form=form, loading=True, with_rng=with_rng),
                path,
                settings=self.settings,
                cluster=self.cluster,
                strategy=FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), group),
                verified=verified,
            )
        except errors.ModelMismatch as problem:
            if saved or form != "dp_reshardable":
                raise
            raise errors.ModelMismatch(
                f"{problem}\nOr another layout: stock code saved its optimizer as dp_reshardable, which loads "
                f"{RESHARDABLE[form]} and in no other layout, and does not note the layout"
            ) from None
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
        """Raise unless `path`, a checkpoint of ours, can be loaded here; nothing is loaded. No collective: a rank
        looks at its share of the pickled objects."""
        self._check_resumes(path)
        _check_complete(path)
        saved = _recorded(path, self.cluster)
        check_form(saved)
        self._check_layout(path, saved)
        told = content_metadata_of(self.form)
        parameters = {key: chunk.sharded_state_dict(metadata=told) for key, chunk in self._chunks().items()}
        _check_content(parameters, path, self.settings, World.current())

    def _check_resumes(self, path: Path) -> None:
        if self._save_only_model:
            raise errors.UnsupportedError(
                f"{path}: cluster {self.cluster} saves only its model (save_only_model), and such a cluster cannot "
                "resume; leave save_only_model out to resume with the optimizer, or load the weights alone with "
                "roll_ckpt.backends.megatron.load"
            )

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
    are saved. The optimizer's step, and what else changes its tensors, waits for the copies of pending saves. No
    collective.

    Raises:
        UnsupportedError: Megatron's FSDP, or a form that cannot be saved.
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
    return Attached(chunks, optimizer, scheduler, settings or Settings(), cluster, form, save_only_model)


# --- a cluster of a pipeline ---------------------------------------------------------------------------------


class Model:
    """What `attach` bound, as a cluster of a pipeline: see `cluster.Backend`."""

    framework = FRAMEWORK

    def __init__(self, attached: Attached) -> None:
        self.world = World.current()
        self._attached = attached
        self._make: Callable[[], dict[str, Any]] = dict
        self._prepared: Prepared | None = None

    def estimate_bytes(self) -> int:
        return self._attached.estimate_bytes()

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> saver.Share:
        self._make = lambda: {**self._attached.state(step), _CLIENT_STATE: dict(client_state)}
        if not self._attached.alone:
            return saver.Share(self.estimate_bytes())
        self._prepared = self._attached.prepare(self._make())
        return saver.Share(self._prepared.nbytes, self._prepared.plan)

    def fence(self) -> None:
        self._attached.fence()

    def stage(self, save: saver.Save, directory: Path) -> saver.Ticket:
        ours, prepared = self._attached, self._prepared
        self._prepared = None  # or else it would hold the tensors until the next save
        ticket = save.ticket(ours.cluster, describe(content_metadata_of(ours.form)))
        ours.stage(ticket, directory, prepared.state if prepared else self._make(), prepared)
        return ticket

    def check(self, opened: loader.Unit, where: str) -> None:
        self._attached.check(opened.directory / self._attached.cluster)

    def load(self, unit: Path, name: str) -> Mapping[str, Any]:
        loaded = self._attached.restore(unit / self._attached.cluster, verified=True)
        client_state: Mapping[str, Any] = loaded.get(_CLIENT_STATE, {})
        return client_state


# --- copies under training -----------------------------------------------------------------------------------


class Fence:
    """The saves that read tensors of one optimizer: its step, and all else that changes them, waits for the copies.

    One for each optimizer, however often it is attached.
    """

    def __init__(self) -> None:
        self._saves: list[saver.Save] = []

    @classmethod
    def of(cls, optimizer: Any, model: Sequence[Any]) -> Fence:
        """The fence of `optimizer`, wired into it and into `model` at the first call."""
        found: Fence | None = getattr(optimizer, "_roll_ckpt_fence", None)
        if found is not None:
            return found
        fence = optimizer._roll_ckpt_fence = cls()
        for part in [optimizer, *getattr(optimizer, "chained_optimizers", ())]:
            loads = (name for name in dir(part) if name.startswith("load_parameter_state"))
            for name in (*_CHANGES, *loads):
                fence._before(part, name)
        for chunk in model:
            fence._before(chunk, "broadcast_params")
            for buffer in _buffers(chunk):
                fence._before(buffer, "offload_to_cpu")
            for module in chunk.modules():  # a hook, no wrapper: a copy of the model must load into itself
                module.register_load_state_dict_pre_hook(lambda *args: fence.wait())
        return fence

    def add(self, save: saver.Save) -> None:
        """`save` reads the tensors from now on."""
        self._saves.append(save)

    def wait(self) -> None:
        """See `Attached.fence`."""
        for save in list(self._saves):
            save.fence()
            if not save.settled:
                continue
            self._saves.remove(save)
            if save.failure is not None and not save.reported and save.settings.fail_training:
                save.reported = True
                raise save.failure

    def _before(self, owner: Any, name: str) -> None:
        stock = getattr(owner, name, None)
        if stock is None:
            return

        @functools.wraps(stock)
        def fenced(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            return stock(*args, **kwargs)

        setattr(owner, name, fenced)


_CHANGES = (
    "step",
    "step_with_ready_grads",
    "load_state_dict",
    "reload_model_params",
    "offload_to_cpu",
    "restore_from_cpu",
)
"""What changes, or moves, an optimizer's tensors and the parameters that it trains."""


def stable_storages(model: Sequence[Any], optimizer: Any) -> frozenset[int]:
    """Storages that change in the step of a distributed optimizer alone: its main parameters and moments, and the
    parameters that it trains.

    Where the gather of parameters overlaps the forward pass, parameters are none of them: hooks write them there.
    Nor is anything whose optimizer keeps a copy on the host, which it may still be moving after the step.
    """
    tensors: list[Any] = []
    for part in _distributed(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            return frozenset()
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
        tensors += part.model_param_gbuf_map
    unstable = {
        buffer.param_data.untyped_storage()._cdata
        for chunk in model
        for buffer in _buffers(chunk)
        if buffer.param_data is not None and _gathers_late(chunk)
    }
    plain = (torch.Tensor, torch.nn.Parameter)
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors if type(tensor) in plain) - unstable


def _distributed(optimizer: Any) -> list[Any]:
    """The distributed optimizers with parameters on this rank that `optimizer` is or is made of."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in parts if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer]


def _buffers(chunk: Any) -> list[Any]:
    """The buffers in which DistributedDataParallel keeps parameters and gradients."""
    return [*getattr(chunk, "buffers", ()), *getattr(chunk, "expert_parallel_buffers", ())] if _is_ddp(chunk) else []


def _is_ddp(chunk: Any) -> bool:
    return isinstance(chunk, DistributedDataParallel)


def _gathers_late(chunk: Any) -> bool:
    """Whether parameters are old after the step, until hooks of the next forward pass have gathered them."""
    return _is_ddp(chunk) and bool(chunk.ddp_config.overlap_param_gather)


# --- records and random states -------------------------------------------------------------------------------


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
