"""What the ranks of a test world do in tests/test_deepspeed_loads.py: loads without the optimizer, refused loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed_cases import raised
from tiny import Net, config, engine, train

from roll_ckpt.config import DeepSpeedConfig
from roll_ckpt.state import StateSaver

OURS: dict[str, Any] = {"async_save": False, "io": {"block_bytes": 65536}, "staging": {"arena_bytes": 64 << 20}}
Combination = tuple[int, str]
"""ZeRO stage and precision."""
Told = dict[str, Any]


def weights_of(made: Any) -> dict[str, torch.Tensor]:
    """The whole parameters, in fp32."""
    found = {}
    for name, parameter in made.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            found[name] = parameter.detach().float().clone()
    return found


def shift_frozen(made: Any) -> None:
    """Give frozen parameters values that no seed gives."""
    parameters = [p for p in made.module.parameters() if not p.requires_grad]
    with (
        deepspeed.zero.GatheredParameters([p for p in parameters if hasattr(p, "ds_id")], modifier_rank=0),
        torch.no_grad(),
    ):
        for parameter in parameters:
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) / 64)


def saved_at(out: str, combinations: list[Combination], by: str) -> None:
    """Train and save tag `asked`, and after it a tag `later`, which `latest` names."""
    for stage, precision in combinations:
        made = engine(stage, precision, OURS if by == "ours" else None)
        shift_frozen(made)
        train(made, 2, seed=1)
        place = f"{out}/{stage}-{precision}"
        weights, calls = weights_of(made), made.module.calls.clone()
        made.save_checkpoint(place, tag="asked", client_state={"note": "kept"})
        train(made, 2, seed=2)
        made.save_checkpoint(place, tag="later")
        if dist.get_rank() == 0:
            torch.save((weights, calls), f"{place}.weights")
    dist.barrier()


def loaded_from(out: str, loads: list[tuple[Combination, Combination, Told]]) -> list[Told]:
    """Load each combination into another, and train a step."""
    return [_loaded(out, saved, into, how) for saved, into, how in loads]


def _loaded(out: str, saved: Combination, into: Combination, how: Told) -> Told:
    made = engine(*into, OURS, seed=9)
    place = f"{out}/{saved[0]}-{saved[1]}"
    wanted, calls = torch.load(f"{place}.weights", weights_only=True)
    path, state = made.load_checkpoint(place, tag="asked", **how)
    found, steps = weights_of(made), made.global_steps
    same_calls = torch.equal(made.module.calls.float(), calls.float())
    train(made, 1, seed=3)
    moved = max(float((after - found[name]).abs().max()) for name, after in weights_of(made).items())
    exact = {name: found[name] == _as(weight, into[1]) for name, weight in wanted.items()}
    return {
        "told": f"{saved} into {into} {how}",
        "other weights": [name for name, same in exact.items() if not bool(same.all())],
        "buffers": same_calls,
        "moved": moved,
        "path": bool(path) and "asked" in path,
        "note": state.get("note"),
        "steps": steps,
    }


def _as(weight: torch.Tensor, precision: str) -> torch.Tensor:
    return weight.bfloat16().float() if precision == "bf16" else weight


def custom(out: str) -> Told:
    """A `custom_load_fn` under ZeRO-3 gets whole weights, and what it changes is loaded."""
    saved_at(out, [(3, "bf16")], "ours")
    made = engine(3, "bf16", OURS, seed=9)
    given: dict[str, torch.Tensor] = {}

    def load(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        given.update(src)
        if dist.get_rank() == 0:
            dst.load_state_dict({name: value * 2 for name, value in src.items()})

    made.load_checkpoint(f"{out}/3-bf16", tag="asked", load_optimizer_states=False, custom_load_fn=load)
    wanted, _ = torch.load(f"{out}/3-bf16.weights", weights_only=True)
    found = weights_of(made)
    return {
        "given": all(torch.equal(_as(given[name], "bf16"), weight) for name, weight in wanted.items()),
        "tied": torch.equal(given["head.weight"], given["embed.weight"]),
        "twice": all(torch.equal(found[name], _as(2 * given[name], "bf16")) for name in wanted),
    }


class _More(Net):
    """`Net` with a layer more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = torch.nn.Linear(3, 3)


def other_model(out: str) -> dict[str, Told]:
    """A model with a layer more than the checkpoint has, strictly and not."""
    saved_at(out, [(3, "bf16")], "ours")
    found = {}
    for strict in (True, False):
        torch.manual_seed(4)
        made = deepspeed.initialize(
            model=(net := _More()),
            model_parameters=[p for p in net.parameters() if p.requires_grad],
            config=config(3, "bf16", OURS),
        )[0]
        before = weights_of(made)
        how = {"load_module_only": True, "load_module_strict": strict}
        told = raised(lambda made=made, how=how: made.load_checkpoint(f"{out}/3-bf16", tag="asked", **how))
        wanted, _ = torch.load(f"{out}/3-bf16.weights", weights_only=True)
        after = weights_of(made)
        found[str(strict)] = {
            "told": told,
            "unchanged": same(before, after),
            "loaded": all(torch.equal(after[name], weight) for name, weight in wanted.items()),
            "kept": torch.equal(before["more.weight"], after["more.weight"]),
        }
    return found


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def runs_code(out: str) -> Told:
    """A stock checkpoint of ZeRO-3 with a pickle that runs code when it is loaded."""
    made = engine(3, "bf16", None)
    made.save_checkpoint(out, tag="asked", client_state={"evil": Evil(f"{out}/it_ran")})
    return refused(engine(3, "bf16", OURS, seed=9), out, tag="asked", load_optimizer_states=False) | {
        "ran": Path(f"{out}/it_ran").exists()
    }


# --- refused loads -------------------------------------------------------------------------------------------


def same(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(weight, after[name]) for name, weight in before.items())


def refused(made: Any, place: str, **how: Any) -> Told:
    """What a load raises, and whether the model is as before, before and after a step of the optimizer."""
    before = weights_of(made)
    told = raised(lambda: made.load_checkpoint(place, **how))
    unchanged = same(before, weights_of(made))
    train(made, 1, seed=3)
    return {"told": told, "unchanged": unchanged, "steps": made.global_steps}


def refused_stages(out: str, pairs: list[tuple[int, int]], by: str) -> list[Told]:
    found = []
    for saved, live in pairs:
        made = engine(saved, "fp32", OURS if by == "ours" else None)
        train(made, 1, seed=1)
        made.save_checkpoint(f"{out}/{saved}-{live}", tag="t")
        found.append(refused(engine(live, "fp32", OURS, seed=9), f"{out}/{saved}-{live}"))
    return found


def optimizer(kind: str, **settings: Any) -> Told:
    return {"optimizer": {"type": kind, "params": {"lr": 1e-3, **settings}}, "zero_allow_untested_optimizer": True}


OPTIMIZERS = {
    "adamw": optimizer("AdamW", torch_adam=True),
    "adam": optimizer("Adam", torch_adam=True, adam_w_mode=False),
    "sgd": optimizer("SGD"),
    "momentum": optimizer("SGD", momentum=0.9),
    "adagrad": optimizer("Adagrad"),
    "rmsprop": optimizer("RMSprop"),
}


def other_optimizers(out: str, pairs: list[tuple[str, str]], stage: int, by: str) -> list[Told]:
    found = []
    for saved in sorted({saved for saved, _ in pairs}):
        made = engine(stage, "fp32", OURS if by == "ours" else None, **OPTIMIZERS[saved])
        train(made, 1, seed=1)
        made.save_checkpoint(f"{out}/{saved}", tag="t")
    for saved, live in pairs:
        made = engine(stage, "fp32", OURS, seed=9, **OPTIMIZERS[live])
        found.append(refused(made, f"{out}/{saved}") | {"pair": (saved, live)})
    return found


def other_precisions(out: str, by: str) -> list[Told]:
    found = []
    for stage in (0, 2, 3):
        for saved, live in (("bf16", "fp32"), ("fp32", "bf16")):
            place = f"{out}/{stage}-{saved}"
            made = engine(stage, saved, OURS if by == "ours" else None)
            train(made, 1, seed=1)
            made.save_checkpoint(place, tag="t")
            found.append(refused(engine(stage, live, OURS, seed=9), place))
    return found


def missing_tags(out: str) -> dict[str, Told]:
    made = engine(2, "bf16", OURS)
    for tag in ("first", "second", "third"):
        train(made, 1, seed=1)
        made.save_checkpoint(out, tag=tag)
    stock = engine(2, "bf16", None)
    stock.save_checkpoint(f"{out}/stock", tag="theirs")
    rank0 = dist.get_rank() == 0
    if rank0:
        Path(out, "stock", "latest").write_text("gone")
        Path(out, "empty").mkdir()
    dist.barrier()
    live = engine(2, "bf16", OURS, seed=9)
    found = {
        "asked": refused(live, out, tag="nope"),
        "of stock": refused(live, f"{out}/stock", tag="nope"),
        "latest": refused(live, f"{out}/stock"),
        "no directory": refused(live, f"{out}/nowhere", tag="nope"),
    }
    found["nothing there"] = {"returned": [made.load_checkpoint(f"{out}/{place}") for place in ("empty", "nowhere")]}
    return found


def foreign_kinds(out: str) -> dict[str, Told]:
    """Directories of ours, or near ours, that hold no DeepSpeed checkpoint of a whole engine."""
    StateSaver(DeepSpeedConfig.parse(OURS, "the test")).save({"a": torch.ones(3)}, f"{out}/plain/t")
    made = engine(2, "bf16", OURS)
    made.save_checkpoint(f"{out}/whole/checkpoint-1/actor", tag="checkpoint-1")
    Path(f"{out}/none/t").mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return {
        "plain": refused(made, f"{out}/plain", tag="t"),
        "pipeline": refused(made, f"{out}/whole", tag="checkpoint-1"),
        "none": refused(made, f"{out}/none", tag="t"),
    }


def damaged_on_one_rank(out: str, stage: int, how: Told) -> Told:
    """A stock checkpoint of which one file, which rank 1 alone loads, is cut off."""
    stock = engine(stage, "fp32", None)
    train(stock, 1, seed=1)
    stock.save_checkpoint(out, tag="t")
    if dist.get_rank() == 0:
        (file,) = Path(out, "t").glob("*zero_pp_rank_1_*optim_states.pt")
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    dist.barrier()
    return refused(engine(stage, "fp32", OURS, seed=9), out, tag="t", **how)


def goes_on(out: str) -> dict[str, bool]:
    """Loads that stock allows: ZeRO-1 and 2 each other's, and offload to the CPU switched on and off."""
    cpu = {"offload_optimizer": {"device": "cpu"}}
    kinds = {
        "1": {"stage": 1},
        "2": {"stage": 2},
        "2 offloaded": {"stage": 2, **cpu},
        "3": {"stage": 3},
        "3 offloaded": {"stage": 3, **cpu, "offload_param": {"device": "cpu"}},
    }
    force = {"zero_force_ds_cpu_optimizer": False}
    found = {}
    for saved, live in [("1", "2"), ("2", "1"), ("2", "2 offloaded"), ("2 offloaded", "2"), ("3 offloaded", "3")]:
        place = f"{out}/{saved}-{live}"
        made = engine(kinds[saved]["stage"], "bf16", OURS, zero_optimization=kinds[saved], **force)
        train(made, 2, seed=1)
        made.save_checkpoint(place, tag="t")
        losses = train(made, 2, seed=2)
        other = engine(kinds[live]["stage"], "bf16", OURS, seed=9, zero_optimization=kinds[live], **force)
        other.load_checkpoint(place)
        found[f"{saved} into {live}"] = train(other, 2, seed=2) == losses
    return found


def weights_offloaded(out: str) -> Told:
    """Weights into an engine that keeps its parameters on the CPU, from a checkpoint without a tensor index."""
    saved_at(out, [(3, "fp32")], "stock")
    cpu = {"device": "cpu"}
    zero = {"stage": 3, "offload_optimizer": cpu, "offload_param": cpu}
    made = engine(3, "fp32", OURS, seed=9, zero_optimization=zero, zero_force_ds_cpu_optimizer=False)
    shutil.rmtree(f"{out}/3-fp32/later", ignore_errors=True)
    made.load_checkpoint(f"{out}/3-fp32", tag="asked", load_module_only=True)
    wanted, _ = torch.load(f"{out}/3-fp32.weights", weights_only=True)
    return {"same": same(wanted, weights_of(made))}
