"""What the ranks of a world do in tests/test_megatron.py."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import megatron_cpu
import torch
import torch.distributed as dist
from megatron_cpu import Tiny, build, gathered

megatron_cpu.install()

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402

from roll_ckpt import errors  # noqa: E402
from roll_ckpt.backends import megatron as backend  # noqa: E402
from roll_ckpt.config import Settings  # noqa: E402
from roll_ckpt.layout import dcp  # noqa: E402

LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2), "DP2": (1, 1)}
NEXT_STEPS = 2


def attach(tiny: Tiny, form: str = "fully_reshardable", **settings: Any) -> backend.Attached:
    return backend.attach(tiny.model, tiny.optimizer, tiny.scheduler, settings=Settings(**settings), form=form)


def trained(layout: str, **options: Any) -> Tiny:
    tiny = build(*LAYOUTS[layout], **options)
    tiny.train(2)
    return tiny


def stock_load(tiny: Tiny, directory: Path, form: str = "fully_reshardable") -> None:
    """As Megatron's own training script loads; without random states, whose place is ours."""
    bare = attach(tiny, form)
    loaded = dist_checkpointing.load(bare.state(loading=True, with_rng=False), str(directory))
    tiny.model[0].module.load_state_dict(loaded["model"])
    with torch.no_grad():
        tiny.optimizer.load_state_dict(loaded["optimizer"])
    tiny.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    tiny.steps = loaded["iteration"]


def our_load(tiny: Tiny, directory: Path, form: str = "fully_reshardable") -> None:
    tiny.steps = attach(tiny, form).load(directory)


def stock_save(tiny: Tiny, directory: Path, strategy: Any, queue: Any = None, form: str = "fully_reshardable") -> None:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    state = attach(tiny, form).state(tiny.steps, with_rng=False)
    told = backend.content_metadata_of(form)
    request = dist_checkpointing.save(
        state, str(directory), strategy, async_sharded_save=queue is not None, content_metadata=told
    )
    if queue is not None:
        queue.schedule_async_request(request)


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or not torch.equal(found[name], wanted[name])
    ]


def loads_everywhere(directory: Path, wanted: dict[str, torch.Tensor], **options: Any) -> dict[str, Any]:
    """For each layout and loader: what differs bit for bit, and the next losses and norms."""
    results = {}
    for layout in LAYOUTS:
        for who, load in {"stock": stock_load, "ours": our_load}.items():
            tiny = build(*LAYOUTS[layout], **{**options, "seed": 7})
            fresh = gathered(tiny, moments=False)
            assert set(differences(fresh, wanted)) > {"output_layer.weight"}, "a new model is another one"
            load(tiny, directory)
            results[f"{layout} {who}"] = differences(gathered(tiny), wanted), tiny.train(NEXT_STEPS)
    return results


def save_with_us_load_with_all(directory: str, layout: str, bf16: bool) -> tuple[Any, Any]:
    tiny = trained(layout, bf16=bf16)
    wanted = gathered(tiny)
    assert {name.split(".")[2] for name in wanted if name.startswith("optimizer")} == {"param", "exp_avg", "exp_avg_sq"}
    attach(tiny).save(directory, 2)
    return tiny.train(NEXT_STEPS), loads_everywhere(Path(directory), wanted, bf16=bf16)


def save_with_stock_load_with_all(directory: str, layout: str) -> tuple[Any, Any]:
    tiny = trained(layout)
    wanted = gathered(tiny)
    stock_save(tiny, Path(directory), ("torch_dist", 1))
    return tiny.train(NEXT_STEPS), loads_everywhere(Path(directory), wanted)


def save_through_stock(directory: str, layout: str, wrapped: bool, queued: bool) -> tuple[Any, Any]:
    """Stock `dist_checkpointing.save`, with our strategy in it."""
    tiny = trained(layout)
    wanted = gathered(tiny)
    strategy: Any = backend.SaveStrategy(cached_metadata=queued)
    if wrapped:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    queue = AsyncCallsQueue() if queued else None
    stock_save(tiny, Path(directory), strategy, queue)
    after = tiny.train(NEXT_STEPS)  # what was queued is a copy
    if queue is not None:
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()
    return after, loads_everywhere(Path(directory), wanted)


def resume_with_dropout(directory: str, layout: str, form: str) -> dict[str, Any]:
    """The next steps of a model with dropout: undisturbed, resumed, and resumed without its random states."""
    tiny = trained(layout, dropout=0.2)
    attach(tiny, form).save(directory, 2)
    told: dict[str, Any] = {"unbroken": tiny.train(NEXT_STEPS)}
    for name, load in {
        "resumed": our_load,
        "without random states": stock_load,
        "without tracker": _no_tracker,
    }.items():
        other = build(*LAYOUTS[layout], dropout=0.2, seed=7)
        load(other, Path(directory), form)
        told[name] = other.train(NEXT_STEPS)
    return told


def _no_tracker(tiny: Tiny, directory: Path, form: str) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    kept = tracker.get_states()
    our_load(tiny, directory, form)
    tracker.set_states(kept)


def save_three_times(directory: str, layout: str) -> list[list[str]]:
    """Background saves, one after each step, loaded afterwards."""
    tiny = build(*LAYOUTS[layout])
    ours = attach(tiny, "dp_reshardable", async_save=True)
    saves, wanted = [], []
    for step in range(3):
        tiny.train()
        wanted.append(gathered(tiny))
        saves.append(ours.save(Path(directory) / f"iter_{step}", step))
    for save in saves:
        save.wait(60)
    found = []
    for step in range(3):
        other = build(*LAYOUTS[layout], seed=7)
        our_load(other, Path(directory) / f"iter_{step}")
        found.append(differences(gathered(other), wanted[step]))
    return found


def error_of(action: Any) -> str:
    try:
        action()
    except errors.RollCkptError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "no error"


def save_as(directory: str, layout: str, form: str = "fully_reshardable", hidden: int = 32) -> None:
    attach(trained(layout, hidden=hidden), form).save(directory, 2)


def refusal_of_load(directory: str, layout: str, hidden: int = 32) -> tuple[str, bool]:
    """The error of our load, and whether the model stayed as it was."""
    tiny = build(*LAYOUTS[layout], hidden=hidden)
    before = gathered(tiny, moments=False)
    told = error_of(lambda: our_load(tiny, Path(directory)))
    return told, not differences(gathered(tiny, moments=False), before)


def save_and_keep_one(directory: str) -> None:
    tiny = build()
    ours = attach(tiny, max_ckpt_to_keep=1)
    for step in range(2):
        tiny.train()
        ours.save(Path(directory) / f"iter_{step}", step)


def refusal_of_form(form: str) -> str:
    tiny = build()
    return error_of(lambda: attach(tiny, form))


def refusal_of_setting(name: str) -> str:
    tiny = build()
    tiny.model[0].ddp_config = dataclasses.replace(tiny.model[0].ddp_config, **{name: True})
    return error_of(lambda: attach(tiny))


def fail_on_one_rank(directory: str, who: str) -> str:
    """A save that cannot be laid out on rank 1."""
    tiny = trained("TP2")

    def broken(*args: Any) -> Any:
        raise OSError("no such tensor")

    stock = dcp.lay_out
    if dist.get_rank() == 1:
        dcp.lay_out = broken
    try:
        logging.disable(logging.CRITICAL)
        if who == "stock":
            return error_of(lambda: stock_save(tiny, Path(directory), backend.SaveStrategy()))
        return error_of(lambda: attach(tiny).save(directory, 2))
    finally:
        dcp.lay_out = stock
        logging.disable(logging.NOTSET)
