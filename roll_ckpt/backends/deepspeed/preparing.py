"""What a load looks at before DeepSpeed changes anything: whether this engine can load the checkpoint, and how."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine

from roll_ckpt.backends.deepspeed import saved as saved_engine
from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine
from roll_ckpt.backends.deepspeed.index import parameters_of
from roll_ckpt.backends.deepspeed.mismatch import (
    check_framework,
    check_model_parallel,
    check_resuming,
    check_world_size,
)
from roll_ckpt.backends.deepspeed.saved import Files, SavedEngine
from roll_ckpt.backends.deepspeed.sources import Indexed, Sharded, Whole, indexed
from roll_ckpt.backends.deepspeed.weights import Weights
from roll_ckpt.errors import Damaged, ModelMismatch, Unreadable
from roll_ckpt.load.checkpoint import OpenedCheckpoint, as_unreadable
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes

Call = Mapping[str, Any]
"""The arguments of DeepSpeed's `load_checkpoint`, by name."""


def is_resuming(call: Call) -> bool:
    """Whether the optimizer's states are loaded too."""
    return bool(call["load_optimizer_states"]) and not call["load_module_only"]


def prepare(checkpoint_engine: RollCheckpointEngine, reader: Reader, directory: Path, call: Call) -> Weights | None:
    """Check that this engine can load the checkpoint in `directory`, and its bytes. Every rank calls; blocks.

    Returns what loads the weights where DeepSpeed cannot do that by itself. Of a checkpoint that roll_ckpt did not save
    each rank loads the files that it needs, once more than the load itself: a damaged one would stop one rank alone.

    Raises, on every rank and with nothing loaded:
        ModelMismatch, UnsupportedError, NotFound: this engine cannot load it; see `mismatch` and `saved.Files.within`.
        Damaged, Unreadable: a file is damaged, or cannot be read.
    """
    found: list[Weights | None] = []
    ranks, opened = checkpoint_engine.ranks, reader.checkpoint

    def look() -> None:
        look_at = _Look(checkpoint_engine, reader, directory, call)
        found.append(look_at.foreign() if opened is None else look_at.ours(opened))

    timeout_s = checkpoint_engine.settings.commit_timeout_s
    ranks.run_on_all_ranks(look, timeout_s, working=opened is None)
    if opened is not None and checkpoint_engine.verified != opened.directory:
        check_bytes(ranks, opened.directory, timeout_s)
    return found[0]


class _Look:
    """One rank's look at one checkpoint before a load."""

    def __init__(self, checkpoint_engine: RollCheckpointEngine, reader: Reader, directory: Path, call: Call) -> None:
        self._checkpoint_engine = checkpoint_engine
        self._engine: DeepSpeedEngine = checkpoint_engine.engine
        self._ranks = checkpoint_engine.ranks
        self._reader = reader
        self._directory = directory
        self._call = call
        self._resuming = is_resuming(call)

    def _load(self, path: Path) -> Any:
        try:
            with as_unreadable(path):
                return self._reader.load(path, "cpu")
        except Unreadable as problem:
            if isinstance(problem.__cause__, OSError) and problem.__cause__.errno == errno.EINVAL:
                # torch.load looks for the end of a file that was cut off in front of its beginning.
                raise Damaged(f"{path}: cannot be read: it is truncated, or not a torch file") from problem
            raise

    def ours(self, opened: OpenedCheckpoint) -> Weights | None:
        """Of a checkpoint of ours, by its manifest and its tensor index."""
        cluster = self._cluster(opened)
        facts = opened.manifest.clusters[cluster]
        check_framework(facts, str(self._directory))
        files = Files.within(self._directory)
        saved = saved_engine.of_facts(facts)
        if self._resuming and "optimizer_state" not in facts:  # saved before they were recorded
            told, _ = saved_engine.of_files(self._engine, files, self._load, resuming=True)
            saved = SavedEngine(**{**vars(told), "zero_stage": saved.zero_stage, "world_size": saved.world_size})
        self._check(saved, files, self._ranks.size)
        if self._call["custom_load_fn"] is None and not self._cut_otherwise(saved.world_size):
            told_parameters = opened.parameters(cluster, self._ranks.rank)
            compare_models(
                told_parameters, parameters_of(self._engine), str(self._directory), self._call["load_module_strict"]
            )
        if not self._needs_weights(files):
            return None
        by_index = None
        if files.partitioned and self._engine.mp_world_size == 1:
            by_index = indexed(opened, cluster, saved.world_size)
        return self._weights(files, by_index)

    def foreign(self) -> Weights | None:
        """Of a checkpoint that roll_ckpt did not save, by DeepSpeed's files."""
        files = Files.within(self._directory)
        saved, model = saved_engine.of_files(self._engine, files, self._load, resuming=self._resuming)
        self._check(saved, files, self._engine.seq_dp_world_size)
        if self._call["custom_load_fn"] is None and not self._in_parts():
            self._compare(files, model)
        if not self._needs_weights(files):
            return None
        if files.partitioned:
            shards = self._shards(files, model)
            for rank in range(self._ranks.rank, shards.world_size, self._ranks.size):
                shards.check(rank)
        return self._weights(files, None)

    def _check(self, saved: SavedEngine, files: Files, world_size: int) -> None:
        where, live_stage = str(self._directory), self._engine.zero_optimization_stage()
        check_model_parallel(saved, self._engine, where)
        if self._resuming:
            check_resuming(saved, self._engine, where)
            if live_stage or version.partitions_without_zero(self._engine):
                check_world_size(saved.world_size, world_size, where)
        elif self._in_parts() and (files.partitioned or live_stage == 3):
            # DeepSpeed loads these by itself, each rank its own file.
            if not files.partitioned or live_stage != 3:
                raise ModelMismatch(
                    f"{where} was saved at ZeRO stage {saved.zero_stage} and this engine has stage {live_stage}; "
                    "nothing was loaded. Weights of models with experts or stages of a pipeline need the same stage"
                )
            check_world_size(saved.world_size, world_size, where)

    def _cluster(self, opened: OpenedCheckpoint) -> str:
        """The cluster to load: that whose directory was given (a pipeline saves each in its own), or the engine's."""
        clusters = opened.manifest.clusters
        choices = (Path(self._call["load_dir"]).resolve().name, self._checkpoint_engine.cluster, next(iter(clusters)))
        return next(name for name in choices if name in clusters)

    def _in_parts(self) -> bool:
        """Whether the ranks hold different parameters, so that DeepSpeed loads them from many files by itself."""
        return isinstance(self._engine, PipelineEngine) or bool(self._engine.has_moe_layers)

    def _cut_otherwise(self, world_size: int) -> bool:
        return self._in_parts() and world_size != self._ranks.size

    def _needs_weights(self, files: Files) -> bool:
        partitioned = files.partitioned or self._engine.zero_optimization_partition_weights()
        return partitioned and not self._resuming and not self._in_parts()

    def _weights(self, files: Files, by_index: Indexed | None) -> Weights:
        timeout_s = self._checkpoint_engine.settings.commit_timeout_s
        return Weights(self._engine, self._ranks, files, by_index, timeout_s)

    def _shards(self, files: Files, model: Mapping[str, Any]) -> Sharded:
        return Sharded(files, model, version.checkpoint_mp_rank(self._engine), self._load)

    def _compare(self, files: Files, model: Mapping[str, Any]) -> None:
        source = self._shards(files, model) if files.partitioned else Whole(model["module"])
        live, has = parameters_of(self._engine), self._engine.module.state_dict(keep_vars=True)
        buffers = {*(model.get("buffer_names") or ()), *(name for name in has if name not in live)}
        saved = {name: told for name, told in source.shapes().items() if name not in buffers}
        compare_models(saved, live, str(self._directory), self._call["load_module_strict"])
