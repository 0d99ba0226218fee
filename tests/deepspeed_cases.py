"""What the ranks of a test world do in tests/test_deepspeed.py: real engines, real saves."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.sequence.layer import DistributedAttention
from deepspeed.utils import groups
from late_copies import copied, hooks_off, late_copies
from tiny import Net, config, engine, train

from roll_ckpt import process
from roll_ckpt.backends.backend import ClusterOptions
from roll_ckpt.backends.deepspeed import checkpoint_engine, install
from roll_ckpt.backends.deepspeed.checkpoint_engine import RollCheckpointEngine
from roll_ckpt.backends.deepspeed.cluster import DeepSpeedCluster
from roll_ckpt.backends.deepspeed.tensors import estimate_bytes
from roll_ckpt.config import DeepSpeedConfig
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import RollCkptError
from roll_ckpt.formats.image import FileImage, Memory
from roll_ckpt.native import extension
from roll_ckpt.save import arena, cluster_save
from roll_ckpt.save import pending as pending_module
from roll_ckpt.save.cluster_save import ClusterSave

with contextlib.suppress(ImportError):  # since DeepSpeed 0.17.0
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

BLOCK = 1 << 16
SMALL_IO = {"block_bytes": BLOCK}
OURS: dict[str, Any] = {"async_save": True, "io": SMALL_IO, "staging": {"arena_bytes": 64 << 20, "check": "full"}}


def settings(**more: Any) -> dict[str, Any]:
    return {**OURS, **more}


@contextlib.contextmanager
def new_arena():  # type: ignore[no-untyped-def]
    """Let the block make an arena of other sizes: a process has one, so the block has a registry of its own."""
    pending_module.wait_pending()
    with process.installed(process.Process()):
        yield
        pending_module.wait_pending()


def save_with_us_load_with_all(out: str, stage: int, precision: str, **more: Any) -> dict[str, list[float]]:
    """Train, save with us while training goes on, then load with stock DeepSpeed and with us."""
    ours = engine(stage, precision, settings(), **more)
    train(ours, 3, seed=1)
    ours.save_checkpoint(out, tag="ours", client_state={"note": "kept", "tensor": torch.arange(5)})
    losses = {"unbroken": train(ours, 3, seed=2)}
    pending_module.wait_pending()
    stock = engine(stage, precision, None, seed=7, **more)
    path, state = stock.load_checkpoint(out)
    assert path is not None and path.startswith(out) and state["note"] == "kept"
    assert torch.equal(state["tensor"], torch.arange(5))
    losses["stock"] = train(stock, 3, seed=2)
    again = engine(stage, precision, settings(), seed=8, **more)
    assert again.load_checkpoint(out)[1]["note"] == "kept"
    losses["ours"] = train(again, 3, seed=2)
    return losses


def save_with_stock_load_with_us(out: str, stage: int, precision: str, **more: Any) -> dict[str, list[float]]:
    stock = engine(stage, precision, None, **more)
    train(stock, 3, seed=1)
    stock.save_checkpoint(out, client_state={"note": "kept"})
    losses = {"unbroken": train(stock, 3, seed=2)}
    ours = engine(stage, precision, settings(), seed=9, **more)
    assert ours.load_checkpoint(out)[1]["note"] == "kept"
    losses["ours"] = train(ours, 3, seed=2)
    return losses


def write_for_tools(out: str, stage: int) -> dict[str, list[float]]:
    """A checkpoint for zero_to_fp32 and ds_to_universal; returns the full fp32 weights' sums by name."""
    made = engine(stage, "bf16", settings(async_save=False))
    train(made, 2, seed=1)
    made.save_checkpoint(out)
    return {"step": [float(made.global_steps)]}


def stream_through_a_quarter(out: str, stage: int) -> dict[str, Any]:
    """Save a state four times the arena, then load it back."""
    width = 256
    share = {"LOCAL_WORLD_SIZE": 2}["LOCAL_WORLD_SIZE"]
    made = engine(stage, "bf16", None, width=width)
    train(made, 2, seed=1)
    state_bytes = max(gathered(estimate_bytes(made)))
    cap = max(2 * BLOCK, state_bytes // 4 // BLOCK * BLOCK)
    ours = settings(staging={"arena_bytes": cap * share})
    with new_arena():
        install.attach(made, DeepSpeedConfig.parse(ours, "test"), "model")
        made.save_checkpoint(out)
        losses = train(made, 2, seed=2)
        pending_module.wait_pending()
        used = arena.mover(install.attached(made).settings).arena  # type: ignore[union-attr]
        peak, capacity = used.peak_bytes, used.capacity_bytes
    stock = engine(stage, "bf16", None, seed=3, width=width)
    stock.load_checkpoint(out)
    return {
        "peak": peak,
        "capacity": capacity,
        "state": state_bytes,
        "same": train(stock, 2, seed=2) == losses,
    }


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def overlapping_saves(out: str) -> dict[str, Any]:
    """Save at every step, asynchronously, and load each of them."""
    made = engine(2, "bf16", settings())
    losses: list[list[float]] = []
    for step in range(4):
        made.save_checkpoint(out, tag=f"t{step}", save_latest=step != 3)
        losses.append(train(made, 1, seed=step))
    pending_module.wait_pending()
    again = [None] * 4
    loaded = engine(2, "bf16", settings(), seed=4)
    for step in range(4):
        loaded.load_checkpoint(out, tag=f"t{step}")
        again[step] = train(loaded, 1, seed=step)
    return {"losses": losses, "again": again, "latest": (Path(out) / "latest").read_text()}


def start_unlike(out: str) -> str:
    """The error of making an engine whose section names another run on each rank."""
    section = settings(run_id=f"rank {dist.get_rank()}")
    return raised(lambda: engine(1, "bf16", section))


def save_one_tag_twice(out: str, asynchronous: bool) -> dict[str, Any]:
    made = engine(3, "bf16", settings(async_save=asynchronous))
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="same")
    train(made, 1, seed=2)
    made.save_checkpoint(out, tag="same")
    losses = train(made, 2, seed=3)
    loaded = engine(3, "bf16", settings(), seed=4)
    loaded.load_checkpoint(out)
    return {"losses": losses, "again": train(loaded, 2, seed=3), "step": loaded.global_steps - 2}


def leave_frozen_out(out: str) -> dict[str, Any]:
    made = engine(2, "bf16", settings(async_save=False))
    train(made, 1, seed=1)
    made.save_checkpoint(out, exclude_frozen_parameters=True)
    state = torch.load(Path(out) / "global_step1" / "mp_rank_00_model_states.pt", weights_only=True)
    return {"frozen": [name for name in state["module"] if "frozen" in name], "names": len(state["module"])}


def write_16bit_model(out: str, stage: int) -> dict[str, Any]:
    more = {"zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}}
    made = engine(stage, "bf16", settings(), **more)
    train(made, 1, seed=1)
    assert made.save_16bit_model(out, "weights.bin") is True
    weights = torch.load(Path(out) / "weights.bin", weights_only=True)
    stock = install.stock("save_16bit_model")
    before = made.checkpoint_engine
    made.checkpoint_engine = engine(0, "bf16", None).checkpoint_engine
    stock(made, out, "stock.bin")
    made.checkpoint_engine = before
    dist.barrier()
    reference = torch.load(Path(out) / "stock.bin", weights_only=True)
    return {
        "same": list(weights) == list(reference) and all(torch.equal(weights[n], reference[n]) for n in reference),
        "files": sorted(p.name for p in Path(out).iterdir()),
    }


def fail_16bit_model(out: str) -> str:
    made = engine(2, "bf16", settings())
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "weights.bin").mkdir(exist_ok=True)
    return raised(lambda: made.save_16bit_model(out, "weights.bin"))


def raised(action: Any) -> str:
    """Class and text of the error of ours that `action` raises."""
    try:
        action()
    except RollCkptError as problem:
        return f"{type(problem).__name__}: {problem}"
    return "nothing was raised"


@contextlib.contextmanager
def cannot_be_saved(module: torch.nn.Module, rank: int):  # type: ignore[no-untyped-def]
    """In the block, the state of `module` holds a function on `rank`: staging meets it, nothing before does."""

    def add(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[f"{prefix}hook"] = lambda: 0

    hook = module._register_state_dict_hook(add) if dist.get_rank() == rank else contextlib.nullcontext()
    with hook:
        yield


def fail_on_one_rank(out: str, asynchronous: bool) -> dict[str, Any]:
    """Rank 1 cannot pickle the state of its module: nobody hangs, nobody commits, the next save works."""
    made = engine(3, "bf16", settings(async_save=asynchronous))
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="good")
    with cannot_be_saved(made.module, rank=1):
        told = raised(lambda: made.save_checkpoint(out, tag="bad"))
    pending = pending_module.pending()
    pending_module.wait_pending()
    failures = [str(save.failure) for save in pending if save.failure is not None]
    train(made, 1, seed=2)
    latest = (Path(out) / "latest").read_text()
    made.save_checkpoint(out, tag="next")
    pending_module.wait_pending()
    entries = sorted(p.name for p in Path(out).iterdir() if not p.name.startswith(".epochs"))
    return {"told": told, "failures": failures, "latest": latest, "entries": entries}


def raise_at_the_fence(out: str) -> str:
    made = engine(3, "bf16", settings(fail_training=True))
    made.save_checkpoint(out, tag="good")
    with cannot_be_saved(made.module, rank=1):
        made.save_checkpoint(out, tag="bad")
    pending_module.wait_pending()
    return raised(lambda: train(made, 1, seed=1))


def disagree_on_the_tag(out: str) -> dict[str, Any]:
    made = engine(2, "bf16", settings())
    told = raised(lambda: made.save_checkpoint(out, tag=f"rank{dist.get_rank()}"))
    return {"told": told, "touched": Path(out).exists()}


def bad_tag(out: str, tag: str) -> dict[str, Any]:
    made = engine(0, "bf16", settings())
    told = raised(lambda: made.save_checkpoint(out, tag=tag))
    return {"told": told, "touched": Path(out).exists()}


def lack_of_room(out: str) -> dict[str, Any]:
    """The file system's answer is replaced: a full one is made for real in the fault tests."""
    made = engine(2, "bf16", settings())
    real = tree.free_bytes
    tree.free_bytes = lambda path: 1000  # type: ignore[assignment]
    try:
        told = raised(lambda: made.save_checkpoint(out))
    finally:
        tree.free_bytes = real
    return {"told": told, "touched": Path(out).exists()}


def another_model(out: str) -> dict[str, Any]:
    made = engine(2, "bf16", settings(async_save=False))
    made.save_checkpoint(out)
    other = engine(2, "bf16", settings(), width=32)
    before = [p.clone() for p in other.module.parameters()]
    told = raised(lambda: other.load_checkpoint(out))
    same = all(torch.equal(a, b) for a, b in zip(before, other.module.parameters(), strict=True))
    return {"told": told, "untouched": same}


def load_after_flip(out: str, file: str) -> str:
    """Flip one bit of `file` in the newest checkpoint and load it; rank 0 flips."""
    made = engine(2, "bf16", settings(async_save=False))
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="flip")
    path = Path(out) / "flip" / file
    if dist.get_rank() == 0:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    dist.barrier()
    return raised(lambda: made.load_checkpoint(out, tag="flip"))


def refused(place: str, asked: dict[str, dict[str, Any]]) -> dict[str, tuple[str, list[str]]]:
    """What an engine, and the save after it, tells of each configuration, and what then lies in its folder."""
    found = {}
    for name, more in asked.items():
        folder = Path(place) / name
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        ours = None if "checkpoint" in more else settings()
        asked_for = config(2, "bf16", ours, **json.loads(json.dumps(more).replace("SWAP", str(folder))))
        told = raised(lambda asked_for=asked_for, folder=folder: start_and_save(asked_for, str(folder)))
        dist.barrier()
        found[name] = (told, sorted(str(path) for path in folder.rglob("*")))
    return found


def start_and_save(asked_for: dict[str, Any], folder: str) -> None:
    mpu = Alone() if asked_for.pop("mpu", None) else None
    stages = asked_for.pop("stages", None)
    cluster = asked_for.pop("cluster", None)
    section = asked_for["checkpoint"].pop("roll_ckpt") if cluster else None
    with own_groups():
        model = PipelineModule([torch.nn.Linear(4, 4)] * 2, num_stages=stages) if stages else Net()
        made = deepspeed.initialize(model=model, config=asked_for, mpu=mpu)[0]
        if cluster:
            parsed = DeepSpeedConfig.parse(section, "test")
            options = ClusterOptions("actor", parsed, exclude_frozen_parameters=False, **cluster)
            DeepSpeedCluster(made, options)
        made.save_checkpoint(folder)


class Alone:
    """An mpu under which every rank is a job of its own."""

    def __init__(self) -> None:
        alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
        self.group = alone[dist.get_rank()]

    def __getattr__(self, name: str) -> Any:
        if "parallel" not in name or name.startswith("initialize"):
            raise AttributeError(name)
        kinds = {"group": self.group, "rank": 0, "world_size": 1}
        return lambda: next(value for kind, value in kinds.items() if name.endswith(kind))


def loads_with_edited_latest(out: str) -> dict[str, Any]:
    made = engine(2, "bf16", settings(async_save=False))
    for step in range(2):
        train(made, 1, seed=step)
        made.save_checkpoint(out)
    latest = Path(out) / "latest"
    found = {}
    for told in ("global_step1", "no_such_tag", None):
        dist.barrier()
        if dist.get_rank() == 0:
            latest.unlink() if told is None else latest.write_text(told)
        dist.barrier()
        found[told] = made.load_checkpoint(out)[0].split("/")[-2]
    return found


def two_engines(out: str) -> bool:
    """Two engines of one process save at once, train on, and load back."""
    first, second = engine(2, "bf16", settings()), engine(3, "bf16", settings(cluster="critic"), seed=1)
    train(first, 1, seed=1), train(second, 1, seed=1)
    first.save_checkpoint(f"{out}/a")
    second.save_checkpoint(f"{out}/b")
    losses = train(first, 2, seed=2), train(second, 2, seed=2)
    first.load_checkpoint(f"{out}/a")
    again = engine(3, "bf16", settings(cluster="critic"), seed=5)
    again.load_checkpoint(f"{out}/b")
    return losses == (train(first, 2, seed=2), train(again, 2, seed=2))


def collectives_of_one_save(out: str) -> dict[str, int]:
    """Calls that a warm save makes on the process group, and rendezvous of ours."""
    made = engine(2, "bf16", settings())
    train(made, 1, seed=1)
    made.save_checkpoint(out)
    train(made, 1, seed=1)
    counted = {"barrier": 0, "all_reduce": 0, "other": 0}
    kept = {}
    watched = ("barrier", "all_reduce", "all_gather_object", "broadcast_object_list", "broadcast", "all_gather")
    for name in watched:
        kept[name] = getattr(dist, name)

        def count(*a: Any, _name: str = name, **k: Any) -> Any:
            counted[_name if _name in counted else "other"] += 1
            return kept[_name](*a, **k)

        setattr(dist, name, count)
    rendezvous = install.attached(made).ranks.rendezvous_count  # type: ignore[union-attr]
    try:
        made.save_checkpoint(out, tag="warm")
    finally:
        for name in watched:
            setattr(dist, name, kept[name])
    pending_module.wait_pending()
    return {**counted, "ours": install.attached(made).ranks.rendezvous_count - rendezvous}  # type: ignore[union-attr]


def changes_after_save_stay_out(out: str) -> dict[str, bool]:
    """Buffers and client tensors may change as soon as save_checkpoint returned, parameters after the fence."""
    made = engine(2, "bf16", settings())
    train(made, 1, seed=1)
    calls = made.module.calls.clone()
    mine = torch.full((1000,), 7.0)
    images = []
    stage = ClusterSave.stage

    def watched(cluster_save: ClusterSave, path: Path, image: Any, **how: bool) -> None:
        images.append(image)
        stage(cluster_save, path, image, **how)

    ClusterSave.stage = watched  # type: ignore[assignment]
    try:
        made.save_checkpoint(out, tag="t", client_state={"mine": mine})
    finally:
        ClusterSave.stage = stage  # type: ignore[method-assign]
    # Small copies end before anybody could change their source: who may be late is read off the images.
    late = {
        extent.source.owner._cdata
        for image in images
        for extent in image.extents
        if extent.lifetime and isinstance(extent.source, Memory)
    }
    others = (made.module.calls, made.module.frozen.weight, mine)
    made.module.calls.fill_(-1)
    made.module.frozen.weight.data.fill_(-1)
    mine.fill_(-1)
    install.attached(made).fence()  # type: ignore[union-attr]
    weight = made.module.norm.weight.detach().clone()
    made.module.norm.weight.data.fill_(-1)
    pending_module.wait_pending()
    state = torch.load(Path(out) / "t" / "mp_rank_00_model_states.pt", weights_only=True)
    return {
        "buffer": torch.equal(state["module"]["calls"], calls),
        "late": bool(late) and not late & {tensor.untyped_storage()._cdata for tensor in others},
        "client": bool((state["mine"] == 7).all()),
        "frozen": not bool((state["module"]["frozen.weight"] == -1).any()),
        "weight": torch.equal(state["module"]["norm.weight"], weight),
    }


def clean(path: str) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
    dist.barrier()


def cuda_reason() -> str:
    return extension.cuda_status()


def fails_before_staging(out: str) -> dict[str, Any]:
    """Reading the engine fails on one rank, before stock code runs: nothing may be committed."""
    made = engine(2, "bf16", settings(async_save=False))
    real = checkpoint_engine.overlappable_storages
    if dist.get_rank() == 0:
        checkpoint_engine.overlappable_storages = lambda engine: 1 / 0  # type: ignore[assignment,return-value]
    try:
        told = raised(lambda: made.save_checkpoint(out, tag="t"))
    finally:
        checkpoint_engine.overlappable_storages = real
    made.save_checkpoint(out, tag="next")
    return {"told": told, "entries": sorted(p.name for p in Path(out).iterdir())}


# --- what changes the state waits for the copies ---


def _set_full(trained: Any) -> None:
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    for parameter in trained.module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            safe_set_full_fp32_param(parameter, torch.full(shape, 9.0))
            safe_set_full_optimizer_state(parameter, torch.full(shape, 9.0), "exp_avg")


def _set_local(trained: Any) -> None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param, safe_set_local_optimizer_state

    for parameter in trained.module.parameters():
        if parameter.requires_grad:
            nine = torch.full_like(safe_get_local_fp32_param(parameter), 9.0)
            safe_set_local_fp32_param(parameter, nine)
            safe_set_local_optimizer_state(parameter, nine, "exp_avg")


def _load_module(trained: Any) -> None:
    state = {name: torch.zeros_like(value) for name, value in trained.module.state_dict().items()}
    trained.load_module_state_dict({"module": state})


def _offload(trained: Any) -> None:
    with contextlib.suppress(AssertionError):  # DeepSpeed does it for FusedAdam only, which needs a GPU
        trained.offload_states()


CHANGES: dict[str, tuple[tuple[int, ...], Any]] = {
    "step": ((0, 1, 2, 3), lambda trained, out: train(trained, 1, seed=2)),
    "full": ((2, 3), lambda trained, out: _set_full(trained)),
    "local": ((3,), lambda trained, out: _set_local(trained)),
    "module": ((0, 1, 2), lambda trained, out: _load_module(trained)),
    "load": ((0, 1, 2, 3), lambda trained, out: trained.load_checkpoint(out, tag="old")),
    "offload": ((3,), lambda trained, out: _offload(trained)),
    "reload": ((3,), lambda trained, out: trained.reload_states()),
    "destroy": ((0, 1, 2, 3), lambda trained, out: trained.destroy()),
}
"""What changes an engine's state, and the ZeRO stages that have it."""


def change_before_the_copies(out: str, stage: int) -> dict[str, tuple[bool, bool, str]]:
    """Change an engine in each way as soon as a save has returned: whether there was something to copy then, whether
    it was copied when the change was done, and how the save failed."""
    made = engine(stage, "bf16", settings())
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="old")
    told = {}
    for what, (stages, change) in CHANGES.items():
        if stage not in stages:
            continue
        with late_copies(install.attached(made).settings):  # type: ignore[union-attr]
            made.save_checkpoint(out, tag=what)
            save = install.attached(made).saves[-1]  # type: ignore[union-attr]
            late = not copied(save)
            change(made, out)
            fenced = copied(save)
        told[what] = late, fenced, str(save.failure)
    return told


def step_without_the_fence(out: str, stage: int) -> list[str]:
    """A step that does not wait for the copies: how the save before it failed, and the one after it."""
    made = engine(stage, "bf16", settings())
    train(made, 1, seed=1)
    wrapped, told = type(made)._take_model_step, []
    for tag, step in (("torn", wrapped.__wrapped__), ("next", wrapped)):
        with late_copies(install.attached(made).settings):  # type: ignore[union-attr]
            made.save_checkpoint(out, tag=tag)
            save = install.attached(made).saves[-1]  # type: ignore[union-attr]
            with mock.patch.object(type(made), "_take_model_step", step), hooks_off(tag == "torn"):
                train(made, 1, seed=2)
        told.append(str(save.failure))
    return told


def foreign_files(out: str) -> str:
    """A script's own file lies in the tag's directory: saves must not delete it."""
    made = engine(2, "bf16", settings(async_save=False))
    note = Path(out) / "t" / "notes.txt"
    if dist.get_rank() == 0:
        note.parent.mkdir(parents=True)
        note.write_text("mine")
    dist.barrier()
    told = [raised(lambda: made.save_checkpoint(out, tag="t")) for _ in range(2)]
    assert note.read_text() == "mine"
    made.load_checkpoint(out, tag="t")
    return "".join(told)


def os_error_in_begin(out: str) -> str:
    """Rank 0 meets an error of the operating system before the attempt exists: both ranks hear of it."""
    made = engine(2, "bf16", settings())
    real = writes.make_dir

    def refuse(path: Path) -> bool:
        raise OSError(28, "No space left on device", str(path))

    writes.make_dir = refuse  # type: ignore[assignment]
    try:
        return raised(lambda: made.save_checkpoint(out))
    finally:
        writes.make_dir = real


# --- engines of every kind: what is copied late, and who goes on from it ---

Made = Callable[[int, dict[str, Any] | None], Any]
"""Makes an engine from a seed and its `checkpoint.roll_ckpt`, None for stock DeepSpeed."""
Steps = Callable[[Any, int], list[float]]
"""Trains an engine on data that follows from a seed; its losses."""
MICRO_BATCHES = {"gradient_accumulation_steps": 2}


def save_and_go_on(out: str, made: Made, steps: Steps) -> dict[str, Any]:
    """Save while training goes on, then load with stock DeepSpeed and with us.

    "late" is the share of the bytes that the fence at the next step copied, "changed" how many of their
    extents had changed when the optimizer's step came, "alike" whether stock and we go on with the unbroken losses,
    "whole" what `save_16bit_model` tells.
    """
    first = made(0, settings())
    steps(first, 1)
    with late_copies(install.attached(first).settings), watched_until_the_fence(first) as found:  # type: ignore[union-attr]
        first.save_checkpoint(out)
        unbroken = steps(first, 2)
    whole = raised(lambda: first.save_16bit_model(out, "weights.bin"))
    alike = []
    for seed, ours in ((3, None), (4, settings())):
        again = made(seed, ours)
        again.load_checkpoint(out)
        alike.append(steps(again, 2) == unbroken)
    return {**found, "alike": alike, "whole": whole}


@contextlib.contextmanager
def watched_until_the_fence(trained: Any) -> Iterator[dict[str, Any]]:
    """Compare what the block's save leaves for later with what it is at the next fence."""
    ours = install.attached(trained)
    assert ours is not None
    then: list[tuple[Memory, bytes]] = []
    found: dict[str, Any] = {"late": 0.0, "changed": 0}
    total = 0
    stage = ClusterSave.stage

    def watched(cluster_save: ClusterSave, path: Path, image: FileImage, *, overlap: bool) -> None:
        nonlocal total
        tensors = [extent for extent in image.extents if isinstance(extent.source, Memory)]
        total += sum(extent.nbytes for extent in tensors)
        late = [extent.source for extent in tensors if extent.lifetime and overlap]
        then.extend((memory, bytes_of(memory)) for memory in late)
        stage(cluster_save, path, image, overlap=overlap)

    def fence(*changes: cluster_save.Changes) -> None:
        if then:
            found["late"] = sum(len(held) for _, held in then) / total
            found["changed"] = sum(bytes_of(memory) != held for memory, held in then)
            then.clear()
        RollCheckpointEngine.fence(ours, *changes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClusterSave, "stage", watched)
        patch.setattr(ours, "fence", fence)
        yield found


def bytes_of(memory: Memory) -> bytes:
    return ctypes.string_at(memory.address, memory.nbytes)


@contextlib.contextmanager
def own_groups() -> Iterator[None]:
    """DeepSpeed keeps process groups and grids for every later engine of the process; the block leaves none."""
    try:
        yield
    finally:
        for name in ("mpu", "mesh_device", "_ZERO_PARAM_INTRA_PARALLEL_GROUP", *TENSOR_PARALLEL_GROUPS):
            setattr(groups, name, None)
        if hasattr(globals().get("parallel_state_sp"), "_release_sequence_parallel_groups"):
            parallel_state_sp._release_sequence_parallel_groups()


TENSOR_PARALLEL_GROUPS = ("_TENSOR_MODEL_PARALLEL_GROUP", "_MODEL_PARALLEL_GROUP", "_DATA_PARALLEL_GROUP")


def with_zero(out: str, stage: int, gradients: str | None = None, **more: Any) -> dict[str, Any]:
    """Plain ZeRO, or what `more` adds to `zero_optimization`; gradients accumulate in the precision `gradients`."""
    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100, **more}}
    zero["data_types"] = {"grad_accum_dtype": gradients}

    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ makes its groups once in a process and then asserts
        if "zero_hpz_partition_size" in more and ours is None:
            seed = 0  # stock's load leaves frozen weights as they were initialised: see docs/deepspeed.md
        return engine(stage, "bf16", ours, seed, zero_force_ds_cpu_optimizer=False, **MICRO_BATCHES, **zero)

    with own_groups():
        return save_and_go_on(out, made, lambda trained, seed: train(trained, 4, seed))


def with_lora(out: str) -> dict[str, Any]:
    """A PEFT model: only the adapters train; merged and unmerged behind a fence."""
    import peft

    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        torch.manual_seed(seed)
        lora = peft.LoraConfig(target_modules=["layers.0", "layers.1", "layers.2"], r=4)
        model = peft.get_peft_model(Net(), lora)
        trained = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, model_parameters=trained, config=config(2, "bf16", ours))[0]

    return save_and_go_on(out, made, lambda trained, seed: train(trained, 2, seed))


class Experts(torch.nn.Module):
    """A mixture of two experts, one on each of two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = torch.nn.Linear(16, 16)
        self.moe = MoE(16, torch.nn.Linear(16, 16), num_experts=2, ep_size=2, k=1, min_capacity=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.moe(torch.relu(self.inside(x)))[0].float().pow(2).mean()


def with_experts(out: str, stage: int) -> dict[str, Any]:
    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        torch.manual_seed(seed)
        model = Experts()
        parted = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "a"})
        settings_ = config(stage, "bf16", ours, **MICRO_BATCHES)
        del settings_["optimizer"]
        optimizer = torch.optim.AdamW(parted, lr=1e-3)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings_)[0]

    def steps(trained: Any, seed: int) -> list[float]:
        return trained_on(trained, seed, lambda: torch.randn(4, 8, 16).bfloat16())

    return save_and_go_on(out, made, steps)


def trained_on(trained: Any, seed: int, batch: Callable[[], torch.Tensor], *, alike: bool = False) -> list[float]:
    """Four micro-batches; the same ones on every rank if `alike`."""
    losses = []
    for step in range(4):
        torch.manual_seed(100 * seed + 10 * step + (0 if alike else dist.get_rank()))
        loss = trained(batch())
        trained.backward(loss)
        trained.step()
        losses.append(float(loss))
    return losses


def with_stages(out: str, stage: int) -> dict[str, Any]:
    """A PipelineModule with one stage on each rank; its first and last layer are tied."""

    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        torch.manual_seed(seed)
        ends = TiedLayerSpec("ends", torch.nn.Linear, 16, 16)
        layers = [ends, *(LayerSpec(torch.nn.Linear, 16, 16) for _ in range(2)), ends]
        model = PipelineModule(layers=layers, loss_fn=torch.nn.MSELoss(), num_stages=2)
        settings_ = config(stage, "bf16", ours, train_batch_size=8, **MICRO_BATCHES)
        trained = [p for p in model.parameters() if p.requires_grad]
        return deepspeed.initialize(model=model, model_parameters=trained, config=settings_)[0]

    def steps(trained: Any, seed: int) -> list[float]:
        torch.manual_seed(seed)
        data = [(torch.randn(4, 16).bfloat16(), torch.randn(4, 16).bfloat16()) for _ in range(8)]
        batches = iter(data)
        return [float(trained.train_batch(data_iter=batches)) for _ in range(2)]

    with own_groups():
        return save_and_go_on(out, made, steps)


class Attention(torch.nn.Module):
    """Ulysses attention: each rank holds a part of the sequence, and of the heads while it attends."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = torch.nn.Linear(16, 48)
        self.attend = DistributedAttention(self.local, parallel_state_sp.get_sequence_parallel_group(), 2, 1)
        self.outside = torch.nn.Linear(16, 16)

    @staticmethod
    def local(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        return torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part.unflatten(-1, (4, 4)) for part in self.inside(x).chunk(3, -1))
        return self.outside(self.attend(query, key, value, 0).flatten(-2)).float().pow(2).mean()


def with_sequence_parallel(out: str, stage: int) -> dict[str, Any]:
    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        torch.manual_seed(seed)
        settings_ = config(stage, "bf16", ours, **MICRO_BATCHES)
        with deepspeed.zero.Init(config_dict_or_path=settings_, enabled=stage == 3, mpu=parallel_state_sp):
            model = Attention()
        trained = list(model.parameters())
        ready = deepspeed.initialize(model=model, model_parameters=trained, config=settings_, mpu=parallel_state_sp)[0]
        assert ready.sequence_parallel_size == 2
        return ready

    def steps(trained: Any, seed: int) -> list[float]:
        return trained_on(trained, seed, lambda: torch.randn(4, 8, 16).bfloat16())

    with own_groups():
        parallel_state_sp.initialize_sequence_parallel(2)
        return save_and_go_on(out, made, steps)


def with_tensor_parallel(out: str, stage: int) -> dict[str, Any]:
    """AutoTP: columns of one layer and rows of the next on each rank."""
    slices = {
        "autotp_size": 2,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [".*layers.0.weight$"], "partition_type": "column"},
                {"patterns": [".*layers.1.weight$"], "partition_type": "row"},
            ],
        },
    }

    def made(seed: int, ours: dict[str, Any] | None) -> Any:
        torch.manual_seed(seed)
        settings_ = config(stage, "bf16", ours, tensor_parallel=copy.deepcopy(slices), **MICRO_BATCHES)
        ready = deepspeed.initialize(model=Net(), config=settings_)[0]
        assert ready.mp_world_size == 2
        return ready

    def steps(trained: Any, seed: int) -> list[float]:
        return trained_on(trained, seed, lambda: torch.randint(0, 50, (4, 8)), alike=True)

    with own_groups():
        return save_and_go_on(out, made, steps)


def without_optimizer(out: str, stage: int) -> str:
    """An engine that only infers: it starts with our section, and its save is refused with the reason."""
    made = config(stage, "bf16", settings())
    del made["optimizer"], made["scheduler"]
    made["zero_optimization"] = {"stage": stage}
    with deepspeed.zero.Init(config_dict_or_path=made, enabled=stage == 3):
        net = Net()
    idle = deepspeed.initialize(model=net, config=made)[0]
    return raised(lambda: idle.save_checkpoint(out))
