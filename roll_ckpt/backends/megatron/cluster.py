"""A Megatron model as a cluster of a pipeline: the `Backend` that the pipeline saves and loads through."""

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
from roll_ckpt.formats.torch_zip import unsavable
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save

_CLIENT_STATE = "roll_ckpt.client_state"


def cluster_of(trained: MegatronModel, options: ClusterOptions) -> MegatronCluster:
    """The model as a `Backend`; see `backends.backend.backend_of`, which documents the errors."""
    requirement.check()
    if options.exclude_frozen_parameters:
        raise UnsupportedError(
            f"cluster {options.name}: roll_ckpt does not support exclude_frozen_parameters under Megatron-core: "
            "its load needs every parameter; leave the option out"
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
    """A model that `attach` has bound, as a cluster of a pipeline; see `backends.backend.Backend` for its methods."""

    framework = FRAMEWORK

    def __init__(self, handle: MegatronHandle) -> None:
        self.ranks = RankGroup.current()
        self._handle = handle
        self._make_state: Callable[[], dict[str, Any]] = dict
        self._prepared: Prepared | None = None

    def estimate_bytes(self) -> int:
        return self._handle.estimate_bytes()

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> SaveEstimate:
        if self.ranks.rank == 0:  # which alone saves it
            unsavable.check(dict(client_state), "client_state")
        self._make_state = lambda: {**self._handle.state(step), _CLIENT_STATE: dict(client_state)}
        if not self._handle.alone:
            return SaveEstimate(self.estimate_bytes())
        self._prepared = self._handle.prepare(self._make_state())
        return SaveEstimate(self._prepared.nbytes, self._prepared.plan)

    def fence(self) -> None:
        self._handle.fence()

    def stage(self, save: Save, directory: Path) -> ClusterSave:
        handle, prepared = self._handle, self._prepared
        self._prepared = None  # otherwise it would keep the tensors alive until the next save
        cluster_save = save.add_cluster(handle.cluster, describe(content_metadata_of(handle.sharding_type)))
        handle.stage(save, cluster_save, directory, prepared.state if prepared else self._make_state(), prepared)
        return cluster_save

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        self._handle.check(opened.directory / self._handle.cluster)

    def load(self, checkpoint_dir: Path, name: str) -> Mapping[str, Any]:
        loaded = self._handle.restore(checkpoint_dir / self._handle.cluster, verified=True)
        client_state: Mapping[str, Any] = loaded.get(_CLIENT_STATE, {})
        return client_state
