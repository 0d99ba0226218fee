"""Commit: how the votes of all ranks become a checkpoint under its final name, or nothing.

    claim → begin → (write, fsync) → cast → settle            and, at the next start:  claim → recover

Any process may carry out a decision, and two may do so at once; what each step finds done is done. Links and
renames decide, never a lock or a time. A checkpoint under its final name is complete; `latest` names no
other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import failpoints
from roll_ckpt.errors import ConfigError, presentable
from roll_ckpt.transaction import epochs
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.transaction.recovery import recover

log = logging.getLogger("roll_ckpt")


def claim(
    output_dir: Path,
    *,
    run_id: str,
    clusters: Mapping[str, int],
    expected_clusters: Mapping[str, int] | None = None,
    take_over: bool = False,
) -> Epoch:
    """Make this world the one (or one of those) that may write in `output_dir`, and recover what lies there.

    Rank 0 of each world only. Blocks: up to epoch.SILENCE_S if an earlier run on another host has not said
    goodbye. With `expected_clusters`, worlds of the same `run_id` join one epoch.

    Raises:
        RunIsLive: another live run owns it; the message names host and process. Nothing was touched.
        ConfigError: names that cannot be, clusters that are not among the expected, a directory that cannot
            be written.
    """
    for cluster in {*clusters, *(expected_clusters or {})}:
        names.check_name("cluster", cluster)
    if not clusters:
        raise ConfigError("a world without clusters cannot claim an output directory")
    if expected_clusters is not None:
        for cluster, world_size in clusters.items():
            if expected_clusters.get(cluster) != world_size:
                raise ConfigError(
                    f"cluster {cluster!r} with {world_size} ranks is not among expected_clusters "
                    f"{dict(expected_clusters)}; give every world the same expected_clusters"
                )
    output_dir = Path(output_dir)
    try:
        claimed = epochs.claim_number(output_dir, run_id, clusters, expected_clusters, take_over)
    except OSError as error:
        raise ConfigError(
            f"output_dir {output_dir} cannot be written: {error.strerror} ({error.filename}); choose another"
        ) from error
    failpoints.failpoint("epoch.claimed", number=claimed.number)
    try:
        for found in recover(output_dir, epoch=claimed):
            log.warning("%s of attempt %s.%s: %s (%s)", output_dir / found.name, found.epoch, found.attempt,
                        found.action, presentable(found.reason))  # fmt: skip
    except BaseException:
        claimed.release()
        raise
    return claimed
