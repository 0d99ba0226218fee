"""StateFiles: the pipeline's own files in a checkpoint: WorkerState, and each rank's random states and components."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from roll_ckpt import names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import ConfigError, NotFound, UnsupportedError
from roll_ckpt.formats import manifests
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.formats.torch_zip.safe_pickle import Unloadable
from roll_ckpt.load import trust
from roll_ckpt.load.reader import Reader
from roll_ckpt.native.image import Lifetime
from roll_ckpt.pipeline.worker_state import Stateful, WorkerState
from roll_ckpt.ranks import rng
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.cluster_save import ClusterSave


class LaidOut(NamedTuple):
    """One file as `Layouts.lay_out` describes it."""

    image: FileImage
    unsafe: dict[str, Unloadable]


Components = dict[str, LaidOut]
"""The states of the registered components, by the names of their files."""


def bytes_of(components: Components) -> int:
    """How many bytes their files have."""
    return sum(component.image.nbytes for component in components.values())


class StateFiles:
    """Stages, checks and loads the pipeline's own files. Each rank of a pipeline has one."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config
        self._components: dict[str, Stateful] = {}
        self._layouts = Layouts(trust.allowed(config))
        self._warned: dict[str, set[str]] = {}

    def register(self, name: str, component: Stateful) -> None:
        """Save and load `component` with the pipeline, on this rank.

        Raises:
            ConfigError: `name` cannot be part of a file name, or is registered already.
        """
        names.check_name("stateful component", name)
        if name in self._components:
            raise ConfigError(f"stateful component {name} is registered twice; names must differ")
        self._components[name] = component

    def lay_out(self, rank: int) -> Components:
        """Ask each component for its state and lay it out, before a save begins. This rank alone; copies nothing.

        Raises:
            SaveFailed: an entry of a state cannot be saved; the message names the component and the key.
            Exception: what `state_dict` of a component raises.
        """
        files = {names.stateful_file(name, rank): name for name in self._components}
        return {file: self._lay_out(file, self._components[name].state_dict(), name) for file, name in files.items()}

    def _lay_out(self, file: str, state: object, root: str) -> LaidOut:
        def lifetime_of(storage: Any) -> Lifetime:
            return Lifetime.UNTIL_SAVE_RETURNS

        return LaidOut(*self._layouts.lay_out(file, state, Path(file).stem, lifetime_of, root))

    def stage(
        self, folder: str, rank: int, state: WorkerState, components: Components, cluster_save: ClusterSave
    ) -> None:
        """Stage this rank's files in `folder` of the checkpoint, as a part of `cluster_save`.

        Returns once all is copied; not durable on return. Raises nothing: an error turns the cluster's vote into a no.
        """
        directory = cluster_save.attempt.checkpoint_dir / folder
        try:
            writes.make_dirs(directory)
            rng_file = names.rng_file(rank)
            laid_out = {rng_file: self._lay_out(rng_file, rng.capture_portable(), "the random states"), **components}
            for file, found in laid_out.items():
                trust.warn_unloadable(directory / file, found.unsafe, self._warned.setdefault(file, set()))
                cluster_save.stage(directory / file, found.image, overlap=False)
            if rank == 0:
                image = FileImage.of_bytes(state.to_json(self._warned.setdefault(names.WORKER_STATE, set())))
                cluster_save.stage(directory / names.WORKER_STATE, image, overlap=False)
        except Exception as problem:
            cluster_save.fail(problem)

    def check(self, checkpoint_dir: Path, folder: str, ranks: RankGroup, clusters: list[str]) -> None:
        """Raise unless the checkpoint holds this rank's part of the pipeline's own state. No collective; reads little.

        Raises:
            UnsupportedError: another number of ranks saved it.
            NotFound: a file of this rank is missing, or a registered component was not saved.
        """
        voters = [names.parse_vote_file(vote) for vote in manifests.read(checkpoint_dir).votes]
        for name in clusters:
            saved = sum(voter is not None and voter[0] == name for voter in voters)
            if saved != ranks.size:
                raise UnsupportedError(
                    f"{checkpoint_dir}: {saved} ranks saved cluster {name}, and this job has {ranks.size}; a pipeline "
                    f"resumes on as many ranks as saved it. Start it on {saved} ranks"
                )
        directory = checkpoint_dir / folder
        for path in (directory / names.WORKER_STATE, directory / names.rng_file(ranks.rank)):
            if not tree.exists(path):
                raise NotFound(f"{path}: the checkpoint holds no state of this pipeline for rank {ranks.rank}")
        for name in self._components:
            path = directory / names.stateful_file(name, ranks.rank)
            if not tree.exists(path):
                raise NotFound(
                    f"{path}: the checkpoint holds no state of {name!r} for rank {ranks.rank}; it was saved before the "
                    "component was registered"
                )

    def read(
        self, reader: Reader, checkpoint_dir: Path, folder: str, rank: int
    ) -> tuple[WorkerState, dict[str, Any], dict[str, Any]]:
        """Read the pipeline's state, this rank's random states, and the states of its components by name; set nothing.

        This rank alone; blocks. Errors as `Reader.load`.
        """
        directory = checkpoint_dir / folder
        states = {name: reader.load(directory / names.stateful_file(name, rank), "cpu") for name in self._components}
        path = directory / names.WORKER_STATE
        state = WorkerState.from_json(reader.read_bytes(path), path)
        return state, reader.load(directory / names.rng_file(rank), "cpu"), states

    def load(self, states: dict[str, Any]) -> None:
        """Load the components from their states."""
        for name, component in self._components.items():
            component.load_state_dict(states.pop(name))
