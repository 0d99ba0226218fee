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

from roll_ckpt.backends.megatron.facts import content_metadata_of
from roll_ckpt.backends.megatron.save import save as megatron_save
from roll_ckpt.formats.tensor_index.cover import check_cover
from roll_ckpt.load.checkpoint import OpenedCheckpoint

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
    opened = OpenedCheckpoint(unit)
    indexes = [opened.tensor_index("model", rank) for rank in range(opened.manifest.clusters["model"]["world_size"])]
    for name, role in found:
        check_cover([piece for index in indexes if index for piece in index.find(name, role)], unit)
    return told


def torch_of(whole: index_reader.Whole) -> torch.Tensor:
    signed = whole.words.view(f"i{whole.words.itemsize}")
    return torch.from_numpy(signed.copy()).view(getattr(torch, whole.dtype)).reshape(whole.words.shape)


GATED = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}


def index(
    layout: str, directory: str, form: str, gated: bool = False, tied: bool = False, **options: Any
) -> list[dict[str, Any]]:
    """Two saves, of which the second replays the plan of the first."""
    from megatron.core.models import gpt
    from megatron.core.transformer import transformer_config

    config = functools.partial(transformer_config.TransformerConfig, **(GATED if gated else {}))
    model = gpt.GPTModel

    def made(*args: Any, **told: Any) -> Any:
        return model(*args, **{**told, "share_embeddings_and_output_weights": tied})

    with (
        mock.patch.object(transformer_config, "TransformerConfig", config),
        mock.patch.object(gpt, "GPTModel", made),
    ):
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
    told = content_metadata_of("dp_reshardable")
    megatron_save(state, Path(directory) / "iter", content_metadata=told)
    return compare(Path(directory) / "iter", full)
