"""A DeepSpeed engine as a cluster of a pipeline: the `Backend` that the pipeline saves and loads through."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt import names
from roll_ckpt.backends.backend import ClusterOptions
from roll_ckpt.backends.deepspeed.facts import FRAMEWORK
from roll_ckpt.backends.deepspeed.index import MODEL_ONLY_FILE, parameters_of
from roll_ckpt.backends.deepspeed.install import attach, stock
from roll_ckpt.backends.deepspeed.mismatch import check_model_parallel, check_resuming, check_world_size
from roll_ckpt.backends.deepspeed.refusals import refuse_parts
from roll_ckpt.backends.deepspeed.save import check_client_state, run_stock
from roll_ckpt.backends.deepspeed.saved import of_facts
from roll_ckpt.backends.deepspeed.section import section_of, source_of
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes
from roll_ckpt.config import Settings
from roll_ckpt.disk import tree
from roll_ckpt.errors import ConfigError, NotFound, UnsupportedError
from roll_ckpt.formats.image import FileImage
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.compare import compare_models
from roll_ckpt.save.begin import SaveEstimate
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save


def cluster_of(engine: DeepSpeedEngine, options: ClusterOptions) -> DeepSpeedCluster:
    """The engine as a `Backend`; see `backends.backend.backend_of`, which documents the errors."""
    return DeepSpeedCluster(engine, options)


class DeepSpeedCluster:
    """A `DeepSpeedEngine` as a cluster of a pipeline; see `backends.backend.Backend` for its methods.

    Raises:
        ConfigError: the engine's own `checkpoint.roll_ckpt` contradicts `options.settings`, or its config asks for
            another checkpoint engine too.
        UnsupportedError: the engine uses a feature that this version refuses; the message names it.
    """

    framework = FRAMEWORK

    def __init__(self, engine: DeepSpeedEngine, options: ClusterOptions) -> None:
        _check_section(engine, options.settings, options.name)
        if options.save_only_model:
            refuse_parts(engine)
        self._engine = engine
        self._cluster = options.name
        self._save_only_model = options.save_only_model
        self._exclude_frozen = options.exclude_frozen_parameters
        self._client_state: Mapping[str, Any] = {}
        self._checkpoint_engine = attach(
            engine, options.settings, options.name, "the pipeline", async_save=options.settings.async_save is not False
        )
        self.ranks = self._checkpoint_engine.ranks

    def estimate_bytes(self) -> int:
        return estimate_bytes(self._engine)

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> SaveEstimate:
        if not self._save_only_model:
            check_client_state(self._engine, client_state)
        self._client_state = client_state
        return SaveEstimate(self.estimate_bytes())

    def fence(self) -> None:
        self._checkpoint_engine.fence()

    def stage(self, save: Save, directory: Path) -> ClusterSave:
        arguments: dict[str, Any] = {"exclude_frozen_parameters": self._exclude_frozen}
        if self._save_only_model:
            cluster_save = run_stock(
                self._checkpoint_engine, self._stock_model_only, save, directory, MODEL_ONLY_FILE, arguments
            )
        else:
            name = save.attempt.name
            arguments |= {"client_state": self._client_state, "save_latest": False}
            cluster_save = run_stock(
                self._checkpoint_engine, stock("save_checkpoint"), save, directory, name, arguments
            )
        if cluster_save.rank == 0:
            self._add_stock_files(cluster_save, directory)
        return cluster_save

    def _stock_model_only(self, engine: Any, save_dir: str, tag: str, **kwargs: Any) -> None:
        if not stock("save_16bit_model")(engine, save_dir, tag, **kwargs):
            raise UnsupportedError(
                f"cluster {self._cluster}: save_only_model under ZeRO-3 needs zero_optimization."
                "stage3_gather_16bit_weights_on_model_save: true in the DeepSpeed config"
            )

    def _add_stock_files(self, cluster_save: ClusterSave, directory: Path) -> None:
        """Adopt the scripts that DeepSpeed writes beside the tag, and stage `latest` as DeepSpeed would write it."""
        name = cluster_save.attempt.name
        try:
            for path in tree.walk(directory):
                if path.partition("/")[0] != name and path != MODEL_ONLY_FILE:
                    cluster_save.adopt(directory / path)
            if not self._save_only_model:
                cluster_save.stage(directory / names.LATEST, FileImage.of_bytes(name.encode()), overlap=False)
        except Exception as problem:
            cluster_save.fail(problem)

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        engine_saved = of_facts(opened.manifest.clusters[self._cluster])
        check_world_size(engine_saved.world_size, self.ranks.size, where)
        check_model_parallel(engine_saved, self._engine, where)
        check_resuming(engine_saved, self._engine, where)
        saved = opened.parameters(self._cluster, self.ranks.rank)
        compare_models(saved, parameters_of(self._engine), where)

    def load(self, checkpoint_dir: Path, name: str) -> Mapping[str, Any]:
        self._checkpoint_engine.verified = checkpoint_dir
        try:
            path, client_state = self._engine.load_checkpoint(str(checkpoint_dir / self._cluster), tag=name)
        finally:
            self._checkpoint_engine.verified = None
        if path is None:
            raise NotFound(
                f"{checkpoint_dir / self._cluster}: DeepSpeed found no files of tag {name} to load on rank "
                f"{self.ranks.rank}; see `roll-ckpt verify {checkpoint_dir}`, or resume from another checkpoint"
            )
        return dict(client_state)


def _check_section(engine: DeepSpeedEngine, settings: Settings, cluster: str) -> None:
    """ConfigError if a key that the engine's own section sets has another value in the pipeline's configuration."""
    section = section_of(engine)
    for key in sorted(section.model_fields_set) if section is not None else ():
        value = cluster if key == "cluster" else getattr(settings, key)
        if getattr(section, key) != value:
            raise ConfigError(
                f"cluster {cluster}: {source_of(engine, key)} sets {key} to {getattr(section, key)!r}, the pipeline's "
                f"configuration to {value!r}; remove one of them"
            )
