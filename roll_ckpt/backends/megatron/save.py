"""Saves of a sharded state as one transaction: prepare it, plan or use the last plan again, stage its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories, is_main_replica
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY as CONTENT_METADATA
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import names, process
from roll_ckpt.backends.megatron import version
from roll_ckpt.backends.megatron.facts import COMMON, DCP_METADATA, MARKER, MARKER_BYTES, check_sharding_type, describe
from roll_ckpt.backends.megatron.index import StateIndex
from roll_ckpt.backends.megatron.plan import Plan, PlannedFile, main_bytes, metadata_bytes, plan_file, structure_of
from roll_ckpt.backends.megatron.strategy import SaveStrategy, strategy_of
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip import layout, sources, unsavable
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import gate, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.course import Course, Courses
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit

_COMMON_STATE = "the common state "


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
) -> Save:
    """Save what `dist_checkpointing.save` would, as one transaction on `directory`; every rank calls.

    Returns when the checkpoint is committed and durable. With `async_save` it returns once everything is copied, and
    `wait()` of the result blocks until the commit. If this run has saved in that directory before and the disk refuses
    the first byte, there is no exception with `async_save`: the result is not `begun`.

    Args:
        sharded_state_dict: as for `dist_checkpointing.save`; factories in it are built in place.
        step: the training step, for the manifest.
        settings: how to save; default `Settings()`.
        cluster: the name under which the manifest lists the model.
        content_metadata: what the checkpoint records of how `sharded_state_dict` was made.
        strategy: a `SaveStrategy`, bare or in a `FullyParallelSaveStrategyWrapper`; default a new one. The same one at
            each save lets Megatron plan only once.
        save_latest: name the checkpoint in `latest`.

    Raises:
        ConfigError: `strategy` is no `SaveStrategy`.
        UnsupportedError: the optimizer's sharding type cannot be saved.
        RanksDisagree, RunIsLive, EpochLost, NoRoom, SaveFailed: see `save.begin.begin`; on every rank, nothing was
            written.
        SaveFailed: without `async_save`, on every rank, the save failed on any rank. With it, the first save with a
            `strategy` raises on every rank if any could not lay its files out.
    """
    strategy = strategy or SaveStrategy(settings=settings)
    check_sharding_type(content_metadata)
    strategy_of(strategy)

    def stage_it(save: Save, cluster_save: ClusterSave, prepared: Prepared) -> None:
        directory = save.attempt.checkpoint_dir
        stage(cluster_save, directory, sharded_state_dict, strategy, content_metadata, prepared=prepared)

    return transact(
        lambda: prepare(sharded_state_dict, strategy, content_metadata),
        stage_it,
        names.absolute(directory),
        step=step,
        settings=settings or Settings(),
        cluster=cluster,
        facts=lambda: describe(content_metadata),
        save_latest=save_latest,
        course=process.part(Courses).at(Path(directory).absolute().parent, cluster),
        strategy=strategy,
    )


def transact(
    prepare_it: Callable[[], Prepared],
    stage_it: Callable[[Save, ClusterSave, Prepared], None],
    path: Path,
    *,
    step: int | None,
    settings: Settings,
    cluster: str,
    facts: Callable[[], dict[str, Any]],
    save_latest: bool,
    course: Course,
    strategy: Any,
) -> Save:
    """Prepare, begin, stage, commit: one save of one cluster. Every rank calls; see `save` for when it returns.

    If `prepare_it` raises on one rank, the save is not begun, and SaveFailed is raised on all. So it is if a rank could
    not stage the first save of `strategy`.
    """
    ranks = RankGroup.current()
    with gate.entered(ranks, f"save {path.name} to {path.parent}", settings.commit_timeout_s):
        save = _begin_and_stage(
            prepare_it, stage_it, path, step, settings, cluster, facts, save_latest, course, strategy_of(strategy)
        )
    if not settings.async_save:
        if save.begun:
            pending.wait_on_all_ranks(ranks, save, uploaded=True)
        else:
            save.wait()
    return save


def _begin_and_stage(
    prepare_it: Callable[[], Prepared],
    stage_it: Callable[[Save, ClusterSave, Prepared], None],
    path: Path,
    step: int | None,
    settings: Settings,
    cluster: str,
    facts: Callable[[], dict[str, Any]],
    save_latest: bool,
    course: Course,
    save_strategy: SaveStrategy,
) -> Save:
    ranks = RankGroup.current()
    request = Request(
        path.parent, path.name, step, {cluster: ranks.size}, course=course, save_latest=save_latest, host=True
    )
    prepared: Prepared | None = None
    problem = None
    try:
        names.check_name("tag", path.name)
        prepared = prepare_it()
    except RollCkptError as error:
        problem = str(error)  # `begin` raises it on every rank
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    save = begin(
        ranks,
        request,
        settings,
        nbytes=prepared.nbytes if prepared else 0,
        problem=problem,
        plans={cluster: prepared.plan if prepared else None},
        on_commit=AfterCommit(settings, course),
    )
    if save.begun:
        assert prepared is not None, "no save begins if any rank has a problem"
        with pending.staging(ranks, save, first=not save_strategy.has_staged):
            stage_it(save, save.add_cluster(cluster, facts()), prepared)
        save_strategy.has_staged = True
    return save


@dataclass(frozen=True)
class Prepared:
    """A state taken apart for one save, on this rank. Made by `prepare`."""

    state: dict[str, Any]
    common: dict[str, Any]
    common_file: FileImage | None
    """The file of `common` on rank 0, which writes it; None on the others."""
    parts: list[Any]
    """Its `ShardedTensor`s and `ShardedObject`s, in the order of the state."""
    structure: list[Any]
    """`structure_of` each part; a plan fits a state of the same structure."""
    nbytes: int
    """About how many bytes this rank will write."""
    objects: list[FileImage]
    """The pickled objects that `plan` has slots for, in its order."""
    plan: str | None
    """The name of an earlier save's plan that fits, for `save.begin.begin`; None if this rank needs a new plan."""


def prepare(
    sharded_state_dict: dict[str, Any], strategy: Any, content_metadata: Mapping[str, Any] | None = None
) -> Prepared:
    """Take a state apart, and check whether the last plan of `strategy` fits it. No collective.

    Objects are pickled now. As in Megatron's own save, factories in `sharded_state_dict` are built in place.

    Raises:
        ConfigError: `strategy` is no `SaveStrategy`.
        SaveFailed: an entry of the common state, or an object that this rank writes, cannot be saved; the message
            names it.
    """
    plan = strategy_of(strategy).plan
    if content_metadata is not None:
        sharded_state_dict[CONTENT_METADATA] = dict(content_metadata)
    apply_factories(sharded_state_dict)
    _, persistent = extract_nonpersistent(sharded_state_dict)
    sharded, common = extract_sharded_base(persistent)
    if CONTENT_METADATA in common:
        common[CONTENT_METADATA] = version.clean_metadata(common[CONTENT_METADATA])
    common_file = None
    if RankGroup.current().rank == 0:
        common_file = layout.lay_out(common, Path(COMMON).stem, root=_COMMON_STATE)
    parts = list(nested_values(sharded))
    structure = [structure_of(part) for part in parts]
    objects: list[FileImage] = []
    fits = plan is not None and plan.structure == structure
    if plan is not None and fits:
        objects = plan.pickled(parts)
        fits = all(image.nbytes <= slot.length for image, slot in zip(objects, plan.slots, strict=True))
    if not fits:
        if common_file is None:  # Megatron compares it between ranks when it plans, and all would wait for this one
            unsavable.check(common, _COMMON_STATE)
        for part in parts:
            if isinstance(part, ShardedObject) and is_main_replica(part.replica_id):
                unsavable.check(part.data, part.key)
    name = plan.name if plan is not None and fits else None
    nbytes = sum(main_bytes(part) for part in parts)
    return Prepared(sharded_state_dict, common, common_file, parts, structure, nbytes, objects, name)


def stage(
    cluster_save: ClusterSave,
    directory: Path,
    sharded_state_dict: dict[str, Any],
    strategy: Any,
    content_metadata: Mapping[str, Any] | None = None,
    *,
    prepared: Prepared | None = None,
    lifetime_of: sources.LifetimeOf = lambda storage: False,
) -> None:
    """Stage what `dist_checkpointing.save` would write into `directory`, as `cluster_save`; every rank calls.

    Returns when everything but the storages that `lifetime_of` calls overlappable is copied; not durable. The last
    plan of `strategy` is used again if it fits on every rank: `save.begin.begin` has compared `Prepared.plan` of the
    ranks; without `prepared` they meet here to do so. Otherwise Megatron plans, with collectives of its own. An error
    becomes this rank's no vote, so that no other rank waits for this one in a collective.
    """
    save_strategy = strategy_of(strategy)
    cluster_save.indexer = save_strategy.indexer
    replay = cluster_save.reuses_plan
    if prepared is None:
        prepared, replay = _prepare_together(cluster_save, sharded_state_dict, strategy, content_metadata)
    try:
        writes.make_dirs(directory)
    except Exception as problem:
        cluster_save.fail(problem)  # still plan with the others, who would wait for this rank otherwise
    try:
        if not replay:
            _plan_together(cluster_save, prepared, strategy)
        plan = save_strategy.plan
        if plan is None or cluster_save.error is not None:
            return  # this rank votes no
        objects = prepared.objects if replay else plan.pickled(prepared.parts)
        _stage_planned(cluster_save, directory, save_strategy, plan, prepared, objects, lifetime_of)
    except Exception as problem:
        cluster_save.fail(problem)


def _prepare_together(
    cluster_save: ClusterSave, state: dict[str, Any], strategy: Any, content_metadata: Mapping[str, Any] | None
) -> tuple[Prepared, bool]:
    """`prepare`, and whether every rank can use the same earlier plan. Every rank calls; one rendezvous.

    Raises:
        SaveFailed: on every rank, if `prepare` raised on any.
    """
    post: dict[str, Any] = {"plan": None, "problem": None}
    prepared: Prepared | None = None
    try:
        prepared = prepare(state, strategy, content_metadata)
        post["plan"] = prepared.plan
    except Exception as error:
        post["problem"] = f"{type(error).__name__}: {error}"

    def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
        problems = [f"rank {rank}: {post['problem']}" for rank, post in enumerate(posts) if post["problem"]]
        if problems:
            raise SaveFailed(f"{cluster_save.attempt.label}: {cluster_save.cluster}: " + "; ".join(problems))
        plan = posts[0]["plan"]
        return {"replay": plan is not None and all(post["plan"] == plan for post in posts)}

    verdict = RankGroup.current().decide_on_rank0(post, decide, cluster_save.settings.commit_timeout_s)
    assert prepared is not None, "the rendezvous raises if any rank has a problem"
    return prepared, verdict["replay"]


def _stage_planned(
    cluster_save: ClusterSave,
    directory: Path,
    strategy: SaveStrategy,
    plan: Plan,
    prepared: Prepared,
    objects: Sequence[FileImage],
    lifetime_of: sources.LifetimeOf,
) -> None:
    """Stage every file of this rank by `plan`. Small files go first, so that they do not wait behind large copies."""
    if prepared.common_file is not None:
        small = {
            COMMON: prepared.common_file,
            DCP_METADATA: FileImage.of_bytes(plan.metadata),
            MARKER: FileImage.of_bytes(MARKER_BYTES),
        }
        strategy.warn_unloadable(prepared.common, directory, cluster_save.settings)
        for name, image in small.items():
            cluster_save.stage(directory / name, image, overlap=False)
    remaining = iter(objects)
    for file in plan.files:
        cluster_save.stage(directory / file.name, file.image(prepared.parts, remaining, lifetime_of), overlap=True)


def _plan_together(cluster_save: ClusterSave, prepared: Prepared, strategy: Any) -> None:
    """Let Megatron plan, and keep the plan in the strategy. Every rank calls.

    A rank that cannot lay its files out takes part too; it has no plan afterwards, and votes no.

    Raises:
        SaveFailed: on every rank, if Megatron finds the state invalid, which it reports on rank 0 alone.
    """
    save_strategy, attempt = strategy_of(strategy), cluster_save.attempt
    save_strategy.plan = None
    sharded: dict[str, Any] = {}
    indexes: list[StateIndex] = []

    def preprocess() -> None:
        sharded.update(save_preprocess(prepared.state)[0])
        indexes.append(
            StateIndex(prepared.parts, save_strategy.source())
        )  # before Megatron's planning changes the parts

    RankGroup.current().run_on_all_ranks(preprocess, cluster_save.settings.commit_timeout_s)
    # Plan for the output directory, which exists. Megatron makes the directory that it plans for, and would make the
    # attempt's anew if that had been discarded meanwhile.
    planned = save_strategy.planned_by_stock(strategy, sharded, attempt.output_dir)
    files: list[PlannedFile] = []
    results: list[WriteResult] = []
    problem: Exception | None = None
    try:
        for _, name, (objects, tensors) in planned.writer.write_buckets or ():
            file, written = plan_file(name, [item for item, _ in (*objects, *tensors)], prepared.parts, *indexes)
            files.append(file)
            results += written
    except Exception as error:
        problem = error  # this rank still takes part in the gather
    planned.writer.write_buckets = None
    gathered = planned.group.gather_object(results)
    try:
        if problem is not None:
            raise problem
        index = metadata_bytes(planned.metadata, gathered) if planned.group.is_coordinator else b""
        save_strategy.plan = Plan(str(attempt.checkpoint_dir), prepared.structure, tuple(files), index)
    except Exception as error:
        cluster_save.fail(error)
