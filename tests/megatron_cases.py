"""What the ranks of a world do in tests/test_megatron.py and tests/test_megatron_matrix.py; told the layout first."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import inspect
import json
import logging
import os
import pickle
import pkgutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_cpu
import torch
import torch.distributed as dist
from megatron_cpu import Tiny, build, gathered, model_state
from megatron_worlds import ANY_LAYOUT, UNGATHERED, sizes
from runs import ended, forked

megatron_cpu.install()

import megatron.core  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as strategies  # noqa: E402
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # noqa: E402

from roll_ckpt.backends.megatron import facts, handle  # noqa: E402
from roll_ckpt.backends.megatron.handle import MegatronHandle  # noqa: E402
from roll_ckpt.backends.megatron.load import load as load_  # noqa: E402
from roll_ckpt.backends.megatron.strategy import SaveStrategy  # noqa: E402
from roll_ckpt.config import Settings  # noqa: E402
from roll_ckpt.disk import failpoints  # noqa: E402
from roll_ckpt.errors import RollCkptError  # noqa: E402
from roll_ckpt.formats.dcp import items as dcp  # noqa: E402

NEXT_STEPS = 2
LAYERS = 4  # one for each virtual stage of PP2xVPP2

gc.freeze()  # Megatron collects garbage at each sharded_state_dict; what the imports made is none


def made(layout: str, **options: Any) -> Tiny:
    size = sizes(layout)
    return build(size["tp"], size["pp"], size["vpp"], **{"layers": LAYERS, **options})


def trained(layout: str, **options: Any) -> Tiny:
    tiny = made(layout, **options)
    tiny.train(2)
    return tiny


def attach(tiny: Tiny, sharding_type: str = ANY_LAYOUT, **settings: Any) -> MegatronHandle:
    told = Settings(**{"staging": {"check": "full"}, **settings})
    return handle.attach(tiny.model, tiny.optimizer, tiny.scheduler, settings=told, sharding_type=sharding_type)


# --- who saves and who loads ---------------------------------------------------------------------------------


def stock_state(tiny: Tiny, sharding_type: str, *, loading: bool = False) -> dict[str, Any]:
    """As Megatron's own training script makes it; without random states, whose place is ours."""
    told = {
        "distrib_optim_sharding_type": sharding_type,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    state = model_state(tiny, told)
    model = state.get("model", dict(state))
    return {
        **state,
        "optimizer": tiny.optimizer.sharded_state_dict(model, is_loading=loading, metadata=told),
        "opt_param_scheduler": tiny.scheduler.state_dict(),
        "iteration": tiny.steps,
        "checkpoint_version": 3.0,
    }


def stock_load(tiny: Tiny, directory: Path, sharding_type: str = ANY_LAYOUT) -> None:
    loaded = dist_checkpointing.load(stock_state(tiny, sharding_type, loading=True), str(directory))
    for index, chunk in enumerate(tiny.model):
        chunk.module.load_state_dict(loaded["model" if len(tiny.model) == 1 else f"model{index}"])
    with torch.no_grad():
        tiny.optimizer.load_state_dict(loaded["optimizer"])
    tiny.scheduler.load_state_dict(loaded["opt_param_scheduler"])
    tiny.steps = loaded["iteration"]


def our_load(tiny: Tiny, directory: Path, sharding_type: str = ANY_LAYOUT) -> None:
    tiny.steps = attach(tiny, sharding_type).load(directory)


def nothing() -> None:
    pass


def our_save(tiny: Tiny, directory: Path, sharding_type: str) -> Callable[[], None]:
    attach(tiny, sharding_type).save(directory, tiny.steps)
    return nothing


def stock_save(
    tiny: Tiny, directory: Path, sharding_type: str, strategy: Any = ("torch_dist", 1), queue: Any = None
) -> Callable[[], None]:
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    told = facts.content_metadata_of(sharding_type)
    mine = (
        {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
    )
    request = dist_checkpointing.save(
        stock_state(tiny, sharding_type),
        str(directory),
        strategy,
        async_sharded_save=queue is not None,
        content_metadata=told,
        **mine,
    )
    if queue is not None:
        queue.schedule_async_request(request)
    return nothing


def stock_save_as_0_19(tiny: Tiny, directory: Path, sharding_type: str) -> Callable[[], None]:
    """As stock 0.19 does, with the installed version: the common state is an object, and there is no `common.pt`."""
    rank = dist.get_rank()
    if rank == 0:
        directory.mkdir(parents=True)
    dist.barrier()
    state = {**stock_state(tiny, sharding_type), "content_metadata": facts.content_metadata_of(sharding_type)}
    sharded, common = save_preprocess(state)
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    TorchDistSaveShardedStrategy("torch_dist", 1).save(sharded, directory)
    if rank == 0:
        told = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(told))
    dist.barrier()
    return nothing


def make_index_of_0_15(layout: str, directory: str) -> None:
    """Let the index of a checkpoint be of the class that Megatron-core 0.15 has for it."""
    if dist.get_rank() == 0 and hasattr(strategies, "MCoreMetadata"):
        path = Path(directory) / ".metadata"
        index = pickle.loads(path.read_bytes())
        changed = strategies.MCoreMetadata.__new__(strategies.MCoreMetadata)
        changed.__dict__.update(vars(index), mcore_data={})
        path.write_bytes(pickle.dumps(changed))
    dist.barrier()


def save_with_our_strategy(tiny: Tiny, directory: Path, sharding_type: str) -> Callable[[], None]:
    return stock_save(tiny, directory, sharding_type, SaveStrategy())


def save_through_the_queue(tiny: Tiny, directory: Path, sharding_type: str) -> Callable[[], None]:
    """Our strategy, made fully parallel by Megatron, with cached plans and in its queue."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(SaveStrategy(cached_metadata=True), group)
    queue = AsyncCallsQueue()
    stock_save(tiny, directory, sharding_type, strategy, queue)

    def finish() -> None:
        queue.maybe_finalize_async_calls(blocking=True)
        queue.close()

    return finish


SAVE = {
    "ours": our_save,
    "stock": stock_save,
    "stock as 0.19": stock_save_as_0_19,
    "stock with our strategy": save_with_our_strategy,
    "stock's queue with our strategy": save_through_the_queue,
}
LOAD = {"ours": our_load, "stock": stock_load}


# --- the same model in every layout --------------------------------------------------------------------------


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or not torch.equal(found[name], wanted[name])
    ]


def save(
    layout: str, directory: str, who: str = "ours", sharding_type: str = ANY_LAYOUT, **options: Any
) -> list[tuple[float, float]]:
    """Save a trained model, and note beside the checkpoint what it is; the next losses and norms."""
    tiny = trained(layout, **options)
    wanted = gathered(tiny)
    assert {name.split(".")[2] for name in wanted if name.startswith("optimizer")} == {"param", "exp_avg", "exp_avg_sq"}
    finish = SAVE[who](tiny, Path(directory), sharding_type)
    if dist.get_rank() == 0:
        torch.save(wanted, f"{directory}.wanted")
    following = tiny.train(NEXT_STEPS)  # what waits in a queue is a copy
    finish()
    return following


def load(
    layout: str, directory: str, who: str = "ours", sharding_type: str = ANY_LAYOUT, **options: Any
) -> tuple[list[str], list[tuple[float, float]]]:
    """Load into a new model: what differs bit for bit from the one saved, and the next losses and norms."""
    wanted = torch.load(f"{directory}.wanted")
    tiny = made(layout, seed=7, **options)
    assert set(differences(gathered(tiny, moments=False), wanted)) > {"output_layer.weight"}, "not a new model"
    LOAD[who](tiny, Path(directory), sharding_type)
    return differences(gathered(tiny), wanted), tiny.train(NEXT_STEPS)


def resume_with_dropout(layout: str, directory: str, sharding_type: str) -> dict[str, Any]:
    """The next steps of a model with dropout: undisturbed, resumed, and resumed without its random states."""
    tiny = trained(layout, dropout=0.2)
    attach(tiny, sharding_type).save(directory, 2)
    told: dict[str, Any] = {"unbroken": tiny.train(NEXT_STEPS)}
    for name, load in {
        "resumed": our_load,
        "without random states": stock_load,
        "without tracker": _no_tracker,
    }.items():
        other = made(layout, dropout=0.2, seed=7)
        load(other, Path(directory), sharding_type)
        told[name] = other.train(NEXT_STEPS)
    return told


def _no_tracker(tiny: Tiny, directory: Path, sharding_type: str) -> None:
    tracker = tensor_parallel.get_cuda_rng_tracker()
    kept = tracker.get_states()
    our_load(tiny, directory, sharding_type)
    tracker.set_states(kept)


def die_in_a_save(layout: str, directory: str, sharding_type: str) -> None:
    """A save that ends well, training, and a second save, in which every rank is killed when its file is written."""
    tiny = made(layout, dropout=0.2)
    ours = attach(tiny, sharding_type, async_save=True)
    tiny.train(2)
    ours.save(Path(directory) / "iter_2", tiny.steps).wait(60)

    def killed(reached: str, where: dict[str, Any]) -> None:
        if reached == "write.done" and where.get("name") == "iter_4":
            os.kill(os.getpid(), signal.SIGKILL)

    tiny.train(2)
    failpoints.listener = killed
    ours.save(Path(directory) / "iter_4", tiny.steps).wait(60)


def go_on_after_a_kill(layout: str, directory: str, sharding_type: str) -> tuple[Any, int, Any]:
    """The steps after step 2 of a run that nobody killed, and of one that resumes from what `die_in_a_save` left."""
    unbroken = made(layout, dropout=0.2)
    unbroken.train(2)
    wanted = unbroken.train(NEXT_STEPS)
    tiny = made(layout, dropout=0.2, seed=7)
    newest = attach(tiny, sharding_type).find(directory)
    assert newest is not None
    our_load(tiny, newest, sharding_type)
    return wanted, tiny.steps, tiny.train(NEXT_STEPS)


def save_three_times(layout: str, directory: str) -> list[list[str]]:
    """Background saves, one after each step, loaded afterwards."""
    tiny = made(layout)
    ours = attach(tiny, UNGATHERED, async_save=True)
    saves, wanted = [], []
    for step in range(3):
        tiny.train()
        wanted.append(gathered(tiny))
        saves.append(ours.save(Path(directory) / f"iter_{step}", step))
    for save in saves:
        save.wait(60)
    found = []
    for step in range(3):
        other = made(layout, seed=7)
        our_load(other, Path(directory) / f"iter_{step}")
        found.append(differences(gathered(other), wanted[step]))
    return found


def error_of(action: Any) -> str:
    try:
        action()
    except RollCkptError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "no error"


def refusal_of_load(layout: str, directory: str, **options: Any) -> tuple[str, bool]:
    """The error of our load, and whether the model stayed as it was."""
    tiny = made(layout, **options)
    before = gathered(tiny, moments=False)
    told = error_of(lambda: our_load(tiny, Path(directory)))
    return told, not differences(gathered(tiny, moments=False), before)


def refusal_of_code(layout: str, directory: str) -> tuple[str, bool]:
    """`refusal_of_load` where torch is told to load without restriction."""
    with mock.patch.dict(os.environ, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1"):
        return refusal_of_load(layout, directory)


def load_without_optimizer(layout: str, directory: str) -> list[list[str]]:
    """What differs where no optimizer brings the weights back: saved and loaded by themselves, and in a load whose
    optimizer does nothing."""
    tiny = trained(layout)
    alone = handle.attach(tiny.model, tiny.optimizer, save_only_model=True)
    alone.save(Path(directory) / "alone", 2)
    attach(tiny).save(Path(directory) / "whole", 2)
    wanted = gathered(tiny, moments=False)
    told = []

    other = made(layout, seed=7)
    assert differences(gathered(other, moments=False), wanted)
    loaded = load_(model_state(other, facts.content_metadata_of(UNGATHERED)), f"{directory}/alone")
    for index, chunk in enumerate(other.model):
        chunk.module.load_state_dict(loaded["model" if len(other.model) == 1 else f"model{index}"])
    told.append(differences(gathered(other, moments=False), wanted))

    other = made(layout, seed=7)
    ours = attach(other)
    other.optimizer.load_state_dict = lambda state: None
    ours.load(Path(directory) / "whole")
    told.append(differences(gathered(other, moments=False), wanted))
    return told


def refusal_of_import(layout: str, holder: str, name: str) -> str:
    """The error of importing our backend where Megatron has no `name` in `holder`."""

    def import_without() -> str:
        owner = pkgutil.resolve_name(f"megatron.core.dist_checkpointing.{holder}")
        delattr(owner, name)
        return error_of(lambda: importlib.import_module("roll_ckpt.megatron"))

    return str(imported_anew(import_without))


def warnings_of_import(layout: str, version: str) -> list[str]:
    """What importing our backend, and using it, logs under a Megatron-core that says it is of another version."""

    def import_with() -> list[str]:
        told: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("roll_ckpt").addHandler(handler)
        megatron.core.__version__ = version
        importlib.import_module("roll_ckpt.megatron")
        sys.modules["roll_ckpt.backends.megatron.requirement"].check()
        return told

    return list(imported_anew(import_with))


def imported_anew(action: Callable[[], Any]) -> Any:
    """What `action` returns in a forked child that has not imported our backend: its import changes Megatron."""
    with tempfile.NamedTemporaryFile("r") as found:

        def work() -> None:
            rooms = ("roll_ckpt.megatron.", "roll_ckpt.backends.megatron.")
            for module in [module for module in sys.modules if f"{module}.".startswith(rooms)]:
                del sys.modules[module]
            Path(found.name).write_text(json.dumps(action()))

        assert ended(forked(work)) == 0
        return json.loads(found.read())


def save_and_keep_one(layout: str, directory: str) -> list[Path | None]:
    """The newest checkpoint, as it is found before each save and after the last."""
    tiny = made(layout)
    ours = attach(tiny, max_ckpt_to_keep=1)
    found = [ours.find(directory)]
    for step in range(2):
        tiny.train()
        ours.save(Path(directory) / f"iter_{step}", step)
        found.append(ours.find(directory))
    return found


def refusal_of_form(layout: str, sharding_type: str) -> str:
    tiny = made(layout)
    return error_of(lambda: attach(tiny, sharding_type))


def refusal_of_setting(layout: str, name: str) -> str:
    tiny = made(layout)
    tiny.model[0].ddp_config = dataclasses.replace(tiny.model[0].ddp_config, **{name: True})
    return error_of(lambda: attach(tiny))


def fail_on_one_rank(layout: str, directory: str, who: str) -> str:
    """A save that cannot be laid out on rank 1."""
    tiny = trained(layout)

    def broken(*args: Any) -> Any:
        raise OSError("no such tensor")

    stock = dcp.lay_out
    if dist.get_rank() == 1:
        dcp.lay_out = broken
    try:
        logging.disable(logging.CRITICAL)
        return error_of(lambda: SAVE[who](tiny, Path(directory), ANY_LAYOUT))
    finally:
        dcp.lay_out = stock
        logging.disable(logging.NOTSET)
