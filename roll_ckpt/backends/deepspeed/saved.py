"""What a checkpoint tells of the engine that saved it: by the manifest's facts, or else by DeepSpeed's own files.

File names and keys: `_get_ckpt_name`, `_get_zero_ckpt_name` and `_common_checkpoint_state` of runtime/engine.py, and
`state_dict` of the optimizers in runtime/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.facts import settings_of, state_keys_of
from roll_ckpt.disk import tree
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged, NotFound
from roll_ckpt.load.checkpoint import as_unreadable

MODEL_STATES = "model_states.pt"

Load = Callable[[Path], Any]
"""Loads the state in a file, without running code of it."""


@dataclass(frozen=True)
class SavedEngine:
    """The engine that saved a checkpoint; None where it is not known."""

    zero_stage: int
    world_size: int
    mp_world_size: int | None = None
    dtype: str | None = None
    optimizer: str | None = None
    state_keys: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()


def of_facts(facts: Mapping[str, Any]) -> SavedEngine:
    """By what `facts.describe` put into the manifest."""
    return SavedEngine(
        zero_stage=facts["zero_stage"],
        world_size=facts["world_size"],
        mp_world_size=facts.get("mp_world_size"),
        dtype=facts.get("dtype"),
        optimizer=facts.get("optimizer"),
        state_keys=frozenset(facts.get("optimizer_state", ())),
        settings=frozenset(facts.get("optimizer_settings", ())),
    )


@dataclass(frozen=True)
class Files:
    """The files of DeepSpeed in the directory of a tag."""

    directory: Path
    names: frozenset[str]

    @classmethod
    def within(cls, directory: Path) -> Files:
        """List `directory`. This rank alone.

        Raises:
            NotFound: it holds no model states of DeepSpeed. Unreadable: the disk does not list it.
        """
        with as_unreadable(directory):
            found = frozenset(ReadRetries().run(partial(tree.list_dir, directory)))
        if not any(name.endswith(MODEL_STATES) for name in found):
            within = sorted(name for name in found if any(directory.glob(f"{name}/*/*{MODEL_STATES}")))
            parts = (
                f" It is a pipeline's checkpoint; the models' directories are {', '.join(within)}." if within else ""
            )
            raise NotFound(
                f"{directory}: holds no DeepSpeed checkpoint: there is no *{MODEL_STATES} in it; nothing was loaded."
                f"{parts} Give load_checkpoint the directory and the tag of a whole checkpoint"
            )
        return cls(directory, found)

    @property
    def partitioned(self) -> bool:
        """Whether ZeRO-3 has cut the parameters, so that each rank has model states of its own."""
        return any(name.startswith("zero_pp_rank_") and name.endswith(MODEL_STATES) for name in self.names)

    def model(self, rank: int, mp_rank: int) -> Path:
        """Model states for data parallel rank `rank`: under ZeRO-3 those of rank 0 if there were fewer ranks, and those
        of the first stage if a pipeline had fewer stages.

        Raises:
            Damaged: there is no such file.
        """
        wanted = [f"mp_rank_{part:02d}_{MODEL_STATES}" for part in (mp_rank, 0)]
        if self.partitioned:
            wanted = [f"zero_pp_rank_{owner}_mp_rank_{mp_rank:02d}_{MODEL_STATES}" for owner in (rank, 0)]
        for name in wanted:
            if name in self.names:
                return self.directory / name
        raise Damaged(f"{self.directory}: the model states are missing ({wanted[0]})")

    def optimizer(self, rank: int, mp_rank: int) -> Path | None:
        """The optimizer's states of data parallel rank `rank` under ZeRO; None if there is no such file."""
        for prefix in ("bf16_", ""):
            name = f"{prefix}zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt"
            if name in self.names:
                return self.directory / name
        return None

    def partition(self, rank: int, mp_rank: int) -> Path:
        """Like `optimizer`.

        Raises:
            Damaged: there is no such file.
        """
        path = self.optimizer(rank, mp_rank)
        if path is None:
            raise Damaged(
                f"{self.directory}: the optimizer states of data parallel rank {rank} are missing "
                f"(zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}_optim_states.pt)"
            )
        return path


def data_parallel_rank(engine: DeepSpeedEngine) -> int:
    """The number of this rank in the names of DeepSpeed's files."""
    return int(dist.get_rank(group=engine.seq_data_parallel_group))


def of_files(engine: DeepSpeedEngine, files: Files, load: Load, *, resuming: bool) -> tuple[SavedEngine, Any]:
    """By the files that this rank would load; also returns the model states. This rank alone; blocks.

    `resuming`: the optimizer's states will be loaded too, so they are looked at.

    Raises:
        Damaged: a file cannot be loaded, or is no state of DeepSpeed. NotFound, OSError: from `load`.
    """
    rank, mp_rank = data_parallel_rank(engine), version.checkpoint_mp_rank(engine)
    path = files.model(rank, mp_rank)
    model = load(path)
    if not isinstance(model, dict) or "module" not in model or not isinstance(model.get("dp_world_size"), int):
        raise Damaged(f"{path}: these are no model states of DeepSpeed")
    told: dict[str, Any] = {"world_size": model["dp_world_size"], "mp_world_size": model.get("mp_world_size")}
    own = files.optimizer(rank, mp_rank)
    partition = own or files.optimizer(0, mp_rank)
    if partition is None:
        return SavedEngine(zero_stage=0, **told, **_plain(model.get("optimizer"))), model
    told["dtype"] = "bfloat16" if partition.name.startswith("bf16_") else None
    if not resuming:
        return SavedEngine(zero_stage=3 if files.partitioned else 1, **told), model
    state = load(partition)
    inner = state.get("optimizer_state_dict") if isinstance(state, dict) else None
    if not isinstance(inner, dict):
        raise Damaged(f"{partition}: these are no optimizer states of DeepSpeed")
    stage = int(inner.get("zero_stage", 3 if files.partitioned else _stage_of_bf16(engine)))
    base = inner.get("base_optimizer_state", inner.get("optimizer_state_dict"))
    if own is None and model["dp_world_size"] == engine.seq_dp_world_size:
        files.partition(rank, mp_rank)
    return SavedEngine(zero_stage=stage, **told, **_base(base)), model


def _stage_of_bf16(engine: DeepSpeedEngine) -> int:
    """The stage at which `BF16_Optimizer` saved, which it does not tell: 1, or also 0, where its files are the same."""
    return min(1, int(engine.zero_optimization_stage())) if version.BF16_IN_PARTITIONS else 1


def _plain(state: Any) -> dict[str, Any]:
    """Of the optimizer's state in the model states, as it is without ZeRO."""
    if not isinstance(state, dict):
        return {}
    wrapped = "optimizer_state_dict" in state
    return {"dtype": None if wrapped else "float32", **_base(state.get("optimizer_state_dict", state))}


def _base(state: Any) -> dict[str, Any]:
    if not isinstance(state, dict):  # with elastic_checkpoint it is a list of the states
        return {"state_keys": state_keys_of(state)} if isinstance(state, list) else {}
    kept, groups = state.get("state"), state.get("param_groups")
    values: Iterable[Any] = kept.values() if isinstance(kept, dict) else ()
    return {"state_keys": state_keys_of(values), "settings": settings_of(groups if isinstance(groups, list) else ())}
