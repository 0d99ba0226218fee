"""What the ranks of a world do in tests/test_megatron_save.py."""

from __future__ import annotations

import functools
import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_cpu
import torch
import torch.distributed as dist
from late_copies import copied, hooks_off, late_copies
from megatron_cpu import Tiny, build, gathered
from megatron_worlds import UNGATHERED

megatron_cpu.install()

import megatron.core.distributed  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper  # noqa: E402

from roll_ckpt.backends.megatron import handle  # noqa: E402
from roll_ckpt.backends.megatron.fence import Fence  # noqa: E402
from roll_ckpt.backends.megatron.handle import MegatronHandle  # noqa: E402
from roll_ckpt.backends.megatron.save import save as save_  # noqa: E402
from roll_ckpt.backends.megatron.save import stage as stage_  # noqa: E402
from roll_ckpt.backends.megatron.strategy import SaveStrategy  # noqa: E402
from roll_ckpt.config import Settings  # noqa: E402
from roll_ckpt.disk import tree  # noqa: E402
from roll_ckpt.errors import RollCkptError  # noqa: E402
from roll_ckpt.formats.dcp import items as dcp  # noqa: E402
from roll_ckpt.formats.image import FileImage, Memory  # noqa: E402
from roll_ckpt.load.checkpoint import OpenedCheckpoint  # noqa: E402
from roll_ckpt.ranks.group import RankGroup  # noqa: E402
from roll_ckpt.save import pending  # noqa: E402
from roll_ckpt.save.begin import Request, begin  # noqa: E402
from roll_ckpt.save.cluster_save import ClusterSave  # noqa: E402
from roll_ckpt.save.save import Save  # noqa: E402
from roll_ckpt.transaction.home import beside_of  # noqa: E402

gc.freeze()  # Megatron collects garbage at each sharded_state_dict; what the imports made is none


def attach(tiny: Tiny, sharding_type: str = UNGATHERED, **settings: Any) -> MegatronHandle:
    told = Settings(**{"async_save": True, "staging": {"check": "full"}, **settings})
    return handle.attach(tiny.model, tiny.optimizer, tiny.scheduler, settings=told, sharding_type=sharding_type)


def trained(**options: Any) -> Tiny:
    tiny = build(**options)
    tiny.train(2)
    return tiny


def stock_loaded(directory: Path, make: Callable[..., Tiny] = build, **options: Any) -> Tiny:
    """A new model, loaded by stock code."""
    tiny = make(**options, seed=7)
    wanted = attach(tiny).state(loading=True, with_rng=False)
    loaded = dist_checkpointing.load(wanted, str(directory))
    tiny.model[0].module.load_state_dict(loaded["model"])
    with torch.no_grad():
        tiny.optimizer.load_state_dict(loaded["optimizer"])
    return tiny


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> list[str]:
    return [
        name
        for name in sorted({*found, *wanted})
        if name not in found or name not in wanted or not torch.equal(found[name], wanted[name])
    ]


def error_of(action: Callable[[], object]) -> str:
    logging.disable(logging.CRITICAL)
    try:
        action()
    except RollCkptError as problem:
        return f"{type(problem).__name__}: {problem}"
    finally:
        logging.disable(logging.NOTSET)
    return "no error"


# --- copies under training -----------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Tiny, dict[str, Any]], object]] = {
    "step": lambda tiny, old: tiny.optimizer.step(),
    "module": lambda tiny, old: tiny.model[0].module.load_state_dict(old["model"]),
    "chunk": lambda tiny, old: tiny.model[0].load_state_dict(old["model"]),
    "submodule": lambda tiny, old: tiny.model[0].module.output_layer.load_state_dict(old["output"]),
    "optimizer": lambda tiny, old: _load_optimizer(tiny, old),
    "reload": lambda tiny, old: tiny.optimizer.reload_model_params(),
    "broadcast": lambda tiny, old: tiny.model[0].broadcast_params(),
    "parameter state": lambda tiny, old: _load_parameter_state(tiny, old),
    "offload": lambda tiny, old: _offload(tiny),
}


def _distributed(tiny: Tiny) -> Any:
    return tiny.optimizer.chained_optimizers[0]


def _offload(tiny: Tiny) -> None:
    with mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor):
        for buffer in tiny.model[0].buffers:
            buffer.offload_to_cpu()


def _load_parameter_state(tiny: Tiny, old: dict[str, Any]) -> None:
    with torch.no_grad():
        _distributed(tiny).load_parameter_state_from_dp_zero(old["parameters"])


def _load_optimizer(tiny: Tiny, old: dict[str, Any]) -> None:
    with torch.no_grad():
        tiny.optimizer.load_state_dict(old["optimizer"])


def change_while_copying(directory: str) -> dict[str, tuple[bool, bool]]:
    """Change the model in each way as soon as a save has returned: whether there was something to copy then, and
    whether it was copied when the change was done."""
    tiny = trained()
    ours = attach(tiny)
    ours.save(Path(directory) / "old", 0).wait(60)
    loaded = dist_checkpointing.load(ours.state(loading=True, with_rng=False), str(Path(directory) / "old"))
    old = {
        "model": {key: value.clone() for key, value in loaded["model"].items() if torch.is_tensor(value)},
        "optimizer": loaded["optimizer"],
        "parameters": _distributed(tiny).get_parameter_state_dp_zero(),
        "output": {"weight": torch.zeros_like(tiny.model[0].module.output_layer.weight)},
    }
    told = {}
    for what, change in CHANGES.items():
        path = Path(directory) / what
        with late_copies(Settings()):
            save = ours.save(path, tiny.steps)
            late = not copied(save)
            change(tiny, old)
            told[what] = late, copied(save)
        save.wait(60)
    return told


def step_while_copying(directory: str, bf16: bool) -> dict[str, Any]:
    """Make the next step as soon as the save has returned, and load what was saved."""
    path = Path(directory) / "iter"
    tiny = trained(bf16=bf16)
    wanted = gathered(tiny)
    with late_copies(Settings()):
        save = attach(tiny).save(path, tiny.steps)
        tiny.optimizer.step()
    save.wait(60)
    return {
        "stepped": bool(differences(gathered(tiny), wanted)),
        "differ": differences(gathered(stock_loaded(path, bf16=bf16)), wanted),
    }


def step_without_the_fence(directory: str) -> list[str]:
    """A step that does not wait for the copies: how the save before it failed, and the one after it."""
    tiny = trained()
    ours, told = attach(tiny), []
    wait = Fence.wait
    for name, fence in (("torn", lambda fence: None), ("next", wait)):
        with late_copies(Settings()):
            save = ours.save(Path(directory) / name, tiny.steps)
            with mock.patch.object(Fence, "wait", fence), hooks_off(name == "torn"):
                tiny.optimizer.step()
        told.append(str(save.failure))
    return told


OTHER_CHANGES: dict[str, Callable[[Tiny], object]] = {
    "ema": lambda tiny: [p.data.copy_(p.data / 2) for p in tiny.model[0].parameters()],
    "foreach": lambda tiny: torch._foreach_add_(list(tiny.model[0].parameters()), 1.0),
    "main": lambda tiny: [p.mul_(2) for p in _distributed(tiny).optimizer.param_groups[0]["params"]],
    "flat buffer": lambda tiny: [buffer.param_data[:1].add_(1) for buffer in tiny.model[0].buffers],
    "base step": lambda tiny: _distributed(tiny).optimizer.step(),
}
"""Changes that no method of Megatron makes."""


def change_by_other_means(directory: str) -> dict[str, tuple[str, list[str]]]:
    """Change the model in each way as soon as a save has returned: how the save failed, and what differs in it."""
    told = {}
    for what, change in OTHER_CHANGES.items():
        path = Path(directory) / what
        tiny = trained()
        wanted = gathered(tiny)
        for parameter in _distributed(tiny).optimizer.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        with late_copies(Settings()):
            save = attach(tiny, staging={"check": "sample"}).save(path, tiny.steps)
            with torch.no_grad():
                change(tiny)
        told[what] = str(save.failure), [] if save.failure else differences(gathered(stock_loaded(path)), wanted)
    return told


def load_while_copying(directory: str) -> dict[str, Any]:
    """Load an older checkpoint while a newer one is being copied."""
    tiny = trained()
    ours = attach(tiny)
    ours.save(Path(directory) / "old", 2).wait(60)
    before = gathered(tiny)
    tiny.train()
    wanted = gathered(tiny)
    path = Path(directory) / "new"
    with late_copies(Settings()):
        ours.save(path, 3)
        step = ours.load(Path(directory) / "old")
    return {
        "step": step,
        "old": differences(gathered(tiny), before),
        "new": differences(gathered(stock_loaded(path)), wanted),
    }


@contextmanager
def watched_images() -> Iterator[list[FileImage]]:
    images: list[FileImage] = []
    stage = ClusterSave.stage

    def watched(cluster_save: ClusterSave, path: Path, image: FileImage, **how: bool) -> None:
        images.append(image)
        stage(cluster_save, path, image, **how)

    with mock.patch.object(ClusterSave, "stage", watched):
        yield images


def who_is_late(directory: str, sharding_type: str, bf16: bool, **settings: Any) -> dict[str, Any]:
    """Which bytes may be copied after a save has returned: those of the model, of main parameters and moments, and of
    anything else; by the first save and by one that replays its plan."""
    tiny = trained(bf16=bf16)
    ours = attach(tiny, sharding_type, **settings)
    kinds: dict[int, str] = {}
    for part in tiny.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                kinds[parameter.untyped_storage()._cdata] = "main"
                for value in part.optimizer.state[parameter].values():
                    kinds[value.untyped_storage()._cdata] = "moments"
    for parameter in tiny.model[0].parameters():
        kinds[parameter.untyped_storage()._cdata] = "model"
    told: dict[str, Any] = {}
    for turn in ("first", "replayed"):
        with watched_images() as images:
            ours.save(Path(directory) / turn, 1).wait(60)
        late: dict[str, set[bool]] = {}
        for image in images:
            for extent in image.extents:
                if isinstance(extent.source, Memory):
                    kind = kinds.get(extent.source.owner._cdata, "other")
                    late.setdefault(kind, set()).add(extent.lifetime)
        told[turn] = {kind: sorted(found) for kind, found in late.items()}
    return told


def fail_in_the_background(directory: str, fail_training: bool) -> list[str]:
    tiny = trained()
    ours = attach(tiny, fail_training=fail_training)
    broken = dist.get_rank() == 1
    finish = ClusterSave.finish

    def failing(cluster_save: ClusterSave) -> Any:
        cluster_save.fail(OSError("the disk is gone"))
        return finish(cluster_save)

    logging.disable(logging.CRITICAL)
    with mock.patch.object(ClusterSave, "finish", failing if broken else finish):
        ours.save(Path(directory) / "bad", 2)
        pending.wait_pending()
    told = [error_of(tiny.optimizer.step), error_of(tiny.optimizer.step)]
    with mock.patch.object(tree, "free_bytes", lambda path: 10):  # a disk that is full before the save begins
        begun = ours.save(Path(directory) / "worse", 3).begun
    told += [str(begun), error_of(tiny.optimizer.step)]
    ours.save(Path(directory) / "good", 4).wait(60)
    return told


# --- plans ---------------------------------------------------------------------------------------------------


@contextmanager
def counted_rendezvous() -> Iterator[dict[str, int]]:
    """How often ranks met inside the block."""
    counts: dict[str, int] = {}

    def counting(owner: Any, name: str) -> Any:
        stock = getattr(owner, name)

        @functools.wraps(stock)
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return stock(*args, **kwargs)

        return mock.patch.object(owner, name, counted)

    names = (
        *("all_gather", "all_gather_object", "all_gather_into_tensor", "all_reduce", "barrier", "broadcast"),
        *("broadcast_object_list", "gather", "gather_object", "reduce_scatter", "scatter", "scatter_object_list"),
    )
    patches = [counting(dist, name) for name in names] + [counting(RankGroup, "decide_on_rank0")]
    for patch in patches:
        patch.start()
    try:
        yield counts
    finally:
        for patch in patches:
            patch.stop()


def save_every_step(directory: str) -> dict[str, Any]:
    """A save after each of three steps: how the ranks met in it, and what stock and we find in it."""
    tiny = build(bf16=True, dropout=0.1)
    ours = attach(tiny)
    met, wanted = [], []
    for step in range(3):
        tiny.train()
        wanted.append(gathered(tiny))
        with counted_rendezvous() as counts:
            save = ours.save(Path(directory) / f"iter_{step}", step)
        met.append(dict(counts))
        save.wait(60)
    unbroken = tiny.train(1)
    loaded = [gathered(stock_loaded(Path(directory) / f"iter_{step}", bf16=True)) for step in range(3)]
    found = [differences(*pair) for pair in zip(loaded, wanted, strict=True)]
    again = build(bf16=True, dropout=0.1, seed=7)
    again.steps = attach(again).load(Path(directory) / "iter_2") + 1
    return {
        "met": met,
        "found": found,
        "ours": differences(gathered(again), wanted[2]),
        "unbroken": unbroken,
        "resumed": again.train(1),
    }


def state_of(turn: int, **more: Any) -> dict[str, Any]:
    """A state of all kinds of parts, whose values tell the turn."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def values(shape: tuple[int, ...], offset: int = 0, dtype: Any = torch.float32) -> torch.Tensor:
        return (torch.arange(torch.Size(shape).numel()) + 1000 * turn + offset).to(dtype).reshape(shape)

    rows = more.get("rows", 8)
    state: dict[str, Any] = {
        "sharded": ShardedTensor.from_rank_offsets(
            "sharded", values((rows, 1 << 14), 100 * rank, more.get("dtype", torch.float32)), (0, rank, size)
        ),
        "copied": ShardedTensor.from_rank_offsets("copied", values((64, 3)), replica_id=rank),
        "strided": ShardedTensor.from_rank_offsets("strided", values((5, 7)).t(), replica_id=rank),
        "scalar": ShardedTensor.from_rank_offsets("scalar", torch.tensor(float(turn)), replica_id=rank),
        "layers": [
            ShardedTensor.from_rank_offsets(
                "layers", values((4,), 10 * layer), (0, layer, 3), replica_id=rank, prepend_axis_num=1
            )
            for layer in range(3)
        ],
        "mine": ShardedObject("mine", {"turn": turn, "pad": "x" * more.get("pad", 10)}, (size,), (rank,)),
        "common": {"turn": turn, "list": [turn, "y" * more.get("common", 10)]},
    }
    for name in more.get("extra", ()):
        state[name] = ShardedTensor.from_rank_offsets(name, values((16,)), replica_id=0)
    return state


def plain(value: Any) -> Any:
    if isinstance(value, ShardedTensor | ShardedObject):
        return plain(value.data)
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def turns() -> list[tuple[str, dict[str, Any]]]:
    """What changes from save to save; some of it on one rank only."""
    second = dist.get_rank() == 1
    return [
        ("first", {}),
        ("values", {}),
        ("common grows", {"common": 1 << 20}),
        ("object grows a little", {"pad": 200}),
        ("object grows by a lot on one rank", {"pad": 1 << 20 if second else 10}),
        ("large object again", {"pad": 1 << 20 if second else 10}),
        ("object shrinks", {"pad": 5}),
        ("dtype", {"dtype": torch.bfloat16}),
        ("dtype again", {"dtype": torch.bfloat16}),
        ("shape", {"rows": 9}),
        ("one rank has more", {"extra": ["e1", "e2"] if second else []}),
        ("again", {"extra": ["e1", "e2"] if second else []}),
        ("one rank has less", {"extra": ["e1"] if second else []}),
    ]


def strategy_for(wrapped: bool) -> Any:
    inner = SaveStrategy(Settings(async_save=True), cached_metadata=True)
    if not wrapped:
        return inner
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return FullyParallelSaveStrategyWrapper(inner, group, do_cache_distribution=True)


def _read_back(directory: Path, turn: int, more: dict[str, Any]) -> bool:
    wanted = plain(state_of(turn, **more))
    blank = {key: value for key, value in state_of(-1, **more).items() if key != "common"}
    loaded = dist_checkpointing.load(blank, str(directory))
    return bool(wanted == {key: plain(loaded[key]) for key in wanted})


def change_structure(directory: str, wrapped: bool) -> dict[str, tuple[bool, bool]]:
    """For each turn: whether the plan was replayed, and whether stock reads what was saved."""
    build()  # Megatron's process groups
    strategy, told = strategy_for(wrapped), {}
    for turn, (what, more) in enumerate(turns()):
        path = Path(directory) / f"turn_{turn}"
        save = save_(state_of(turn, **more), path, step=turn, settings=Settings(async_save=True), strategy=strategy)
        save.wait(60)
        told[what] = ("model" in save.reused_plans, _read_back(path, turn, more))
    return told


def stage_without_prepare(directory: str) -> dict[str, tuple[int, bool]]:
    """As a pipeline's cluster does, that begins the save itself: collectives of each turn, and what stock reads."""
    build()
    strategy, told = strategy_for(True), {}
    for turn, (what, more) in enumerate(turns()[:8]):
        world = RankGroup.current()
        request = Request(Path(directory), f"turn_{turn}", turn, {"a": world.size, "b": world.size})
        save = begin(world, request, Settings(async_save=True), nbytes=0)
        others = strategy_for(False)
        with save.staging():
            with counted_rendezvous() as counts:
                stage_(save.add_cluster("a", {}), save.attempt.checkpoint_dir / "a", state_of(turn, **more), strategy)
            met = {**counts}
            stage_(save.add_cluster("b", {}), save.attempt.checkpoint_dir / "b", state_of(turn), others, {"told": turn})
        save.wait(60)
        agreed = met.pop("decide_on_rank0")
        assert agreed == (2 if met else 1)
        read = _read_back(Path(directory) / f"turn_{turn}" / "a", turn, more)
        read = read and _read_back(Path(directory) / f"turn_{turn}" / "b", turn, {})
        kept = dist_checkpointing.load_content_metadata(str(Path(directory) / f"turn_{turn}" / "b"))
        told[what] = (sum(met.values()), read and kept == {"told": turn})
    return told


def fail_to_lay_out(directory: str) -> dict[str, Any]:
    """Rank 1 cannot lay out a plan, later it cannot replay one; the saves after that are sound.

    The first of these is the first save of all, so every rank raises."""
    build()
    strategy, told = strategy_for(True), []
    second = dist.get_rank() == 1

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no such tensor")

    def save(turn: int) -> Save:
        path = Path(directory) / f"turn_{turn}"
        made = save_(state_of(turn), path, step=turn, settings=Settings(async_save=True), strategy=strategy)
        made._settled.wait(60)
        return made

    for turn, name in enumerate(["template", None, "join", None]):
        with mock.patch.object(dcp, name, broken) if name and second else mock.patch("os.sep", os.sep):
            if turn == 0:
                told.append((False, False, error_of(functools.partial(save, turn))))
                continue
            made = save(turn)
        sound = made.failure is None and _read_back(Path(directory) / f"turn_{turn}", turn, {})
        told.append((sound, "model" in made.reused_plans, str(made.failure or "")))
    return {"told": told}


def invalid_sharding(directory: str) -> str:
    """Two ranks each have the whole of a tensor: stock code says so on rank 0 alone, before it plans."""
    build()
    settings = Settings(async_save=True)
    return error_of(lambda: save_(state_of(0, extra=["twice"]), Path(directory) / "iter", settings=settings).wait(60))


def thrown_away_while_planning(directory: str) -> list[str]:
    """The attempt is moved away, as if thrown away, while stock code plans: what is there in its place."""
    build()
    output_dir, aside = Path(directory), Path(f"{directory}.aside")
    home = beside_of(output_dir)
    assert home is not None
    found: list[str] = []
    stock = SaveStrategy.planned_by_stock

    def planned(*args: Any) -> Any:
        if dist.get_rank() == 0:
            attempt = next(path for path in home.iterdir() if path.suffix == ".tmp")
            attempt.rename(aside)
        dist.barrier()
        told = stock(*args)
        dist.barrier()
        found.extend(path.name for path in home.iterdir() if path.suffix == ".tmp")
        dist.barrier()
        if dist.get_rank() == 0 and not found:
            aside.rename(attempt)
        dist.barrier()
        return told

    with mock.patch.object(SaveStrategy, "planned_by_stock", planned):
        save_(state_of(0), output_dir / "iter", settings=Settings(async_save=True)).wait(60)
    return found


# --- refusals ------------------------------------------------------------------------------------------------


def save_before_the_first_step(directory: str, sharding_type: str) -> tuple[str, bool]:
    tiny = build()
    ours = attach(tiny, sharding_type)
    told = error_of(lambda: ours.save(Path(directory) / "iter_0", 0))
    untouched = not Path(directory).exists()
    dist.barrier()
    tiny.train()
    ours.save(Path(directory) / "iter_1", 1).wait(60)
    return told, untouched


def load_what_one_rank_does_not_see(directory: str) -> str:
    tiny = trained()
    ours = attach(tiny)
    ours.save(Path(directory) / "iter", 2).wait(60)
    stock = OpenedCheckpoint.around.__func__  # type: ignore[attr-defined]
    blind = dist.get_rank() == 1
    with mock.patch.object(
        OpenedCheckpoint, "around", classmethod(lambda cls, path: None if blind else stock(cls, path))
    ):
        return error_of(lambda: ours.load(Path(directory) / "iter"))


# --- overlap_param_gather ------------------------------------------------------------------------------------


def built(overlap: bool, **options: Any) -> Tiny:
    """A model whose parameters are gathered during the forward pass, or in the step."""
    import megatron.core.optimizer as optimizer

    config, settings = megatron.core.distributed.DistributedDataParallelConfig, optimizer.OptimizerConfig
    more = {"overlap_param_gather": overlap}
    with (
        mock.patch.object(
            megatron.core.distributed,
            "DistributedDataParallelConfig",
            functools.partial(config, overlap_grad_reduce=True, bucket_size=5000, **more),
        ),
        mock.patch.object(optimizer, "OptimizerConfig", functools.partial(settings, **more)),
    ):
        return build(**options)


def gather_late(directory: str) -> dict[str, Any]:
    """Saves of a run with `overlap_param_gather` against those of one without."""
    told: dict[str, Any] = {}
    kept: dict[bool, list[dict[str, torch.Tensor]]] = {}
    for overlap in (False, True):
        make = functools.partial(built, overlap)
        tiny = make(bf16=True)
        ours = attach(tiny)
        losses, saves, kept[overlap] = [], [], []
        for step in range(2):
            losses += tiny.train()
            path = Path(directory) / f"{overlap}_{step}"
            with late_copies(Settings()), watched_images() as images:
                saves.append(ours.save(path, step))
                losses += tiny.train()
            buffers = {buffer.param_data.untyped_storage()._cdata for buffer in tiny.model[0].buffers}
            late: dict[str, set[bool]] = {"parameters": set(), "others": set()}
            for extent in [extent for image in images for extent in image.extents]:
                if isinstance(extent.source, Memory):
                    late["parameters" if extent.source.owner._cdata in buffers else "others"].add(extent.lifetime)
            told[f"late {overlap}"] = {kind: sorted(found) for kind, found in late.items()}
        for step, save in enumerate(saves):
            save.wait(60)
            kept[overlap].append(gathered(stock_loaded(Path(directory) / f"{overlap}_{step}", make, bf16=True)))
        told[f"losses {overlap}"] = losses
    told["differ"] = [differences(late, early) for late, early in zip(kept[True], kept[False], strict=True)]
    other = built(True, bf16=True, seed=7)
    other.steps = 3
    attach(other).load(Path(directory) / "True_1")
    told["resumed"] = other.train()
    return told


# --- a working directory that changes -------------------------------------------------------------------------


def wander(home: str) -> None:
    """Save, find and load by paths that mean something else in the working directory that comes next."""
    before, home_before = os.getcwd(), os.environ.get("HOME", "")
    os.environ["HOME"] = home
    try:
        os.chdir(home)
        os.makedirs("elsewhere", exist_ok=True)
        handle = attach(trained(), async_save=True)
        saves = [handle.save("runs/one", 1), handle.save("~/runs/two", 2)]
        os.chdir("elsewhere")
        for save in saves:
            save.wait(60)
        found = handle.find("$HOME/runs")
        assert found == Path(home) / "runs/two" and handle.load(found) == 2, found
    finally:
        os.chdir(before)
        os.environ["HOME"] = home_before


def save_under(directory: str, umask: int) -> None:
    """Save once under a umask."""
    before = os.umask(umask)
    try:
        attach(trained()).save(directory, 1).wait()
    finally:
        os.umask(before)
