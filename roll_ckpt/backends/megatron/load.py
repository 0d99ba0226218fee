"""Loads of a sharded state, and what is refused before a tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from roll_ckpt.backends.megatron.checked_files import checked
from roll_ckpt.backends.megatron.facts import COMMON, DCP_METADATA, MARKER, MARKER_BYTES
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import ModelMismatch, NotFound, UnsupportedError
from roll_ckpt.formats import sealed_json
from roll_ckpt.formats.dcp import index as dcp_index
from roll_ckpt.load import trust
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.save import pending


def load(
    sharded_state_dict: dict[str, Any],
    directory: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    strategy: Any = None,
    verified: bool = False,
) -> dict[str, Any]:
    """What `dist_checkpointing.load` returns, after every byte was verified, and each again as it is read; every rank
    calls.

    Checkpoints that stock wrote are loaded with a warning. `strategy` is a stock load strategy; `verified` says
    that the ranks have just read every byte.

    Raises:
        NotFound: there is no complete checkpoint in `directory`. Damaged: bytes differ. ModelMismatch: other
            names or shapes. UnsupportedError: stock wrote it with another backend than torch_dist. On every rank,
            and before a tensor was read.
    """
    settings = settings or Settings()
    path, ranks = Path(directory).absolute(), RankGroup.current()
    pending.wait_pending()
    ranks.run_on_all_ranks(lambda: check_complete(path), settings.commit_timeout_s)
    with open_together(ranks, path, settings) as reader:
        if reader.checkpoint is not None and not verified:
            check_bytes(ranks, reader.checkpoint.directory)
        if reader.checkpoint is None:
            ranks.run_on_all_ranks(lambda: told_by_stock(path, settings), settings.commit_timeout_s)
        ranks.run_on_all_ranks(lambda: check_content(sharded_state_dict, path, settings, ranks), LONGEST_S)
        with torch.serialization.safe_globals(trust.allowed(settings)), ExitStack() as stack:
            common = None if reader.checkpoint is None else stack.enter_context(checked(reader.checkpoint))
            loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict, str(path), strategy, common)
        return loaded


def check_complete(path: Path) -> None:
    for name in (MARKER, DCP_METADATA, COMMON):
        if not tree.exists(path / name):
            later = " (Megatron-core later than 0.16 writes none, and 0.16 cannot read it)" if name == COMMON else ""
            raise NotFound(f"{path}: no complete Megatron checkpoint: it has no {name}{later}; load another one")


def told_by_stock(path: Path, settings: Settings) -> dict[str, Any]:
    """The content metadata of a checkpoint that has no manifest.

    Raises:
        UnsupportedError: another backend wrote it. Damaged: the marker or the common state cannot be read, or a safe
            load refuses it.
    """
    marker = sealed_json.parse_json(reads.read_bytes(path / MARKER), path / MARKER)
    if marker != json.loads(MARKER_BYTES):
        raise UnsupportedError(
            f"{path / MARKER}: {marker} wrote this checkpoint; roll_ckpt loads what torch_dist, version 1, wrote. "
            "Load it with Megatron, and save it again as torch_dist"
        )
    allowed = trust.allowed(settings)
    dcp_index.check_file(path / COMMON, allowed)
    with torch.serialization.safe_globals(allowed):
        return dist_checkpointing.load_content_metadata(str(path)) or {}


def check_content(sharded_state_dict: dict[str, Any], path: Path, settings: Settings, ranks: RankGroup) -> None:
    """Refuse what stock code would unpickle without restriction, or stumble over (the index, the common state, and
    this rank's share of the objects), and tensors that are not those that this rank wants. No collective."""
    allowed = trust.allowed(settings)
    index = dcp_index.read(path, [kind for kind in allowed if isinstance(kind, type)])
    dcp_index.check_file(path / COMMON, allowed)
    _compare(sharded_state_dict, path, index)
    dcp_index.check_objects(path, index, allowed, part=ranks.rank, parts=ranks.size)


def _compare(sharded_state_dict: dict[str, Any], path: Path, index: Metadata) -> None:
    stored = index.state_dict_metadata.items()
    saved = {name: {"shape": list(kind.size)} for name, kind in stored if isinstance(kind, TensorStorageMetadata)}
    live = {tensor.key: {"shape": list(tensor.global_shape)} for tensor in _tensors(sharded_state_dict)}
    if live and not saved:
        raise ModelMismatch(f"{path} holds no tensors")
    compare_models({name: saved[name] for name in live if name in saved} or saved, live, str(path))


def _tensors(sharded_state_dict: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded_state_dict):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values({"": value.build()}) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def recorded(checkpoint_dir: OpenedCheckpoint | None, cluster: str) -> Mapping[str, Any]:
    """The facts that the manifest holds of a cluster; nothing for a checkpoint that stock wrote."""
    if checkpoint_dir is None:
        return {}
    clusters = checkpoint_dir.manifest.clusters
    return clusters[cluster if cluster in clusters else next(iter(clusters))]
