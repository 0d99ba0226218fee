"""The metrics of saves that have ended; docs/metrics.md explains each key."""

from __future__ import annotations

from typing import Any

from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit


def add_ended(
    metrics: dict[str, Any], saves: list[Save], after_commit: AfterCommit, *, fail_training: bool
) -> RollCkptError | None:
    """Add to `metrics` one record for each save, and each background upload, that ended since the last call.

    `checkpoint/ended` lists all these records, oldest first; the plain keys are those of the newest. Saves that have
    ended are removed from `saves`. This rank alone; does not block.

    Returns:
        With `fail_training`, the first failure of them that was not raised yet, for the caller to raise on all ranks:
        that of an upload is known to rank 0 only.
    """
    unraised: RollCkptError | None = None
    for save in [save for save in saves if save.settled]:
        if save.failure is None and not save.finished:
            continue
        saves.remove(save)
        record = _record(save, after_commit.report.pop(save.attempt.name, {}))
        metrics.setdefault("checkpoint/ended", []).append(record)
        metrics |= record
        if save.failure is not None and fail_training and not save.reported:
            save.reported = True
            unraised = unraised or save.failure
    while after_commit.late:
        record = after_commit.late.popleft()
        if metrics.get("checkpoint/step") in (None, record["checkpoint/step"]):
            metrics |= record
        metrics.setdefault("checkpoint/ended", []).append(record)
        if "checkpoint/failed" in record:
            metrics["checkpoint/failed"] = record["checkpoint/failed"]
            if fail_training:
                unraised = unraised or SaveFailed(record["checkpoint/failed"])
    return unraised


def _record(save: Save, report: dict[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"checkpoint/step": save.attempt.step, **report}
    for part in save.cluster_saves.values():
        prefix = f"time/{part.cluster}/do_checkpoint"
        record |= {
            f"{prefix}/step": save.attempt.step,
            f"{prefix}/fence": part.timing.fence_s,
            f"{prefix}/write": part.timing.write_s,
            f"{prefix}/commit": part.timing.commit_s,
            f"{prefix}/durable": save.durable_s,
            f"{prefix}/bytes": part.nbytes,
        }
    if save.failure is not None:
        record["checkpoint/failed"] = str(save.failure)
    return record
