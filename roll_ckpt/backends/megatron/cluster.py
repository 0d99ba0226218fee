"""A model with its optimizer, scheduler and random states, by itself or as a cluster of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt.backends.backend import ClusterOptions
from roll_ckpt.backends.megatron import requirement
from roll_ckpt.backends.megatron.facts import FRAMEWORK, content_metadata_of, describe
from roll_ckpt.backends.megatron.handle import MegatronHandle, attach
from roll_ckpt.backends.megatron.model import MegatronModel
from roll_ckpt.backends.megatron.save import Prepared
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save

_CLIENT_STATE = "roll_ckpt.client_state"


def cluster_of(trained: MegatronModel, options: ClusterOptions) -> MegatronCluster:
    """The model as a cluster; see `backend.backend_of`."""
    requirement.check()
    if options.exclude_frozen_parameters:
        raise UnsupportedError(
            f"cluster {options.name}: roll_ckpt does not support exclude_frozen_parameters under Megatron-core: "
            "its load wants every parameter; leave it out"
        )
    return MegatronCluster(
        attach(
            trained.model,
            trained.optimizer,
            trained.scheduler,
            settings=options.settings,
            cluster=options.name,
            sharding_type=trained.sharding_type,
            save_only_model=options.save_only_model,
        )
    )


class MegatronCluster:
    """What `attach` bound, as a cluster of a pipeline: see `cluster.Backend`."""

    framework = FRAMEWORK

    def __init__(self, attached: MegatronHandle) -> None:
        self.ranks = RankGroup.current()
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
        cluster_save = save.add_cluster(ours.cluster, describe(content_metadata_of(ours.sharding_type)))
        ours.stage(save, cluster_save, directory, prepared.state if prepared else self._make(), prepared)
        return cluster_save

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        self._attached.check(opened.directory / self._attached.cluster)

    def load(self, checkpoint_dir: Path, name: str) -> Mapping[str, Any]:
        loaded = self._attached.restore(checkpoint_dir / self._attached.cluster, verified=True)
        client_state: Mapping[str, Any] = loaded.get(_CLIENT_STATE, {})
        return client_state
