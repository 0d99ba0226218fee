"""Cluster: one named model of a pipeline, saved and loaded through its framework's own calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from roll_ckpt import disk, errors, loader, names, saver
from roll_ckpt.backends import deepspeed as backend
from roll_ckpt.config import PipelineConfig
from roll_ckpt.image import Extent, FileImage

MODEL_ONLY_FILE = "pytorch_model.bin"


class Cluster:
    """A model under DeepSpeed that a pipeline checkpoints by `name`.

    Args:
        name: one path component; the cluster's folder in the checkpoint.
        engine: the `DeepSpeedEngine`; every rank of its world holds one.
        tokenizer, processor, config: anything with `save_pretrained(directory)`; written by rank 0 beside the
            cluster's files and listed in the manifest.
        save_only_model: save the consolidated 16-bit weights alone; such a cluster cannot be resumed.
        exclude_frozen_parameters: as in `engine.save_checkpoint`.
        client_state: a mapping saved with the model, or a function that returns one at each save.
    """

    def __init__(
        self,
        name: str,
        engine: Any,
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
        self.engine = engine
        self.loaded_client_state: dict[str, Any] = {}
        """What the last `load` found in `client_state`."""
        self._pretrained = [part for part in (tokenizer, processor, config) if part is not None]
        self._save_only_model = save_only_model
        self._exclude_frozen = exclude_frozen_parameters
        self._client_state = client_state
        self._client_state_now: dict[str, Any] = {}
        self._save: saver.Save | None = None
        self._ours: backend.RollCheckpointEngine | None = None

    @property
    def world_size(self) -> int:
        return self._attached.world.size

    @property
    def _attached(self) -> backend.RollCheckpointEngine:
        if self._ours is None:
            raise errors.ConfigError(f"cluster {self.name}: register it with set_checkpoint_clusters() first")
        return self._ours

    def attach(self, settings: PipelineConfig) -> None:
        """Wire the engine to us under the pipeline's settings; every rank calls. No collective.

        Raises:
            ConfigError: the engine's own `checkpoint.roll_ckpt` contradicts the pipeline's configuration.
            UnsupportedError: the engine uses what is refused by name.
        """
        own = backend.section_of(self.engine)
        if own is not None:
            for key in sorted(own.model_fields_set):
                wanted = self.name if key == "cluster" else getattr(settings, key)
                if getattr(own, key) != wanted:
                    raise errors.ConfigError(
                        f"cluster {self.name}: {backend.SECTION} sets {key} to {getattr(own, key)!r}, the "
                        f"pipeline's configuration to {wanted!r}; remove one of them"
                    )
        self._ours = backend.attach(self.engine, settings, self.name)

    def prepare(self) -> int:
        """Ask for the client state, before anything is begun; return about what this rank will write, in bytes."""
        state = self._client_state() if callable(self._client_state) else self._client_state
        self._client_state_now = dict(state or {})
        return backend.estimate_bytes(self.engine)

    def bind(self, save: saver.Save) -> None:
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
            raise errors.ConfigError(
                f"cluster {self.name}: do_checkpoint is called by BasePipeline.do_checkpoint, which begins the save"
            )
        began = time.monotonic()
        self._attached.fence()
        directory = save.attempt.unit / self.name
        ticket = self._stage(save, directory)
        if ticket.rank == 0:
            self._write_companions(ticket, directory)
        if blocking:
            ticket.fence()
        prefix = f"time/{self.name}/do_checkpoint"
        return {
            f"{prefix}/total": time.monotonic() - began,
            f"{prefix}/stage": ticket.timing.stage_s,
        }

    def _stage(self, save: saver.Save, directory: Path) -> saver.Ticket:
        arguments: dict[str, Any] = {"exclude_frozen_parameters": self._exclude_frozen}
        if self._save_only_model:
            return self._attached.run_stock(self._stock_model_only, save, directory, MODEL_ONLY_FILE, arguments)
        arguments |= {"client_state": self._client_state_now, "save_latest": False}
        return self._attached.run_stock(backend.stock("save_checkpoint"), save, directory, save.attempt.name, arguments)

    def _stock_model_only(self, engine: Any, save_dir: str, tag: str, **kwargs: Any) -> None:
        if not backend.stock("save_16bit_model")(engine, save_dir, tag, **kwargs):
            raise errors.UnsupportedError(
                f"cluster {self.name}: save_only_model under ZeRO-3 needs "
                "stage3_gather_16bit_weights_on_model_save in the DeepSpeed config"
            )

    def _write_companions(self, ticket: saver.Ticket, directory: Path) -> None:
        try:
            for part in self._pretrained:
                part.save_pretrained(str(directory))
            for path in disk.walk(directory):
                if path.partition("/")[0] != ticket.save.attempt.name and path != MODEL_ONLY_FILE:
                    ticket.adopt(directory / path)
            if not self._save_only_model:
                latest = ticket.save.attempt.name.encode()
                ticket.stage(directory / names.LATEST, bytes_image(latest), overlap=False)
        except Exception as problem:
            ticket.fail(problem)

    def load(self, unit: Path, name: str) -> None:
        """Restore the engine from this cluster's part of the checkpoint `unit`, whose bytes were verified just now.

        Every rank calls; blocks.

        Raises:
            NotFound: the checkpoint does not hold this cluster. ModelMismatch, Damaged: see `loader`.
        """
        self._attached.verified = unit
        try:
            path, client_state = self.engine.load_checkpoint(str(unit / self.name), tag=name)
        finally:
            self._attached.verified = None
        if path is None:
            raise errors.NotFound(f"{unit / self.name}: DeepSpeed found nothing to load for cluster {self.name}")
        self.loaded_client_state = dict(client_state)

    def check(self, unit: Path) -> None:
        """Raise unless `unit` holds a resumable state of this cluster's model; nothing is loaded."""
        opened = loader.Unit(unit)
        if self.name not in opened.manifest.clusters:
            raise errors.NotFound(
                f"{unit}: holds clusters {', '.join(sorted(opened.manifest.clusters))}, not {self.name}; "
                "register the clusters that were saved, or resume from another checkpoint"
            )
        if disk.exists(unit / self.name / MODEL_ONLY_FILE):
            raise errors.NotFound(
                f"{unit}: cluster {self.name} was saved with save_only_model; it holds no optimizer to resume"
            )
        backend.check_world(
            opened.manifest.clusters[self.name], self._attached.world.size, f"{unit}: cluster {self.name}"
        )
        live = backend.parameters_of(self.engine)
        saved = opened.parameters(self.name, self._attached.world.rank)
        loader.compare_models(saved, live, f"{unit}: cluster {self.name}")


def bytes_image(data: bytes) -> FileImage:
    """The image of a file that is just these bytes."""
    return FileImage(len(data), (Extent(0, data),) if data else ())
