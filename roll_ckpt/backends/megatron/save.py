"""Saves of a sharded state under the commit: prepare, plan or replay, stage."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY as CONTENT_METADATA
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.utils import (
    _clean_metadata_for_serialization,
    extract_nonpersistent,
    extract_sharded_base,
)
from torch.distributed.checkpoint.storage import WriteResult

from roll_ckpt import names
from roll_ckpt.backends.megatron.facts import COMMON, DCP_METADATA, MARKER, MARKER_BYTES, check_sharding_type, describe
from roll_ckpt.backends.megatron.plan import Plan, PlannedFile, main_bytes, metadata_bytes, plan_file, structure_of
from roll_ckpt.backends.megatron.strategy import SaveStrategy, strategy_of
from roll_ckpt.config import Settings
from roll_ckpt.disk import writes
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip import layout, sources
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit


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

    Returns when committed, or with `async_save` once everything is copied; then `wait()` of the result tells.
    `strategy` is a `SaveStrategy`, which may be wrapped for fully parallel saves; default a new one.

    Raises:
        UnsupportedError: a form of the optimizer that cannot be saved. As `saver.begin`, on every rank.
    """
    strategy = strategy or SaveStrategy(settings)
    check_sharding_type(content_metadata)
    strategy_of(strategy)

    def stage_it(save: Save, cluster_save: ClusterSave, prepared: Prepared) -> None:
        stage(
            cluster_save, save.attempt.checkpoint_dir, sharded_state_dict, strategy, content_metadata, prepared=prepared
        )

    return transact(
        lambda: prepare(sharded_state_dict, strategy, content_metadata),
        stage_it,
        Path(directory).absolute(),
        step=step,
        settings=settings or Settings(),
        cluster=cluster,
        facts=lambda: describe(content_metadata),
        save_latest=save_latest,
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
) -> Save:
    """Prepare, begin, stage, commit. What `prepare_it` raises on one rank is raised on all."""
    ranks = RankGroup.current()
    request = Request(path.parent, path.name, step, {cluster: ranks.size}, None, save_latest)
    prepared: Prepared | None = None
    problem = None
    try:
        names.check_name("tag", path.name)
        prepared = prepare_it()
    except RollCkptError as found:
        problem = str(found)
    except Exception as found:
        problem = f"{type(found).__name__}: {found}"
    begun = begin(
        ranks,
        request,
        settings,
        nbytes=prepared.nbytes if prepared else 0,
        problem=problem,
        plans={cluster: prepared.plan if prepared else None},
        on_commit=AfterCommit(settings),
    )
    if not begun.begun:
        if not settings.async_save:
            begun.wait()
        return begun
    assert prepared is not None, "a rank with a problem does not begin"
    with begun.staging():
        stage_it(begun, begun.add_cluster(cluster, facts()), prepared)
    if not settings.async_save:
        pending.wait_on_all_ranks(ranks, begun, uploaded=True)
    return begun


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
    plan = strategy_of(strategy).plan
    if content_metadata is not None:
        sharded_state_dict[CONTENT_METADATA] = dict(content_metadata)
    apply_factories(sharded_state_dict)
    _, persistent = extract_nonpersistent(sharded_state_dict)
    sharded, common = extract_sharded_base(persistent)
    if CONTENT_METADATA in common:
        common[CONTENT_METADATA] = _clean_metadata_for_serialization(common[CONTENT_METADATA])
    parts = list(nested_values(sharded))
    structure = [structure_of(part) for part in parts]
    objects: list[FileImage] = []
    fits = plan is not None and plan.structure == structure
    if plan is not None and fits:
        objects = plan.pickled(parts)
        fits = all(image.nbytes <= slot.length for image, slot in zip(objects, plan.slots, strict=True))
    name = plan.name if plan is not None and fits else None
    nbytes = sum(main_bytes(part) for part in parts)
    return Prepared(sharded_state_dict, common, parts, structure, nbytes, objects, name)


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
    """Stage what stock `dist_checkpointing.save` would write into `directory`, inside the attempt of `ticket`;
    every rank calls.

    Returns when everything but the `stable` storages is copied; not durable. The strategy's last plan is used again
    where it fits on every rank: `saver.begin` knows, from the `plan` of what `prepare` returned; without `prepared`
    there is a rendezvous here. Otherwise stock code plans, with collectives of its own. An error becomes this rank's
    no vote, so that no rank waits for it in a collective.
    """
    ours = strategy_of(strategy)
    replay = cluster_save.reuses_plan
    if prepared is None:
        prepared, replay = _prepare_together(cluster_save, sharded_state_dict, strategy, content_metadata)
    try:
        writes.make_dirs(directory)
    except Exception as problem:
        cluster_save.fail(problem)  # but plan with the others: they would wait for this rank
    try:
        if not replay:
            _plan_together(cluster_save, prepared, strategy)
        if ours.plan is None or cluster_save.error is not None:
            return  # this rank has voted no
        objects = prepared.objects if replay else ours.plan.pickled(prepared.parts)
        _stage_planned(cluster_save, directory, ours, ours.plan, prepared, objects, lifetime_of)
    except Exception as problem:
        cluster_save.fail(problem)


def _prepare_together(
    cluster_save: ClusterSave, state: dict[str, Any], strategy: Any, content_metadata: Mapping[str, Any] | None
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
            raise SaveFailed(f"{cluster_save.attempt.label}: {cluster_save.cluster}: " + "; ".join(problems))
        plan = posts[0]["plan"]
        return {"replay": plan is not None and all(post["plan"] == plan for post in posts)}

    verdict = RankGroup.current().decide_on_rank0(mine, decide, cluster_save.settings.commit_timeout_s)
    assert prepared is not None, "a rank with a problem has none of this"
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
    """Every file of this rank, by the plan. Small ones go first: their bytes need not wait behind large copies."""
    if cluster_save.rank == 0:
        small = {
            COMMON: layout.lay_out(prepared.common, Path(COMMON).stem),
            DCP_METADATA: FileImage.of_bytes(plan.metadata),
            MARKER: FileImage.of_bytes(MARKER_BYTES),
        }
        strategy.warn_unloadable(prepared.common, directory, cluster_save.settings)
        for name, image in small.items():
            cluster_save.stage(directory / name, image, overlap=False)
    rest = iter(objects)
    for file in plan.files:
        cluster_save.stage(directory / file.name, file.image(prepared.parts, rest, lifetime_of), overlap=True)


def _plan_together(cluster_save: ClusterSave, prepared: Prepared, strategy: Any) -> None:
    """Let stock code plan, and keep what it planned; every rank calls, also one that cannot lay its part out: it
    votes no and has no plan then.

    Raises:
        SaveFailed: on every rank, if stock code finds the state invalid, which it says on rank 0 alone.
    """
    ours, attempt = strategy_of(strategy), cluster_save.attempt
    ours.plan = None
    sharded: dict[str, Any] = {}
    RankGroup.current().run_on_all_ranks(
        lambda: sharded.update(save_preprocess(prepared.state)[0]), cluster_save.settings.commit_timeout_s
    )
    # Planned for a directory that is there: stock code would make the attempt's again after it was thrown away.
    writer, metadata, group = ours.planned_by_stock(strategy, sharded, attempt.output_dir)
    files: list[PlannedFile] = []
    results: list[WriteResult] = []
    problem = None
    try:
        for _, name, (objects, tensors) in writer.write_buckets or ():
            file, found = plan_file(name, [item for item, _ in (*objects, *tensors)], prepared.parts)
            files.append(file)
            results += found
    except Exception as found_problem:
        problem = found_problem
    writer.write_buckets = None
    gathered = group.gather_object(results)
    try:
        if problem is not None:
            raise problem
        written = metadata_bytes(metadata, gathered) if group.is_coordinator else b""
        ours.plan = Plan(str(attempt.checkpoint_dir), prepared.structure, tuple(files), written)
    except Exception as found_problem:
        cluster_save.fail(found_problem)
