"""What rank 0 does after each commit: upload the checkpoint, then prune old ones."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Collection
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.config import HubUpload, Settings, Upload
from roll_ckpt.errors import RollCkptError
from roll_ckpt.save import claims, pending
from roll_ckpt.save.course import Course
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import retention
from roll_ckpt.upload.destination import Destination, all_owing, make
from roll_ckpt.upload.hub.destination import not_pushed
from roll_ckpt.upload.hub.uploader import Ended

log = logging.getLogger("roll_ckpt")


class AfterCommit:
    """Called with each committed save, on that save's thread; see `Save.on_commit`. Does nothing but on rank 0."""

    def __init__(self, settings: Settings, course: Course) -> None:
        self._settings = settings
        self._course = course
        self._one_at_a_time = threading.Lock()
        self._destination: Any = None
        self.report: dict[str, dict[str, Any]] = {}
        """By checkpoint, the metrics of its upload and of pruning after it, until the pipeline takes them."""
        self.late: deque[dict[str, Any]] = deque()
        """Metrics of uploads that ended after their save had ended."""
        self.awaited: set[str] = set()
        """Checkpoints whose save ends only when they are uploaded."""
        self.resumed_from: str | None = None
        """The checkpoint that this run resumed from: it is sound, so it stays until the run has committed one."""

    def send_to(self, section: Upload | HubUpload, output_dir: Path) -> None:
        """From now on, upload every checkpoint of `output_dir` to the destination that `section` describes."""
        self._destination = make(section, output_dir, self._ended, self._settings.exit_timeout_s)

    def check(self) -> None:
        """Refuse a destination to which no upload can succeed. Raises what `Destination.check` does."""
        if self._destination is not None:
            self._destination.check()

    def __call__(self, save: Save, *, awaited: bool = False) -> None:
        """Upload and prune. With `awaited`, block until the checkpoint is uploaded.

        Raises:
            SaveFailed: an upload that was waited for failed. The checkpoint stays committed and owed.
            OSError, Damaged: an upload that is not in the background, or pruning, failed.
        """
        if not save.lead:
            return
        name = save.attempt.name
        if awaited:
            self.awaited.add(name)
        try:
            if sends(save.cluster_saves, save.attempt.expected):
                self._follow(save)
            elif self._destination is not None and (awaited or not self._destination.in_background):
                self._wait(save)
        finally:
            self.awaited.discard(name)

    def catch_up(self, output_dir: Path) -> None:
        """In the background, upload and prune what an earlier run committed before it was killed."""
        pending.in_background(lambda: self._catch_up(output_dir), "catching up", self._settings.exit_timeout_s)

    def _follow(self, save: Save) -> None:
        report: dict[str, Any] = {}
        name, began = save.attempt.name, time.monotonic()
        if self._destination is not None:
            self._destination.upload(name)
            if name in self.awaited and self._destination.in_background:
                self._wait(save)
            if name in self.awaited or not self._destination.in_background:
                report["checkpoint/upload"] = time.monotonic() - began
                save.notes.append(f"uploaded in {report['checkpoint/upload']:.2f} s")
        with self._one_at_a_time:
            self.resumed_from = None
            report["checkpoint/pruned"] = self._prune(save.attempt.output_dir)
            self.report[name] = report
        if report["checkpoint/pruned"]:
            save.notes.append(f"pruned {', '.join(report['checkpoint/pruned'])}")

    def _wait(self, save: Save) -> None:
        output_dir = save.attempt.output_dir

        def check() -> None:
            epoch = claims.find_claim(output_dir)
            if epoch is not None:
                epoch.check()

        self._destination.wait(save.attempt.name, self._settings.exit_timeout_s, check)

    def _ended(self, ended: Ended) -> None:
        """Called when an upload in the background has ended: prune, since what was owed until now may go."""
        record: dict[str, Any] = {"checkpoint/step": names.step_of(ended.name)}
        if ended.state == "failed":
            record["checkpoint/failed"] = not_pushed(ended.output_dir, ended.name, ended.detail)
            log.error("%s", record["checkpoint/failed"])
        else:
            record["checkpoint/upload"] = ended.seconds
            record["checkpoint/pruned"] = self._try_to_prune(ended.output_dir)
            log.info("%s: uploaded in %.2f s%s", ended.output_dir / ended.name, ended.seconds,
                     "".join(f", pruned {name}" for name in record["checkpoint/pruned"] or ()))  # fmt: skip
        if ended.name not in self.awaited:
            self.late.append(record)

    def _catch_up(self, output_dir: Path) -> None:
        if self._destination is not None:
            self._upload_owed(self._destination, output_dir)
        self._try_to_prune(output_dir)

    def _upload_owed(self, destination: Destination, output_dir: Path) -> None:
        try:
            owed = destination.owed()
        except (OSError, RollCkptError) as problem:
            log.error("%s: what it still owes to the upload cannot be read: %s. The next start tries again.",
                      output_dir, problem)  # fmt: skip
            return
        for name in owed:
            try:
                destination.upload(name, again=True)
            except (OSError, RollCkptError) as problem:
                log.error("upload of %s: %s. It stays on the local disk; the next start tries again.", name, problem)

    def _try_to_prune(self, output_dir: Path) -> list[str] | None:
        try:
            with self._one_at_a_time:
                return self._prune(output_dir)
        except (OSError, RollCkptError) as problem:
            log.error("pruning %s: %s. The next save tries again.", output_dir, problem)
            return None

    def _prune(self, output_dir: Path) -> list[str]:
        keep = self._settings.max_ckpt_to_keep
        if not keep:
            return []
        epoch = claims.find_claim(output_dir)
        if epoch is None:
            log.info("%s: this process has given its claim back; the next save there prunes", output_dir)
            return []
        owing = all_owing(output_dir, self._destination)
        protected = {self.resumed_from} if self.resumed_from else set()
        return retention.prune(output_dir, epoch, keep, owing, protected, series=self._course.series)


def sends(clusters: Collection[str], expected: Collection[str] | None) -> bool:
    """True if the job that saves `clusters` uploads and prunes for the run: the job of the first `expected` cluster.

    `expected` is None where the run has one job only.
    """
    return expected is None or min(expected) in clusters
