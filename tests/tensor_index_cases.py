"""What the ranks of a test world do in tests/test_tensor_index.py: save real engines, and put their models together
from the index alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import deepspeed_cases as cases
import index_reader
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed_cases import Made, Steps, gathered, own_groups, settings
from offload_cases import offload
from tiny import Net, config, engine, train

from roll_ckpt.backends.deepspeed import tensors
from roll_ckpt.formats.tensor_index.cover import check_cover
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.save import pending

Tensors = dict[str, dict[str, torch.Tensor]]
"""By name and role."""
ADAM = ("exp_avg", "exp_avg_sq")


def live(trained: Any, states: tuple[str, ...] = ADAM) -> Tensors:
    """Every parameter, master and state in full, from the engine as it trains; every rank calls."""
    found: Tensors = {}
    for name, parameter in trained.module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = {"parameter": parameter.detach().clone()}
    for name, parameter in trained.module.named_parameters():
        if parameter.requires_grad:
            found[name] |= _optimized(trained, parameter, states)
    return found


def _optimized(trained: Any, parameter: torch.Tensor, states: tuple[str, ...]) -> dict[str, torch.Tensor]:
    if hasattr(trained.optimizer, "single_partition_of_fp32_groups"):
        return _gathered_flat(trained.optimizer, parameter, states)
    if trained.zero_optimization() or hasattr(parameter, "_hp_mapping"):
        whole = {"master": safe_get_full_fp32_param(parameter)}
        return whole | {key: safe_get_full_optimizer_state(parameter, key) for key in states}
    base = tensors.base_optimizer(trained)
    if hasattr(trained.optimizer, "fp32_groups_flat"):
        return _sliced_flat(trained.optimizer, parameter, states)
    own = parameter
    if base is not trained.optimizer:  # 16-bit parameters, with copies in 32 bits for the optimizer
        groups = zip(trained.optimizer.fp16_groups, trained.optimizer.fp32_groups, strict=True)
        own = next(full for half, fp32 in groups for p, full in zip(half, fp32, strict=True) if p is parameter)
    whole = {} if own is parameter else {"master": own.detach()}
    return whole | {key: base.state[own][key] for key in states}


def _gathered_flat(optimizer: Any, parameter: torch.Tensor, states: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """ZeRO-1 and 2, where DeepSpeed's own functions do not find the states of a second group of parameters."""
    number, group = next(
        (number, group) for number, group in enumerate(optimizer.bit16_groups) if any(p is parameter for p in group)
    )
    at = sum(p.numel() for p in itertools.takewhile(lambda p: p is not parameter, group))
    flat, own = optimizer.single_partition_of_fp32_groups[number], optimizer.real_dp_process_group[number]
    found = {}
    for role in ("master", *states):
        mine = flat.detach() if role == "master" else optimizer.optimizer.state[flat][role]
        shares = [torch.empty_like(mine) for _ in range(dist.get_world_size(own))]
        dist.all_gather(shares, mine, group=own)
        found[role] = torch.cat(shares)[at : at + parameter.numel()].view_as(parameter)
    return found


def _sliced_flat(optimizer: Any, parameter: torch.Tensor, states: tuple[str, ...]) -> dict[str, torch.Tensor]:
    (group,), (flat,) = optimizer.fp16_groups, optimizer.fp32_groups_flat
    parts = flat.split([p.numel() for p in group])
    at = next(place for place, p in enumerate(group) if p is parameter)
    found = {"master": parts[at].detach()}
    for key in states:
        found[key] = optimizer.optimizer.state[flat][key].split([p.numel() for p in group])[at]
    return {role: part.view_as(parameter) for role, part in found.items()}


def over_ranks(mine: Tensors) -> Tensors:
    """What the ranks have together; what several have is the same."""
    found: Tensors = {}
    for share in gathered({name: {role: t.clone() for role, t in of.items()} for name, of in mine.items()}):
        for name, of in share.items():
            for role, tensor in of.items():
                known = found.setdefault(name, {}).setdefault(role, tensor)
                assert torch.equal(known, tensor), f"{name} ({role}) differs from rank to rank"
    return found


def compare(unit: Path, cluster: str, wanted: Tensors) -> dict[str, Any]:
    """What the index lacks, has beyond, or has with other bits; and how many tensors it has in each role."""
    found = index_reader.rebuilt(unit, cluster)
    told: dict[str, Any] = {"lacks": [], "differs": [], "roles": {}}
    for name, of in wanted.items():
        for role, tensor in of.items():
            whole = found.pop((name, role), None)
            if whole is None:
                told["lacks"].append((name, role))
                continue
            told["roles"][role] = told["roles"].get(role, 0) + 1
            if not torch.equal(torch_of(whole), tensor):
                told["differs"].append((name, role))
    told["beyond"] = sorted(found)
    _check_covers(unit, cluster)
    return told


def torch_of(whole: index_reader.Whole) -> torch.Tensor:
    dtype = getattr(torch, whole.dtype)
    signed = whole.words.view(f"i{whole.words.itemsize}")
    return torch.from_numpy(signed.copy()).view(dtype).reshape(whole.words.shape)


def _check_covers(unit: Path, cluster: str) -> None:
    """`check_cover` finds the same as the test's own reader."""
    opened = OpenedCheckpoint(unit)
    indexes = [opened.tensor_index(cluster, rank) for rank in range(opened.manifest.clusters[cluster]["world_size"])]
    names = {(piece.name, piece.role) for index in indexes if index for piece in index if piece.role != "other"}
    for name, role in names:
        pieces = [piece for index in indexes if index for piece in index.find(name, role)]
        if role != "parameter" or any(not piece.replica for piece in pieces):
            check_cover(pieces, unit)


def cast(wanted: Tensors, told: dict[str, Any], unit: Path) -> dict[str, Any]:
    """ZeRO-3 does not save trained parameters: they are their masters, rounded. They are no longer lacking."""
    found = index_reader.rebuilt(unit, "model")
    told["cast"] = 0
    for name, role in list(told["lacks"]):
        whole = found.get((name, "master"))
        if role == "parameter" and whole is not None:
            parameter = wanted[name][role]
            if torch.equal(torch_of(whole).to(parameter.dtype), parameter):
                told["lacks"].remove((name, role))
                told["cast"] += 1
    return told


def saved_and_compared(
    out: str, trained: Any, *, states: tuple[str, ...] = ADAM, before: Callable[[], None] = lambda: None, **more: Any
) -> dict[str, Any]:
    """Save an engine that has trained; `before` is done between looking at it and the save."""
    wanted = over_ranks(live(trained, states))
    before()
    trained.save_checkpoint(out, tag="t", **more)
    pending.wait_pending()
    unit = Path(out) / "t"
    return cast(wanted, compare(unit, "model", wanted), unit)


SAVED = settings(async_save=False)


def of_zero(out: str, stage: int, precision: str, **zero: Any) -> dict[str, Any]:
    """An engine of `tiny`, whose widths do not divide by the number of ranks; `zero` adds to its section."""
    more = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **zero}}
    with own_groups():
        cases.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
        trained = engine(stage, precision, SAVED, width=23, zero_force_ds_cpu_optimizer=False, **more)
        train(trained, 2, seed=1)
        return saved_and_compared(out, trained)


def of_groups(out: str, stage: int, sub_group_size: int) -> dict[str, Any]:
    """Two groups of parameters, of which ZeRO-3 makes sub-groups."""
    torch.manual_seed(0)
    asked = config(stage, "bf16", SAVED)
    asked["zero_optimization"]["sub_group_size"] = sub_group_size
    del asked["optimizer"]
    with deepspeed.zero.Init(config_dict_or_path=asked, enabled=stage == 3):
        net = Net(23)
    trained = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    parted = [
        {"params": [p for name, p in trained if name.endswith("bias")], "weight_decay": 0.0},
        {"params": [p for name, p in trained if not name.endswith("bias")], "weight_decay": 0.1},
    ]
    made = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(parted, lr=1e-3), config=asked)[0]
    train(made, 2, seed=1)
    return saved_and_compared(out, made)


def of_other_orders(out: str, **zero: Any) -> dict[str, Any]:
    """ZeRO-2 lays parameters out in another order, or with room between them. What DeepSpeed itself tells of them is
    wrong then, so the state is that of an engine without it, which trains alike."""
    told = []
    for more in ({}, zero):
        asked = {"zero_optimization": {"stage": 2, **more}, "gradient_clipping": 0.0}
        told.append(engine(2, "bf16", SAVED, width=23, **asked))
        train(told[-1], 2, seed=1)
    padded = any(any(group) for group in told[1].optimizer.round_robin_bit16_padding)
    assert padded or [[id(p) for p in group] for group in told[1].optimizer.bit16_groups] != [
        [id(p) for p in group] for group in told[1].optimizer.round_robin_bit16_groups
    ]
    wanted = over_ranks(live(told[0]))
    told[1].save_checkpoint(out, tag="t")
    return compare(Path(out) / "t", "model", wanted)


def of_momentum(out: str, stage: int) -> dict[str, Any]:
    """An optimizer with other state than Adam."""
    sgd = {"type": "SGD", "params": {"lr": 1e-2, "momentum": 0.9}}
    trained = engine(stage, "bf16", SAVED, optimizer=sgd, zero_allow_untested_optimizer=True)
    train(trained, 2, seed=1)
    return saved_and_compared(out, trained, states=("momentum_buffer",))


def of_fused(out: str) -> dict[str, Any]:
    """ZeRO-0 with flat masters, as for FusedAdam, which a CPU has not: torch's stands for it."""
    with mock.patch.object(deepspeed.runtime.engine, "FusedAdam", torch.optim.AdamW):
        trained = engine(0, "bf16", SAVED)
    assert type(trained.optimizer).__name__ == "FP16_Optimizer"
    train(trained, 2, seed=1)
    return saved_and_compared(out, trained)


def of_offloaded(out: str, stage: int) -> dict[str, Any]:
    trained = engine(stage, "bf16", SAVED)
    train(trained, 2, seed=1)
    return saved_and_compared(out, trained, before=lambda: offload(trained))


def without_frozen(out: str) -> dict[str, Any]:
    trained = engine(2, "bf16", SAVED)
    train(trained, 2, seed=1)
    return saved_and_compared(out, trained, exclude_frozen_parameters=True)


def of_each_step(out: str) -> list[dict[str, Any]]:
    """Saves in the background, one after each step, of a structure that stays, changes and stays."""
    trained = engine(2, "bf16", settings())
    told, wanted = [], []
    for step in range(4):
        train(trained, 1, seed=step)
        wanted.append(over_ranks(live(trained)))
        state = {"replay": torch.arange(5 if step < 2 else 7)}
        trained.save_checkpoint(out, tag=f"t{step}", client_state=state)
    pending.wait_pending()
    for step in range(4):
        told.append(compare(Path(out) / f"t{step}", "model", wanted[step]))
        indexes = sorted((Path(out) / f"t{step}" / "tensors").iterdir())
        told[-1]["bytes"] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in indexes]
    return told


# --- engines of other kinds ----------------------------------------------------------------------------------


def of_kind(out: str, kind: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """An engine of a case of `deepspeed_cases`, which makes and trains it."""

    def compared(out: str, made: Made, steps: Steps) -> dict[str, Any]:
        trained = made(0, SAVED)
        steps(trained, 1)
        wanted = over_ranks(WHOLE.get(kind, lambda trained, mine: mine)(trained, live(trained)))
        trained.save_checkpoint(out, tag="t")
        unit = Path(out) / "t"
        return cast(wanted, compare(unit, "model", wanted), unit)

    with mock.patch.object(cases, "save_and_go_on", compared):
        told: dict[str, Any] = getattr(cases, kind)(out, *args, **kwargs)
        return told


def _with_global_experts(trained: Any, mine: Tensors) -> Tensors:
    """The only expert of this rank under its number among those of all ranks."""
    rank = dist.get_rank()
    return {name.replace("deepspeed_experts.0.", f"deepspeed_experts.{rank}."): of for name, of in mine.items()}


def _with_whole_slices(trained: Any, mine: Tensors) -> Tensors:
    """What AutoTP has cut, put together again."""
    cut = {
        name: meta["partition_dim"]
        for name, p in trained.module.named_parameters()
        if (meta := getattr(p, "ds_autotp_universal_checkpoint_meta", None)) and meta["partition_dim"] is not None
    }
    shares = gathered({name: mine[name] for name in cut})
    for name, dim in cut.items():
        mine[name] = {role: torch.cat([share[name][role] for share in shares], dim) for role in mine[name]}
    return mine


def _with_untied_biases(trained: Any, mine: Tensors) -> Tensors:
    """Only the weight of the layer that both stages have is tied; each has a bias of its own."""
    if dist.get_rank() == 1:
        mine["tied_modules.ends.bias@stage1"] = mine.pop("tied_modules.ends.bias")
    return mine


WHOLE = {
    "with_experts": _with_global_experts,
    "with_stages": _with_untied_biases,
    "with_tensor_parallel": _with_whole_slices,
}


def of_autoep(out: str, stage: int) -> dict[str, Any]:
    """A Mixtral whose experts DeepSpeed spreads over the ranks by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.utils import output_capturing

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=50, num_hidden_layers=1, num_local_experts=4, **sizes))
    asked = config(stage, "bf16", SAVED)
    asked["expert_parallel"] = {
        "enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False
    }  # fmt: skip
    registry = output_capturing._CanRecordRegistry
    get = registry.get  # DeepSpeed 0.19.8 gives it a default, which transformers 5.23 does not take
    with own_groups(), mock.patch.object(registry, "get", lambda self, key, default=None: get(self, key)):
        trained = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=asked)[0]
        for step in range(2):
            torch.manual_seed(10 * step + dist.get_rank())
            tokens = torch.randint(0, 50, (4, 8))
            trained.backward(trained(tokens, labels=tokens).loss)
            trained.step()
        mine = live(trained)
        shares = gathered({name: of for name, of in mine.items() if ".experts.w" in name})
        for name in shares[0]:
            mine[name] = {role: torch.cat([share[name][role] for share in shares]) for role in mine[name]}
        wanted = over_ranks(mine)
        trained.save_checkpoint(out, tag="t")
    unit = Path(out) / "t"
    return cast(wanted, compare(unit, "model", wanted), unit)


def of_model_only(out: str) -> dict[str, Any]:
    """A cluster that saves its weights alone."""
    from pipeline_cases import Cluster, pipeline

    trained = engine(2, "bf16", None)
    train(trained, 2, seed=1)
    wanted = over_ranks({name: {"parameter": of["parameter"]} for name, of in live(trained).items()})
    made = pipeline(out, Cluster("actor", trained, save_only_model=True))
    made.do_checkpoint(1)
    pending.wait_pending()
    return compare(Path(out) / "checkpoint-1", "actor", wanted)


# --- a checkpoint of format 1 --------------------------------------------------------------------------------


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def resume_format_1(out: str) -> dict[str, Any]:
    """Resume from the checkpoint in tests/data: the step, values, and digests of the whole state."""
    from pipeline_cases import Cluster, pipeline

    trained = engine(2, "bf16", None, seed=9, width=16)
    made = pipeline(out, Cluster("actor", trained), resume_from_checkpoint=True)
    step = made.resume()
    found = {
        name: {
            role: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for role, t in of.items()
        }
        for name, of in live(trained).items()
        if name != "head.weight"
    }
    train(trained, 1, seed=3)
    made.do_checkpoint(2)
    pending.wait_pending()
    return {"step": step, "global_steps": trained.global_steps - 1, "kv": made.state.kv, "sha256": found}
