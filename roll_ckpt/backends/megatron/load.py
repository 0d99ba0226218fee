"""Loads of a sharded state, and what a load refuses before it reads a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from roll_ckpt import names
from roll_ckpt.backends.megatron import version
from roll_ckpt.backends.megatron.checked_files import checked, reading
from roll_ckpt.backends.megatron.facts import COMMON, DCP_METADATA, MARKER, is_torch_dist
from roll_ckpt.config import Settings
from roll_ckpt.disk import reads, tree
from roll_ckpt.errors import Damaged, ModelMismatch, NotFound, UnsupportedError
from roll_ckpt.formats import sealed_json
from roll_ckpt.formats.dcp import index as dcp_index
from roll_ckpt.load import trust
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import gate, pending


def load(
    sharded_state_dict: dict[str, Any],
    directory: str | os.PathLike[str],
    *,
    settings: Settings | None = None,
    cluster: str = "model",
    strategy: Any = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Load a sharded state from the checkpoint `directory`, and return what `dist_checkpointing.load` does.

    Every rank calls; blocks. Every byte is verified before the load, and each block again as it is read. A checkpoint
    that stock Megatron wrote has no digests: it is loaded with a warning.

    Args:
        sharded_state_dict: as for `dist_checkpointing.load`.
        settings: of which `load.allow`, `io` and `commit_timeout_s` matter here; default `Settings()`.
        cluster: the name under which the model was saved.
        strategy: a load strategy of Megatron's; default Megatron's own.
        verified: the ranks have verified every byte just now, so do not do so again.

    Raises, on every rank and before a tensor is read:
        NotFound: there is no complete checkpoint in `directory`.
        Damaged: bytes differ from what was saved.
        Unreadable: the disk does not tell whether the checkpoint is sound.
        ModelMismatch: tensors have other names or shapes.
        UnsupportedError: Megatron wrote it with another backend than torch_dist, or it holds objects that a safe load
            refuses.
    """
    settings = settings or Settings()
    path = names.absolute(directory)
    with gate.entered(RankGroup.current(), f"load {path}", settings.commit_timeout_s):
        return load_inside(sharded_state_dict, path, settings, strategy, verified=verified)


def load_inside(
    sharded_state_dict: dict[str, Any], path: Path, settings: Settings, strategy: Any, *, verified: bool
) -> dict[str, Any]:
    """`load`, for a caller that has passed the gate."""
    ranks = RankGroup.current()
    pending.wait_pending()
    ranks.run_on_all_ranks(lambda: check_complete(path), settings.commit_timeout_s)
    with open_together(ranks, path, settings) as reader:
        if reader.checkpoint is not None and not verified:
            check_bytes(ranks, reader.checkpoint.directory, settings.commit_timeout_s)
        if reader.checkpoint is None:
            ranks.run_on_all_ranks(lambda: stock_content_metadata(path, settings), settings.commit_timeout_s)
        check = partial(check_content, sharded_state_dict, path, settings, ranks)
        ranks.run_on_all_ranks(check, settings.commit_timeout_s, working=True)
        checking = nullcontext() if reader.checkpoint is None else checked(reader.checkpoint)
        read_it = partial(read_common, allowed=trust.allowed(settings), read=reading(reader.checkpoint))
        with checking, version.common_state_from(lambda directory: read_it(Path(directory))) as how:
            loaded: dict[str, Any] = dist_checkpointing.load(sharded_state_dict, str(path), strategy, **how)
        return loaded


def check_complete(path: Path) -> None:
    """Refuse a directory that is no complete Megatron checkpoint. No collective.

    Raises:
        NotFound: names the file that is missing.
    """
    missing = [name for name in (MARKER, DCP_METADATA) if not tree.exists(path / name)]
    if not missing and not tree.exists(path / COMMON):
        index = reads.read_bytes(path / DCP_METADATA, reads.OBJECT_BYTES)
        missing = [] if version.COMMON_OBJECT.encode() in index else [COMMON]
    if missing:
        raise NotFound(f"{path}: no complete Megatron checkpoint: it has no {missing[0]}; load another one")


def stock_content_metadata(path: Path, settings: Settings) -> dict[str, Any]:
    """The content metadata of a checkpoint that stock Megatron wrote. No collective.

    Raises:
        UnsupportedError: another backend than torch_dist wrote it, or a safe load refuses the common state.
        Damaged: the marker or the common state cannot be parsed.
    """
    marker = sealed_json.parse_json(reads.read_bytes(path / MARKER), path / MARKER)
    if not is_torch_dist(marker):
        raise UnsupportedError(
            f"{path / MARKER}: the backend {marker} wrote this checkpoint; roll_ckpt loads only what torch_dist, "
            "version 1, wrote. Load it with Megatron, and save it again as torch_dist"
        )
    common = read_common(path, trust.allowed(settings), dcp_index.read_unchecked)
    return dist_checkpointing.load_content_metadata(preloaded_state_dict=common) or {}


def check_content(sharded_state_dict: dict[str, Any], path: Path, settings: Settings, ranks: RankGroup) -> None:
    """Refuse unsafe or unreadable pickles, and tensors that differ from those of this rank's state. No collective.

    Megatron would unpickle the index, the common state and the objects without restriction. Of the objects each rank
    checks its share.

    Raises:
        Damaged: a pickle cannot be parsed. UnsupportedError: a safe load refuses it.
        ModelMismatch: tensors have other names or shapes.
    """
    allowed, read = trust.allowed(settings), reading(OpenedCheckpoint.around(path))
    index = _index(path, allowed, read)
    read_common(path, allowed, read, index)
    _compare(sharded_state_dict, path, index)
    dcp_index.check_objects(path, index, allowed, read, part=ranks.rank, parts=ranks.size)


def read_common(
    path: Path, allowed: Sequence[Any], read: dcp_index.Read, index: Metadata | None = None
) -> dict[str, Any]:
    """The common state of a checkpoint: `common.pt`, or without it the object in which stock 0.19 and later keep it.

    No collective. `index` is that of `path`, if it was read already.

    Raises:
        Damaged: it cannot be parsed. UnsupportedError: a safe load refuses it.
    """
    if tree.exists(path / COMMON):
        common: Any = [dcp_index.read_file(path / COMMON, allowed, read)]
    else:
        common = dcp_index.read_object(path, index or _index(path, allowed, read), version.COMMON_OBJECT, allowed, read)
    if not isinstance(common, list) or len(common) != 1 or not isinstance(common[0], dict):
        raise Damaged(f"{path}: its common state is no dictionary; load another checkpoint")
    state: dict[str, Any] = common[0]
    return state


def _index(path: Path, allowed: Sequence[Any], read: dcp_index.Read) -> Metadata:
    return dcp_index.read(path, [kind for kind in allowed if isinstance(kind, type)], read)


def _compare(sharded_state_dict: dict[str, Any], path: Path, index: Metadata) -> None:
    stored = index.state_dict_metadata.items()
    saved = {name: {"shape": list(kind.size)} for name, kind in stored if isinstance(kind, TensorStorageMetadata)}
    live = {tensor.key: {"shape": list(tensor.global_shape)} for tensor in _tensors(sharded_state_dict)}
    if live and not saved:
        raise ModelMismatch(f"{path} holds no tensors, and the model has {len(live)}; load another checkpoint")
    compare_models({name: saved[name] for name in live if name in saved} or saved, live, str(path))


def _tensors(sharded_state_dict: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(sharded_state_dict):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values({"": value.build()}) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def facts_of(checkpoint: OpenedCheckpoint | None, cluster: str) -> Mapping[str, Any]:
    """The manifest's facts about a cluster; empty for None, which stands for a checkpoint that stock Megatron wrote.

    A checkpoint without a cluster of that name gives the facts of its first one.
    """
    if checkpoint is None:
        return {}
    clusters = checkpoint.manifest.clusters
    return clusters[cluster if cluster in clusters else next(iter(clusters))]
