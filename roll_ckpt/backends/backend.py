"""What the pipeline asks of a framework, and the table of frameworks that it knows.

Another framework is a folder beside this file with a module `cluster`, and a row in `FRAMEWORKS`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from roll_ckpt.config import Settings
from roll_ckpt.errors import ConfigError
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
    ranks: RankGroup

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

    def load(self, checkpoint_dir: Path, name: str) -> Mapping[str, Any]:
        """Restore the model from `unit`, whose bytes were verified just now; returns the client state."""


@dataclass(frozen=True)
class ClusterOptions:
    """How a cluster is to be saved; see `pipeline.cluster.Cluster`."""

    name: str
    settings: Settings
    save_only_model: bool
    exclude_frozen_parameters: bool


@dataclass(frozen=True)
class Framework:
    """One framework: what it calls its models, and the module whose `cluster_of(trained, options)` makes a Backend.

    `base` is the qualified name of a class; objects of it and of its subclasses are recognised. The module is
    imported only then: nobody needs a framework that the script does not use.
    """

    base: str
    module: str

    def recognises(self, trained: object) -> bool:
        """Whether `trained` is a model of this framework. Imports nothing."""
        return any(f"{kind.__module__}.{kind.__qualname__}" == self.base for kind in type(trained).__mro__)


FRAMEWORKS = (
    Framework("deepspeed.runtime.engine.DeepSpeedEngine", "roll_ckpt.backends.deepspeed.cluster"),
    Framework("roll_ckpt.backends.megatron.model.MegatronModel", "roll_ckpt.backends.megatron.cluster"),
)


def backend_of(trained: object, options: ClusterOptions) -> Backend:
    """Wire a model to us under its framework; every rank calls. No collective.

    Raises:
        ConfigError: no framework recognises it, or the engine's own configuration contradicts the settings.
        UnsupportedError: it uses what is refused by name.
    """
    for framework in FRAMEWORKS:
        if framework.recognises(trained):
            made: Backend = importlib.import_module(framework.module).cluster_of(trained, options)
            return made
    raise ConfigError(
        f"cluster {options.name}: trained is {type(trained).__name__}; give a DeepSpeedEngine, or a MegatronModel"
    )
