"""StateSaver: a state dictionary of each rank as a checkpoint, for scripts without DeepSpeed or Megatron-core."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.config import Settings
from roll_ckpt.errors import NotFound
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.formats.torch_zip.safe_pickle import Unloadable
from roll_ckpt.load import trust
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.native.image import Lifetime
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, gate, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.course import Course
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit

_CLUSTER = "state"


class StateSaver:
    """Saves and loads one state dictionary on each rank; keeps the layout of its files from save to save.

    Args:
        settings: staging, I/O, time limits, retention; `async_save` counts as false unless it is set.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._layouts = Layouts(trust.allowed(self.settings))
        self._warned: set[str] = set()
        self._course = Course()
        self._has_staged = False

    def warm(self, nbytes: int, device: int = -1) -> None:
        """Make the staging arena for states of `nbytes` bytes, in the background; pin it for a CUDA `device`."""
        arena.warm(self.settings, nbytes, device)

    def wait_warm(self) -> str:
        """Block until the arena is in memory: "pinned" for CUDA, or "NOT pinned" and the reason."""
        staging = arena.mover(self.settings).arena
        staging.wait_warm()
        return "pinned" if staging.pinned else f"NOT pinned: {staging.pinned_reason}"

    def save(
        self,
        state: dict[str, Any],
        directory: str | os.PathLike[str],
        *,
        step: int | None = None,
        unchanged: Lifetime = Lifetime.UNTIL_SAVE_RETURNS,
    ) -> Save:
        """Save `state` as this rank's part of the checkpoint `directory`; every rank calls.

        Returns when the checkpoint is committed and durable; with `async_save` as soon as the caller may go on.
        `unchanged` says how long the caller leaves the tensors of `state` as they are: until this call returns, until
        `roll_ckpt.fence()`, or until the file is written. What it promises longer is copied, or written, later.

        Raises:
            SaveFailed: on every rank: an entry of the `state` of any rank cannot be saved (nothing was written), or the
                save was abandoned; older checkpoints are sound. As `begin`.
        """
        path, ranks = names.absolute(directory), RankGroup.current()
        with gate.entered(ranks, f"save {path.name} to {path.parent}", self.settings.commit_timeout_s):
            names.check_name("tag", path.name)
            file, problem = _file(ranks.rank), None
            image, unsafe = FileImage(0), dict[str, Unloadable]()
            try:
                image, unsafe = self._layouts.lay_out(file, state, Path(file).stem, lambda storage: unchanged, "state")
            except Exception as error:
                problem = str(error)  # `begin` raises it on every rank
            request = Request(path.parent, path.name, step, {_CLUSTER: ranks.size}, course=self._course, host=True)
            after = AfterCommit(self.settings, self._course)
            save = begin(ranks, request, self.settings, nbytes=image.nbytes, problem=problem, on_commit=after)
            if save.begun:
                with pending.staging(ranks, save, first=not self._has_staged):
                    self._stage(save, image, unsafe, unchanged)
                self._has_staged = True
        if not self.settings.async_save:
            if save.begun:
                pending.wait_on_all_ranks(ranks, save, uploaded=True)
            else:
                save.wait()
        return save

    def _stage(self, save: Save, image: FileImage, unsafe: Mapping[str, Unloadable], unchanged: Lifetime) -> None:
        file = _file(save.rank)
        part = save.add_cluster(_CLUSTER, {"framework": "none"})
        trust.warn_unloadable(save.attempt.final / file, unsafe, self._warned)
        late = unchanged != Lifetime.UNTIL_SAVE_RETURNS and self.settings.staging.overlap
        part.stage(save.attempt.checkpoint_dir / file, image, overlap=late)

    def load(self, directory: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
        """This rank's state in the committed checkpoint `directory`, every byte verified; every rank calls; blocks.

        Raises:
            NotFound: there is no committed checkpoint, or none of this rank. Damaged, Unreadable: on every rank.
        """
        path, ranks = names.absolute(directory), RankGroup.current()
        with gate.entered(ranks, f"load {path}", self.settings.commit_timeout_s), ExitStack() as stack:
            pending.wait_pending()
            reader = stack.enter_context(open_together(ranks, path, self.settings))
            if reader.checkpoint is None:
                raise NotFound(f"{path}: no checkpoint of roll_ckpt is there")
            if ranks.size > 1:
                check_bytes(ranks, path, self.settings.commit_timeout_s)
                reader.cached = True
            with ranks.raising_together(self.settings.commit_timeout_s):
                state: dict[str, Any] = reader.load(path / _file(ranks.rank), map_location)
            self._course.resumed(reader.checkpoint.manifest)
        return state


def _file(rank: int) -> str:
    return f"state_rank_{rank}.pt"
