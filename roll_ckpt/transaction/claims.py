"""Claiming an output directory: names are checked, an epoch is claimed, and what earlier runs left is recovered."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints
from roll_ckpt.errors import ConfigError, presentable
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.leftovers import sweep_beside
from roll_ckpt.transaction.recovery import recover

log = logging.getLogger("roll_ckpt")


def claim(
    output_dir: Path,
    *,
    run_id: str,
    clusters: Mapping[str, int],
    expected_clusters: Mapping[str, int] | None = None,
    take_over: bool = False,
    host: bool = False,
) -> Epoch:
    """Claim `output_dir` for this job, so that it may write there, and recover what earlier runs left.

    Rank 0 of each job calls it. `clusters` maps the clusters of this job to their world sizes. With
    `expected_clusters`, the clusters of all jobs of the run, jobs with the same `run_id` join one epoch. With `host`,
    the directory is that of a program around us, and our bookkeeping lies beside it; see `home`.

    Blocks: up to epochs.SILENCE_S if an earlier run on another host did not release the directory, and while what it
    left is recovered. The claim is durable on return.

    Raises:
        RunIsLive: another live run owns the directory; the message names host and process. Nothing was touched.
        ConfigError: a name is refused, a cluster is not among the expected ones, or the directory cannot be written.
        Damaged: `.epochs/` holds a link or a number that no run writes.
        OSError, SaveFailed, EpochLost: the recovery failed; the claim is released.
    """
    for cluster in {*clusters, *(expected_clusters or {})}:
        names.check_name("cluster", cluster)
    if not clusters:
        raise ConfigError(f"output_dir {output_dir}: a job without clusters cannot claim it; name at least one cluster")
    if expected_clusters is not None:
        for cluster, world_size in clusters.items():
            if expected_clusters.get(cluster) != world_size:
                raise ConfigError(
                    f"cluster {cluster!r} with {world_size} ranks is not among expected_clusters "
                    f"{dict(expected_clusters)}; give every job the same expected_clusters"
                )
    output_dir = Path(output_dir)
    try:
        claimed = epochs.claim_number(output_dir, run_id, clusters, expected_clusters, take_over, host=host)
    except OSError as error:
        raise ConfigError(
            f"output_dir {output_dir} cannot be written: {error.strerror} ({error.filename}); choose another"
        ) from error
    failpoints.failpoint("epoch.claimed", number=claimed.number)
    if host:
        sweep_beside(claimed.home)
    try:
        for recovered in recover(output_dir, epoch=claimed):
            log.warning(
                "%s: recovery has %s attempt %s.%s, which an earlier run left: %s",
                *(output_dir / recovered.name, recovered.action, recovered.epoch, recovered.attempt),
                presentable(recovered.reason),
            )
    except BaseException:
        claimed.release()
        raise
    return claimed
