"""BasePipeline: when to save, in what order, and how to come back."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.config import HubUpload, PipelineConfig, Upload
from roll_ckpt.errors import RollCkptError, SaveFailed
from roll_ckpt.pipeline.base import _uploads
from roll_ckpt.save import claims, pending
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import retention
from roll_ckpt.upload import file_system
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.progress import ProgressBar
from roll_ckpt.upload.hub.push_queue import Destination
from roll_ckpt.upload.hub.uploader import Ended, Uploader
from roll_ckpt.upload.hub.worker import last_moved_ns

log = logging.getLogger("roll_ckpt")

_POLL_S = 0.2


class AfterCommit:
    """What rank 0 does once a checkpoint is committed: upload it, then prune. Runs on the save's thread."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._one_at_a_time = threading.Lock()
        self._uploader: Uploader | None = None
        if isinstance(config.checkpoint_config, HubUpload):
            self._uploader = Uploader(config.output_dir, on_end=self._pushed, background=self._in_background)
        self.report: dict[str, dict[str, Any]] = {}
        self.late: deque[dict[str, Any]] = deque()
        """Metrics of pushes that ended after the saves that they belong to."""
        self.awaited: set[str] = set()
        """Checkpoints that are uploaded just now and whose saves end only then."""
        self.resumed_from: str | None = None
        """Sound for sure, so it stays until this run has committed a checkpoint of its own."""

    def __call__(self, save: Save, *, awaited: bool) -> None:
        """`awaited`: the save ends only when its checkpoint is uploaded."""
        if not save.lead:
            return
        name = save.attempt.name
        if awaited:
            self.awaited.add(name)
        try:
            if _uploads(save.tickets, save.attempt.expected):
                self._follow(name)
            elif self._uploader is None or name in self.awaited:
                self._await_other_world(name)
        finally:
            self.awaited.discard(name)

    def _follow(self, name: str) -> None:
        report: dict[str, Any] = {}
        began = time.monotonic()
        if self._uploader is not None:
            self._say_where_to()
            self._uploader.notify(name)
            if name in self.awaited:
                self._await_push(self._uploader, name)
                report["checkpoint/upload"] = time.monotonic() - began
        with self._one_at_a_time:
            began = time.monotonic()
            self.resumed_from = None
            if isinstance(self._config.checkpoint_config, Upload):
                self._upload(name)
                report["checkpoint/upload"] = time.monotonic() - began
            report["checkpoint/pruned"] = self._prune()
            self.report[name] = report

    def _await_push(self, uploader: Uploader, name: str) -> None:
        bar = ProgressBar()
        try:
            ended = uploader.wait(name, self._config.exit_timeout_s, bar)
        finally:
            bar.end()
        if ended.state == "owed":
            uploader.stop()  # or else the exit would wait as long once more
        if ended.state in ("owed", "failed"):
            raise SaveFailed(_not_pushed(self._config.output_dir, name, ended.detail))

    def _pushed(self, ended: Ended) -> None:
        """A push has ended: what was owed before may be pruned now."""
        record: dict[str, Any] = {"checkpoint/step": names.step_of(ended.name)}
        if ended.state == "failed":
            record["checkpoint/failed"] = _not_pushed(self._config.output_dir, ended.name, ended.detail)
            log.error("%s", record["checkpoint/failed"])
        else:
            record["checkpoint/upload"] = ended.seconds
            try:
                with self._one_at_a_time:
                    record["checkpoint/pruned"] = self._prune()
            except (OSError, RollCkptError) as problem:
                log.error("pruning %s: %s. The next save tries again.", self._config.output_dir, problem)
        if ended.name not in self.awaited:
            self.late.append(record)

    def _await_other_world(self, name: str) -> None:
        """Block until the uploading world has uploaded `name`, or nothing has moved for `exit_timeout_s`.

        Raises:
            SaveFailed: not uploaded by then. EpochLost: the run goes on elsewhere.
        """
        output_dir = self._config.output_dir
        if self._uploader is not None:
            self._say_where_to()
        limit, moved = time.monotonic() + self._config.exit_timeout_s, 0
        while name in self._owed():
            if moved != (moved := last_moved_ns(output_dir)):
                limit = time.monotonic() + self._config.exit_timeout_s
            if time.monotonic() > limit:
                raise SaveFailed(
                    f"{output_dir / name}: committed, but the world that uploads has not done so within "
                    f"{self._config.exit_timeout_s:g} s (exit_timeout_s); see its log"
                )
            if self._uploader is not None and (entry := push_queue.find(output_dir, name)).state == "failed":
                raise SaveFailed(_not_pushed(output_dir, name, entry.detail))
            claims.epoch_of(output_dir).check()
            time.sleep(_POLL_S)

    def catch_up(self) -> None:
        """Upload and prune, in the background, what an earlier run committed and then was killed."""
        pending.in_background(self._catch_up, "catching up", self._config.exit_timeout_s)

    def _owed(self) -> list[str]:
        upload = self._config.checkpoint_config
        if isinstance(upload, HubUpload):
            return push_queue.owed(self._config.output_dir)
        return [] if upload is None else file_system.owed(self._config.output_dir, upload.output_dir)

    def _in_background(self, work: Callable[[], None], name: str) -> None:
        pending.in_background(work, name, self._config.exit_timeout_s)

    def _say_where_to(self) -> None:
        upload = self._config.checkpoint_config
        assert isinstance(upload, HubUpload)
        push_queue.set_destination(
            self._config.output_dir, Destination(upload.repo_id, upload.revision, upload.private)
        )

    def _catch_up(self) -> None:
        if self._uploader is not None:
            self._say_where_to()
            if self._owed():
                self._uploader.notify(again=True)
        with self._one_at_a_time:
            for name in self._owed() if self._uploader is None else ():
                try:
                    self._upload(name)
                except (OSError, RollCkptError) as problem:
                    log.error(
                        "upload of %s: %s. It stays on the local disk; the next start tries again.", name, problem
                    )
            try:
                self._prune()
            except (OSError, RollCkptError) as problem:
                log.error("pruning %s: %s. The next save tries again.", self._config.output_dir, problem)

    def _upload(self, name: str) -> None:
        upload = self._config.checkpoint_config
        assert isinstance(upload, Upload)
        file_system.upload(self._config.output_dir / name, upload.output_dir)

    def _prune(self) -> list[str]:
        if not self._config.max_ckpt_to_keep:
            return []
        output_dir = self._config.output_dir

        def protected() -> set[str]:
            return {*self._owed(), *([self.resumed_from] if self.resumed_from else [])}

        return retention.prune(output_dir, claims.epoch_of(output_dir), self._config.max_ckpt_to_keep, protected)


def _not_pushed(output_dir: Path, name: str, detail: str) -> str:
    return (
        f"{output_dir / name} is not on the Hub: {detail}. It stays on the local disk, unpruned; the next start "
        f"tries again, and so does `roll-ckpt push {output_dir}`"
    )
