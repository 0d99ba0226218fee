"""Cluster: one named model of a pipeline, saved and loaded through its framework's backend."""

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
    """A model that a pipeline checkpoints under `name`. Every rank of the job makes one.

    `BasePipeline` calls its methods; your code makes it, and reads `loaded_client_state` after `resume()`.

    Args:
        name: one path component; it names the cluster's folder in the checkpoint.
        trained: a `DeepSpeedEngine` or a `MegatronModel`, this rank's part of the model.
        tokenizer, processor, config: anything with `save_pretrained(directory)`; rank 0 writes them beside the
            cluster's files at each save, and they are listed in the manifest.
        save_only_model: save only the weights (DeepSpeed: consolidated, in 16 bits); such a cluster cannot be
            resumed.
        exclude_frozen_parameters: leave frozen parameters out, as DeepSpeed's `engine.save_checkpoint` does.
        client_state: a mapping that is saved with the model, or a function that returns one at each save.

    Raises:
        ConfigError: `name` is not a path component that is valid everywhere.
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
        """The `client_state` of the checkpoint that was loaded last; empty before."""
        self._pretrained = [part for part in (tokenizer, processor, config) if part is not None]
        self._save_only_model = save_only_model
        self._exclude_frozen = exclude_frozen_parameters
        self._client_state = client_state
        self._save: Save | None = None
        self._attached: Backend | None = None

    @property
    def world_size(self) -> int:
        """The number of ranks that hold a part of this model: all ranks of the job.

        Raises:
            ConfigError: the cluster is not registered with a pipeline yet.
        """
        return self._backend.ranks.size

    @property
    def _backend(self) -> Backend:
        if self._attached is None:
            raise ConfigError(f"cluster {self.name}: register it with set_checkpoint_clusters() first")
        return self._attached

    def attach(self, settings: PipelineConfig) -> None:
        """Attach the backend of the model's framework under the pipeline's settings. Every rank calls. No collective.

        Raises:
            ConfigError: no framework recognises the model, or the engine's own `checkpoint.roll_ckpt` contradicts
                `settings`.
            UnsupportedError: the model uses a feature that roll_ckpt does not support.
        """
        options = ClusterOptions(self.name, settings, self._save_only_model, self._exclude_frozen)
        self._attached = backend_of(self.trained, options)

    def estimate_bytes(self) -> int:
        """About how many bytes this rank will write at each save. No collective."""
        return self._backend.estimate_bytes()

    def prepare(self, step: int) -> SaveEstimate:
        """Inspect what the next save will hold and get the client state, before the save begins.

        This rank alone. Blocks until no pending save reads the model's tensors any more. It may raise anything that
        `client_state` raises: `BasePipeline` then begins no save on any rank.
        """
        state = self._client_state() if callable(self._client_state) else self._client_state
        self._backend.fence()
        return self._backend.prepare(step, dict(state or {}))

    def bind(self, save: Save) -> None:
        """Set the save that the next `do_checkpoint` is a part of."""
        self._save = save

    def do_checkpoint(
        self, global_step: int, is_last_step: bool | None = None, blocking: bool = False
    ) -> dict[str, Any]:
        """Stage this cluster's part of the bound save. Every rank calls, between two optimizer steps.

        Returns when all but the overlappable tensors have been copied; with `blocking`, when all have. Not durable on
        return: the pipeline commits all clusters together.

        Returns:
            This rank's metrics so far, in seconds: `total` and `stage` under `time/{cluster}/do_checkpoint/`.

        Raises:
            ConfigError: no save is bound; only `BasePipeline.do_checkpoint` calls this.
            Exception: what the framework's save raises. This rank's vote is then a no.
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
        """Let tokenizer, processor and config write to a temporary folder, then move their files to `directory`.

        Other ranks write in `directory` at the same time. An error turns this rank's vote into a no.
        """
        if not self._pretrained:
            return
        temporary = cluster_save.attempt.directory / f"{self.name}.companions"
        try:
            writes.make_dir(temporary)
            for part in self._pretrained:
                part.save_pretrained(str(temporary))
            for path in list(tree.walk(temporary)):
                if cluster_save.holds(directory / path) or tree.exists(directory / path):
                    raise ConfigError(
                        f"cluster {self.name}: its tokenizer, processor or config writes {path}, which its framework "
                        "writes too; give it another name"
                    )
                writes.make_dirs((directory / path).parent)
                writes.rename(temporary / path, directory / path)
                cluster_save.adopt(directory / path)
            writes.remove_tree(temporary)
        except Exception as problem:
            cluster_save.fail(problem)

    def load(self, checkpoint_dir: Path, name: str) -> None:
        """Restore the model from its part of `checkpoint_dir`, which was verified just now. `name` is the checkpoint's.

        Every rank calls; blocks. The model's tensors change, and `loaded_client_state` is set.

        Raises:
            NotFound: the checkpoint does not hold this cluster.
            ModelMismatch: it holds another model. Damaged, Unreadable: a file cannot be used.
        """
        self.loaded_client_state = dict(self._backend.load(checkpoint_dir, name))

    def check(self, checkpoint_dir: Path) -> None:
        """Raise unless `checkpoint_dir` holds a state from which this cluster can resume. No collective; loads nothing.

        Raises:
            NotFound: the cluster was not saved, or only its weights were.
            ModelMismatch: it was saved under another framework, or is another model.
            UnsupportedError: it cannot be loaded with this job's number of ranks or parallel layout.
        """
        opened = OpenedCheckpoint(checkpoint_dir)
        clusters, where = opened.manifest.clusters, f"{checkpoint_dir}: cluster {self.name}"
        if self.name not in clusters:
            raise NotFound(
                f"{checkpoint_dir}: holds clusters {', '.join(sorted(clusters))}, not {self.name}; "
                "register the clusters that were saved, or resume from another checkpoint"
            )
        if clusters[self.name].get("save_only_model"):
            raise NotFound(f"{where} was saved with save_only_model; it holds no optimizer to resume")
        framework = clusters[self.name].get("framework")
        if framework != self._backend.framework:
            raise ModelMismatch(
                f"{where} was saved under {framework} and this job trains it under {self._backend.framework}; "
                "resume it under the framework that saved it"
            )
        self._backend.check(opened, where)
