"""A model with its optimizer, scheduler and random states, by itself or as a cluster of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt.backends.megatron.facts import FRAMEWORK, content_metadata_of, describe
from roll_ckpt.backends.megatron.handle import MegatronHandle
from roll_ckpt.backends.megatron.save import Prepared
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save

_CLIENT_STATE = "roll_ckpt.client_state"


class MegatronCluster:
    """What `attach` bound, as a cluster of a pipeline: see `cluster.Backend`."""

    framework = FRAMEWORK

    def __init__(self, attached: MegatronHandle) -> None:
        self.world = RankGroup.current()
        self._attached = attached
        self._make: Callable[[], dict[str, Any]] = dict
        self._prepared: Prepared | None = None

    def estimate_bytes(self) -> int:
        return self._attached.estimate_bytes()

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> SaveEstimate:
        self._make = lambda: {**self._attached.state(step), _CLIENT_STATE: dict(client_state)}
        if not self._attached.alone:
            return SaveEstimate(self.estimate_bytes())
        self._prepared = self._attached.prepare(self._make())
        return SaveEstimate(self._prepared.nbytes, self._prepared.plan)

    def fence(self) -> None:
        self._attached.fence()

    def stage(self, save: Save, directory: Path) -> ClusterSave:
        ours, prepared = self._attached, self._prepared
        self._prepared = None  # or else it would hold the tensors until the next save
        ticket = save.ticket(ours.cluster, describe(content_metadata_of(ours.form)))
        ours.stage(ticket, directory, prepared.state if prepared else self._make(), prepared)
        return ticket

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        self._attached.check(opened.directory / self._attached.cluster)

    def load(self, unit: Path, name: str) -> Mapping[str, Any]:
        loaded = self._attached.restore(unit / self._attached.cluster, verified=True)
        client_state: Mapping[str, Any] = loaded.get(_CLIENT_STATE, {})
        return client_state
