"""What became of a pipeline's saves: their metrics, and the failures that all ranks raise together."""

from __future__ import annotations

from typing import Any

from roll_ckpt.errors import RollCkptError
from roll_ckpt.pipeline.metrics import add_ended
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit


class Outcomes:
    """The outcomes of `saves`, which this shares with the pipeline, and of the uploads that `after_commit` makes."""

    def __init__(self, saves: list[Save], after_commit: AfterCommit, fail_training: bool) -> None:
        self._saves = saves
        self._after_commit = after_commit
        self._fail_training = fail_training
        self._unraised: RollCkptError | None = None

    def ended(self) -> dict[str, Any]:
        """The metrics of what has ended since the last call. With `fail_training`, a failure is kept for the next save,
        which raises it on every rank: that of an upload is known to rank 0 alone. This rank alone; does not block.
        """
        metrics: dict[str, Any] = {}
        failure = add_ended(metrics, self._saves, self._after_commit, fail_training=self._fail_training)
        self._unraised = self._unraised or failure
        return metrics

    def raise_failure(self) -> None:
        """Raise the failure that `ended` has kept. Called where the other ranks learn what this one raises."""
        failure, self._unraised = self._unraised, None
        if failure is not None:
            raise failure

    def wait(self, save: Save, metrics: dict[str, Any], *, uploaded: bool) -> None:
        """Wait for `save`, add the metrics of what has ended to `metrics`, and raise what failed."""
        try:
            save.wait(uploaded=uploaded)
        finally:
            metrics |= self.ended()
        self.raise_failure()

    def of_not_begun(self, save: Save, metrics: dict[str, Any], *, waits: bool) -> None:
        """The same for a save that could not begin, which every rank knows; raises if the caller waits for it."""
        self._after_commit.awaited.discard(save.attempt.name)
        if waits or self._fail_training:
            save.wait()
        metrics |= self.ended()
