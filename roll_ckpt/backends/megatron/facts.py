"""Constants and facts of a Megatron-core checkpoint: file names, optimizer sharding types, parallel sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from megatron import core
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig

from roll_ckpt.backends.megatron import version
from roll_ckpt.errors import UnsupportedError

FRAMEWORK = "megatron-core"
COMMON, DCP_METADATA, MARKER = "common.pt", ".metadata", "metadata.json"
"""The files of a checkpoint beside the `.distcp` ones. In a save by stock Megatron the marker comes last."""
MARKER_BYTES = json.dumps(asdict(CheckpointingConfig("torch_dist", 1))).encode()
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


def is_torch_dist(marker: Any) -> bool:
    """Whether `metadata.json` holds what some version writes for the backend whose directories we read."""
    written = {"common_backend": "torch", "common_backend_version": 1, **_BACKEND}
    return isinstance(marker, dict) and _BACKEND.items() <= marker.items() <= written.items()


def check_sharding_type(content_metadata: Mapping[str, Any] | None) -> None:
    """Refuse a sharding type of the distributed optimizer that cannot be saved or was not tested.

    Raises:
        UnsupportedError: names the sharding type and those to choose from.
    """
    sharding_type = (content_metadata or {}).get("distrib_optim_sharding_type")
    if sharding_type is not None and sharding_type not in version.SHARDING_TYPES:
        raise UnsupportedError(
            f"roll_ckpt does not support distrib_optim_sharding_type {sharding_type!r} with {version.NAME}: that "
            "cannot save or load it, or it was not tested; choose one of "
            f"{', '.join(sorted(version.SHARDING_TYPES))}{version.since(sharding_type)}"
        )


def content_metadata_of(sharding_type: str) -> dict[str, Any]:
    """The metadata that Megatron's `sharded_state_dict` functions take, and that the checkpoint records."""
    return {
        "distrib_optim_sharding_type": sharding_type,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }


def parallel_layout() -> dict[str, int]:
    """Sizes of the parallel dimensions of this job."""
    return {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }


def describe(content_metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Facts for the manifest: framework, parallel sizes, sharding type of the optimizer."""
    return {
        "framework": FRAMEWORK,
        "framework_version": core.__version__,
        "layout": parallel_layout(),
        "distrib_optim_sharding_type": (content_metadata or {}).get("distrib_optim_sharding_type"),
    }
