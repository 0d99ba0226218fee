"""What the ranks of a world do in tests/test_fence.py: change an engine while a save still reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_cases import BLOCK, _set_full, new_arena
from late_copies import copy_a_block, late_copies
from tiny import config, engine, train

from roll_ckpt.backends.deepspeed import install
from roll_ckpt.save import pending

WIDTH = 96  # each file has several blocks
SETTINGS = {"async_save": True, "io": {"block_bytes": BLOCK}, "staging": {"arena_bytes": 64 << 20}}


def _parameters(made: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in made.module.parameters() if parameter.requires_grad]


def _flat(made: Any) -> list[torch.Tensor]:
    """The flat buffers that a save copies late."""
    optimizer = made.optimizer
    return list(getattr(optimizer, "fp32_partitioned_groups_flat", ()) or optimizer.bit16_groups_flat)


def _weights(made: Any) -> list[torch.Tensor]:
    """What a script would change: parameters, or at ZeRO-3, where these are not copied late, their fp32 partitions."""
    return _flat(made) if made.zero_optimization_stage() == 3 else _parameters(made)


def _load(made: Any) -> None:
    made.module.load_state_dict({name: value * 2 for name, value in made.module.state_dict().items()})


def _base_step(made: Any) -> None:
    for flat in (*_flat(made), *getattr(made.optimizer, "single_partition_of_fp32_groups", ())):
        flat.grad = torch.ones_like(flat)
    if made.zero_optimization_stage() == 3:  # which lends its partitions to the base optimizer for the step alone
        for group in range(len(_flat(made))):
            made.optimizer._optimizer_step(group)
    else:
        made.optimizer.optimizer.step()


def _ema_swap(made: Any) -> None:
    for weight in _weights(made):
        weight.data.copy_(weight.data * 0.5)


@torch.no_grad()
def _add(made: Any) -> None:
    for weight in _weights(made):
        weight.add_(1)


@torch.no_grad()
def _foreach(made: Any) -> None:
    torch._foreach_mul_(_weights(made), 2.0)


@torch.no_grad()
def _one_element(made: Any) -> None:
    _weights(made)[-1].view(-1)[0] += 1


@torch.no_grad()
def _flat_buffer(made: Any) -> None:
    for flat in _flat(made):
        flat.view(-1)[flat.numel() // 3] += 1


@torch.no_grad()
def _moments(made: Any) -> None:
    for state in made.optimizer.optimizer.state.values():
        state["exp_avg"].mul_(2)


def _other_data(made: Any) -> None:
    for weight in _weights(made):
        weight.data = torch.zeros_like(weight.data)


CHANGES: dict[str, tuple[tuple[int, ...], str, Callable[[Any], None]]] = {
    "module.load_state_dict": ((1, 2), "fenced", _load),
    "base optimizer": ((1, 2, 3), "fenced", _base_step),
    "safe_set": ((2, 3), "fenced", _set_full),
    "ema": ((1, 2, 3), "refused", _ema_swap),
    "add_": ((1, 2, 3), "refused", _add),
    "foreach": ((1, 2, 3), "refused", _foreach),
    "one element": ((1, 2), "refused", _one_element),
    "flat buffer": ((1, 2, 3), "refused", _flat_buffer),
    "moments": ((1, 2, 3), "refused", _moments),
    "other data": ((1, 2, 3), "fenced", _other_data),
}
"""How code changes an engine, the ZeRO stages that have it, and whether the save holds the old state or fails."""


def _same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(_same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list | tuple):
        return len(found) == len(wanted) and all(map(_same, found, wanted))
    return True


def _files(directory: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=False) for path in sorted(directory.glob("*.pt"))}


def change_by_other_means(out: str, stage: int) -> dict[str, tuple[str, str]]:
    """Change an engine in each way when a part of a save is copied: "fenced", "refused" or "TORN", and the reason."""
    told: dict[str, tuple[str, str]] = {}
    with new_arena():
        for what, (stages, _, change) in CHANGES.items():
            if stage not in stages:
                continue
            made = engine(stage, "bf16", SETTINGS, width=WIDTH)
            train(made, 1, seed=1)
            made.save_checkpoint(out, tag="before")
            pending.wait_pending()
            with late_copies(install.attached(made).settings):  # type: ignore[union-attr]
                made.save_checkpoint(out, tag="saved")
                save = install.attached(made).saves[-1]  # type: ignore[union-attr]
                copy_a_block(save)
                change(made)
            if save.failure is not None:
                told[what] = ("refused", str(save.failure))
            else:
                wanted, found = _files(Path(out) / "before"), _files(Path(out) / "saved")
                told[what] = ("fenced" if _same(found, wanted) and wanted else "TORN", "")
            dist.barrier()
    return told


def change_in_the_forward_pass(out: str, stage: int) -> bool:
    """An embedding that scales its rows in each forward pass is saved as it was, while training goes on."""
    with new_arena():
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Embedding(50, 16, max_norm=0.5), torch.nn.Linear(16, 4))
        values = config(stage, "fp32", SETTINGS)
        made = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=values)[0]
        made.backward(made(torch.arange(32).reshape(4, 8)).pow(2).mean())
        made.step()
        before = [parameter.detach().clone() for parameter in made.module.parameters()]
        with late_copies(install.attached(made).settings):  # type: ignore[union-attr]
            made.save_checkpoint(out, tag="t")
            made(torch.arange(50).repeat(4, 1))
        made.load_checkpoint(out, tag="t")
        return all(map(torch.equal, before, made.module.parameters()))
