"""What the pipeline asks of a framework (`Backend`), and the table of frameworks that it recognises (`FRAMEWORKS`).

To add a framework, add a folder beside this file with a module `cluster`, and a row to `FRAMEWORKS`.
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
    """One cluster's model on this rank, under its framework. All that differs between frameworks is behind it.

    Every rank makes the same calls in the same order. If `stage` raises or records an error, this rank votes no.
    """

    framework: str
    """The name of the framework, as the manifest records it."""
    ranks: RankGroup
    """The ranks of this job; each holds a part of the model."""

    def estimate_bytes(self) -> int:
        """About how many bytes this rank will write in one save. No collective."""

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> SaveEstimate:
        """Look at what the next `stage` will save. No collective, so that it may raise on one rank alone."""

    def fence(self) -> None:
        """Block until no pending save reads this model's tensors any more; see `Save.fence`.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """

    def stage(self, save: Save, directory: Path) -> ClusterSave:
        """Stage the model's files under `directory` as its part of `save`; returns that part.

        Blocks until everything but the overlappable tensors has been copied. Not durable on return.
        """

    def check(self, opened: OpenedCheckpoint, where: str) -> None:
        """Raise if this job cannot load the cluster from `opened`; changes nothing. No collective.

        `where` begins the messages: it names the checkpoint and the cluster.
        """

    def load(self, checkpoint_dir: Path, name: str) -> Mapping[str, Any]:
        """Restore the model from the checkpoint `name` in `checkpoint_dir` and return its client state. Blocks.

        The ranks have verified every byte just before.
        """


@dataclass(frozen=True)
class ClusterOptions:
    """How a cluster is to be saved; see `pipeline.cluster.Cluster`."""

    name: str
    settings: Settings
    save_only_model: bool
    exclude_frozen_parameters: bool


@dataclass(frozen=True)
class Framework:
    """One framework: the class of its models, and the module that makes a `Backend` of them.

    `base` is the qualified name of a class; its instances and those of its subclasses are recognised. `module` has
    the function `cluster_of(trained, options)`. It is imported only once such a model appears, so that nobody needs
    to install a framework that the script does not use.
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
    """Attach roll_ckpt to a model under its framework; every rank calls. No collective.

    Raises:
        ConfigError: no framework recognises `trained`, or the engine's own configuration contradicts the settings.
        UnsupportedError: the model uses a feature that this version refuses; the message names it.
    """
    for framework in FRAMEWORKS:
        if framework.recognises(trained):
            backend: Backend = importlib.import_module(framework.module).cluster_of(trained, options)
            return backend
    raise ConfigError(
        f"cluster {options.name}: trained is {type(trained).__name__}, which no supported framework recognises; "
        "give a DeepSpeedEngine or a MegatronModel"
    )
