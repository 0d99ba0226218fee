"""Cluster: one named model of a pipeline, saved and loaded through its framework's own calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save


class Backend(Protocol):
    """A cluster's model on this rank under its framework: all that differs between frameworks.

    Every rank makes the same calls. What `stage` raises or records becomes this rank's no vote.
    """

    framework: str
    world: RankGroup

    def estimate_bytes(self) -> int:
        """About what this rank will write, in bytes. No collective."""

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> SaveEstimate:
        """Look at what the next `stage` will save. No collective, so that it may fail on one rank."""

    def fence(self) -> None:
        """Wait until no save of this model reads its tensors any more; see `Save.fence`."""

    def stage(self, save: Save, directory: Path) -> ClusterSave:
        """Copy what was prepared towards `directory`, as the model's part of `save`; not durable on return."""

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        """Raise if the cluster in `opened` cannot be loaded here, before anything changes. No collective."""

    def load(self, unit: Path, name: str) -> Mapping[str, Any]:
        """Restore the model from `unit`, whose bytes were verified just now; returns the client state."""
