"""Cluster: one named model of a pipeline, saved and loaded through its framework's own calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.backends.backend import Backend, ClusterOptions, backend_of
from roll_ckpt.config import PipelineConfig
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import ConfigError, ModelMismatch, NotFound
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save


class Cluster:
    """A model that a pipeline checkpoints by `name`.

    Args:
        name: one path component; the cluster's folder in the checkpoint.
        trained: a `DeepSpeedEngine`, or a `MegatronModel`; every rank of its world holds one.
        tokenizer, processor, config: anything with `save_pretrained(directory)`; written by rank 0 beside the
            cluster's files and listed in the manifest.
        save_only_model: save the weights alone (DeepSpeed: consolidated, in 16 bits); such a cluster cannot be
            resumed.
        exclude_frozen_parameters: as in DeepSpeed's `engine.save_checkpoint`.
        client_state: a mapping saved with the model, or a function that returns one at each save.
    """

    def __init__(
        self,
        name: str,
        trained: Any,
        *,
        tokenizer: Any = None,
        processor: Any = None,
        config: Any = None,
        save_only_model: bool = False,
        exclude_frozen_parameters: bool = False,
        client_state: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        names.check_name("cluster", name)
        self.name = name
        self.trained = trained
        self.loaded_client_state: dict[str, Any] = {}
        """What the last `load` found in `client_state`."""
        self._pretrained = [part for part in (tokenizer, processor, config) if part is not None]
        self._save_only_model = save_only_model
        self._exclude_frozen = exclude_frozen_parameters
        self._client_state = client_state
        self._save: Save | None = None
        self._attached: Backend | None = None

    @property
    def world_size(self) -> int:
        return self._backend.ranks.size

    @property
    def _backend(self) -> Backend:
        if self._attached is None:
            raise ConfigError(f"cluster {self.name}: register it with set_checkpoint_clusters() first")
        return self._attached

    def attach(self, settings: PipelineConfig) -> None:
        """Wire the model to us under the pipeline's settings; every rank calls. No collective.

        Raises:
            ConfigError: the engine's own `checkpoint.roll_ckpt` contradicts the pipeline's configuration.
            UnsupportedError: the model uses what is refused by name.
        """
        options = ClusterOptions(self.name, settings, self._save_only_model, self._exclude_frozen)
        self._attached = backend_of(self.trained, options)

    def estimate_bytes(self) -> int:
        """About what this rank will write at each save, in bytes."""
        return self._backend.estimate_bytes()

    def prepare(self, step: int) -> SaveEstimate:
        """Look at what is about to be saved and ask for the client state, before anything is begun. No collective."""
        state = self._client_state() if callable(self._client_state) else self._client_state
        self._backend.fence()
        return self._backend.prepare(step, dict(state or {}))

    def bind(self, save: Save) -> None:
        """The save that the next `do_checkpoint` is a part of."""
        self._save = save

    def do_checkpoint(
        self, global_step: int, is_last_step: bool | None = None, blocking: bool = False
    ) -> dict[str, Any]:
        """Stage this cluster's part of the bound save; every rank calls, between two optimizer steps.

        Returns when all but the stable tensors are copied; with `blocking`, when all are. Not durable on
        return: the pipeline commits all clusters together. Returns this rank's metrics so far.
        """
        save = self._save
        if save is None:
            raise ConfigError(
                f"cluster {self.name}: do_checkpoint is called by BasePipeline.do_checkpoint, which begins the save"
            )
        began = time.monotonic()
        directory = save.attempt.checkpoint_dir / self.name
        cluster_save = self._backend.stage(save, directory)
        cluster_save.facts["save_only_model"] = self._save_only_model
        if cluster_save.rank == 0:
            self._write_pretrained_files(cluster_save, directory)
        if blocking:
            cluster_save.fence()
        prefix = f"time/{self.name}/do_checkpoint"
        return {
            f"{prefix}/total": time.monotonic() - began,
            f"{prefix}/stage": cluster_save.timing.stage_s,
        }

    def _write_pretrained_files(self, cluster_save: ClusterSave, directory: Path) -> None:
        """Let tokenizer and the like write aside, then count what came of it: other ranks write in `directory`."""
        if not self._pretrained:
            return
        on_side_branch = cluster_save.attempt.directory / f"{self.name}.companions"
        try:
            writes.make_dir(on_side_branch)
            for part in self._pretrained:
                part.save_pretrained(str(on_side_branch))
            for path in list(tree.walk(on_side_branch)):
                if cluster_save.holds(directory / path) or tree.exists(directory / path):
                    raise ConfigError(
                        f"cluster {self.name}: its tokenizer, processor or config writes {path}, which its framework "
                        "writes too; give it another name"
                    )
                writes.make_dirs((directory / path).parent)
                writes.rename(on_side_branch / path, directory / path)
                cluster_save.adopt(directory / path)
            writes.remove_tree(on_side_branch)
        except Exception as problem:
            cluster_save.fail(problem)

    def load(self, checkpoint_dir: Path, name: str) -> None:
        """Restore the model from this cluster's part of the checkpoint `unit`, whose bytes were verified just now.

        Every rank calls; blocks.

        Raises:
            NotFound: the checkpoint does not hold this cluster. ModelMismatch, Damaged: see `loader`.
        """
        self.loaded_client_state = dict(self._backend.load(checkpoint_dir, name))

    def check(self, checkpoint_dir: Path) -> None:
        """Raise unless `unit` holds a resumable state of this cluster's model; nothing is loaded. No collective."""
        opened = OpenedCheckpoint(checkpoint_dir)
        known, where = opened.manifest.clusters, f"{checkpoint_dir}: cluster {self.name}"
        if self.name not in known:
            raise NotFound(
                f"{checkpoint_dir}: holds clusters {', '.join(sorted(known))}, not {self.name}; "
                "register the clusters that were saved, or resume from another checkpoint"
            )
        if known[self.name].get("save_only_model"):
            raise NotFound(f"{where} was saved with save_only_model; it holds no optimizer to resume")
        framework = known[self.name].get("framework")
        if framework != self._backend.framework:
            raise ModelMismatch(
                f"{where} was saved under {framework} and this job trains it under {self._backend.framework}; "
                "resume it under the framework that saved it"
            )
        self._backend.check(opened, where)
