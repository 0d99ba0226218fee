"""Prepares and stages every cluster of a pipeline, and the pipeline's own files, for one save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from roll_ckpt.errors import RollCkptError
from roll_ckpt.pipeline.cluster import Cluster
from roll_ckpt.pipeline.state_files import Components, StateFiles
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save


def prepare_all(
    clusters: Mapping[str, Cluster],
    state_files: StateFiles,
    step: int,
    rank: int,
    raise_failure: Callable[[], None],
) -> tuple[dict[str, SaveEstimate], Components, str | None]:
    """What the clusters are about to save and the components, laid out; or why this rank cannot save, as a text.

    `raise_failure` raises what an earlier save has left to raise.
    This rank alone. Raises no Exception, because `save.begin.begin` has to tell the other ranks.
    """
    try:
        raise_failure()
        estimates = {name: cluster.prepare(step) for name, cluster in clusters.items()}
        return estimates, state_files.lay_out(rank), None
    except RollCkptError as error:
        return {}, {}, str(error)
    except Exception as error:
        return {}, {}, f"{type(error).__name__}: {error}"


def stage_all(
    save: Save,
    clusters: Mapping[str, Cluster],
    stage_own_files: Callable[[ClusterSave], None],
    ranks: RankGroup,
    *,
    step: int,
    last: bool,
    counted: int,
) -> dict[str, Any]:
    """Stage all of a begun save, inside of its `staging`. Every rank calls.

    Returns when all but the overlappable tensors have been copied. The pipeline's own files become a part of the first
    cluster's. `counted` is `ranks.rendezvous_count` before the save began, for the metric `host_collectives`.

    Returns this rank's metrics.

    Raises:
        Exception: the first that a cluster or the pipeline's own files raised. The other clusters are staged all the
            same before, because other ranks may wait for this one there.
    """
    metrics: dict[str, Any] = {}
    problem: Exception | None = None
    first = next(iter(clusters))
    for cluster in clusters.values():
        cluster.bind(save)
        try:
            metrics |= cluster.do_checkpoint(global_step=step, is_last_step=last, blocking=False)
        except Exception as error:
            problem = problem or error
        metrics[f"time/{cluster.name}/do_checkpoint/host_collectives"] = ranks.rendezvous_count - counted
        counted = ranks.rendezvous_count
    if problem is not None:
        raise problem
    stage_own_files(save.cluster_saves[first])
    return metrics
