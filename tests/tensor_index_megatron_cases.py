"""What the ranks of a Megatron world do in tests/test_tensor_index.py; told the layout first."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import index_reader
import megatron_cases
import torch
from megatron_cpu import gathered
from roll_ckpt.loader import Unit

from roll_ckpt.backends import megatron as backend
from roll_ckpt.formats import tensor_cover

ROLES = {"param": "master", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def wanted_of(full: dict[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """What was gathered, by name and role."""
    found = {}
    for key, tensor in full.items():
        state = key.removeprefix("optimizer.state.")
        role, _, name = state.partition(".") if state != key else ("", "", key)
        found[name, ROLES.get(role, "parameter")] = tensor
    return found


def compare(unit: Path, full: dict[str, torch.Tensor]) -> dict[str, Any]:
    found, wanted = index_reader.rebuilt(unit, "model"), wanted_of(full)
    told: dict[str, Any] = {
        "lacks": sorted(wanted.keys() - found.keys()),
        "beyond": sorted(found.keys() - wanted.keys()),
    }
    told["differs"] = [
        key for key in sorted(found.keys() & wanted.keys()) if not torch.equal(torch_of(found[key]), wanted[key])
    ]
    told["roles"] = sorted({role for _, role in found})
    opened = Unit(unit)
    indexes = [opened.tensor_index("model", rank) for rank in range(opened.manifest.clusters["model"]["world_size"])]
    for name, role in found:
        tensor_cover.check_cover([piece for index in indexes if index for piece in index.find(name, role)], unit)
    return told


def torch_of(whole: index_reader.Whole) -> torch.Tensor:
    signed = whole.words.view(f"i{whole.words.itemsize}")
    return torch.from_numpy(signed.copy()).view(getattr(torch, whole.dtype)).reshape(whole.words.shape)


def index(layout: str, directory: str, form: str, gated: bool = False, **options: Any) -> list[dict[str, Any]]:
    """Two saves, of which the second replays the plan of the first."""
    from megatron.core.transformer import transformer_config

    more = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu} if gated else {}
    made = functools.partial(transformer_config.TransformerConfig, **more)
    with mock.patch.object(transformer_config, "TransformerConfig", made):
        tiny = megatron_cases.trained(layout, **options)
    ours = megatron_cases.attach(tiny, form)
    told = []
    for turn in range(2):
        tiny.train()
        full = gathered(tiny)
        ours.save(Path(directory) / f"iter_{turn}", turn)
        told.append(compare(Path(directory) / f"iter_{turn}", full))
    return told


def index_without_optimizer(layout: str, directory: str) -> dict[str, Any]:
    """A state that nobody attached: its buffers are known by their own names alone."""
    tiny = megatron_cases.trained(layout)
    full = gathered(tiny, moments=False)
    state = megatron_cases.stock_state(tiny, "dp_reshardable")
    told = backend.content_metadata_of("dp_reshardable")
    backend.save(state, Path(directory) / "iter", content_metadata=told)
    return compare(Path(directory) / "iter", full)
