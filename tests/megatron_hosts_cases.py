"""What the ranks of a world do in tests/test_megatron_hosts.py: the hosts' own modules save and load a tiny GPT."""

from __future__ import annotations

import importlib.util
import logging
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import megatron_cpu
import torch
import torch.distributed as dist
from megatron_cpu import Tiny, build, gathered, model_state

megatron_cpu.install()

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue  # noqa: E402

import roll_ckpt.megatron  # noqa: E402, F401  (installs itself)
from roll_ckpt.disk import failpoints  # noqa: E402

renamed: list[Path] = []
"""The files to which we have given their names in this process."""


def observe(operation: str, paths: tuple[str, ...]) -> None:
    if operation == "rename":
        renamed.append(Path(paths[-1]))


failpoints.observer = observe


def trained() -> Tiny:
    tiny = build()
    tiny.train(2)
    return tiny


def who_wrote(directory: Path) -> dict[str, bool]:
    """For each file that holds tensors, whether some rank gave it its name through us. Every rank calls."""
    all_renamed: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(all_renamed, renamed)
    ours = {path for paths in all_renamed for path in paths}
    return {path.name: path in ours for path in sorted(directory.rglob("*.distcp"))}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- verl ----------------------------------------------------------------------------------------------------


def verl(folder: str) -> ModuleType:
    """verl's `verl.utils.megatron.dist_checkpointing`, from its file alone."""
    path = Path(folder) / "verl" / "utils" / "megatron" / "dist_checkpointing.py"
    spec = importlib.util.spec_from_file_location("verl_dist_checkpointing", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl_states(tiny: Tiny, loading: bool = False) -> dict[str, dict[str, Any]]:
    """What verl saves each into a directory of its own."""
    told = {"distrib_optim_sharding_type": "fully_reshardable"}
    model = model_state(tiny, told)
    optimizer = tiny.optimizer.sharded_state_dict(model, is_loading=loading, metadata=told)
    return {"model": model, "optimizer": {"optimizer": optimizer, "lr_scheduler": tiny.scheduler.state_dict()}}


def save_as_verl(folder: str, directory: str, async_save: bool) -> dict[str, bool]:
    host, tiny, root = verl(folder), trained(), Path(directory)
    queue = AsyncCallsQueue()
    requests = []
    for name, state in verl_states(tiny).items():
        where = root / name / "dist_ckpt"
        where.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        content = {"distrib_optim_sharding_type": "fully_reshardable"}
        requests.append(host.save_dist_checkpointing(state, str(where), async_save, content_metadata=content))
    for request in requests:
        assert (request is not None) == async_save
        if async_save:
            queue.schedule_async_request(request)
    saved = gathered(tiny)
    tiny.train()
    queue.maybe_finalize_async_calls(blocking=True)
    queue.close()
    return {**who_wrote(root), "loaded": same(load_as_verl(host, root), saved)}


def load_as_verl(host: ModuleType, root: Path) -> dict[str, torch.Tensor]:
    tiny = build(seed=7)
    wanted = verl_states(tiny, loading=True)
    model = host.load_dist_checkpointing(wanted["model"], str(root / "model" / "dist_ckpt"))
    optimizer = host.load_dist_checkpointing(wanted["optimizer"], str(root / "optimizer" / "dist_ckpt"))
    tiny.model[0].module.load_state_dict(model["model"])
    with torch.no_grad():
        tiny.optimizer.load_state_dict(optimizer["optimizer"])
    return gathered(tiny)


# --- ms-swift ------------------------------------------------------------------------------------------------


def module(name: str, path: Path | None = None, **members: Any) -> None:
    """A module with these members; a package without its `__init__` if there is a path."""
    made = ModuleType(name)
    if path is not None:
        made.__path__ = [str(path)]
    made.__dict__.update(members)
    sys.modules.setdefault(name, made)


def swift(folder: str) -> Any:
    """ms-swift's `swift.megatron.utils.megatron_lm_utils` without what the rest of ms-swift needs."""
    root = Path(folder) / "swift"
    for name in ("swift", "swift.megatron", "swift.megatron.utils"):
        module(name, root.parent / name.replace(".", "/"))
    nothing = {name: None for name in ("init_process_group", "set_device")}
    logger = logging.getLogger("swift")
    module(
        "swift.utils",
        check_json_format=lambda value: value,
        get_logger=lambda: logger,
        is_master=lambda: dist.get_rank() == 0,
        **nothing,
    )
    logger.info_once = logger.info  # type: ignore[attr-defined]
    bridge = {"set_random_seed": None, "split_cp_inputs": None}
    module("mcore_bridge", unwrap_model=lambda models: [chunk.module for chunk in models], **bridge)
    if importlib.util.find_spec("transformers") is None:
        module("transformers")
        module("transformers.utils", is_torch_npu_available=lambda: False)
    return importlib.import_module("swift.megatron.utils.megatron_lm_utils")


def swift_arguments(directory: str, async_save: bool) -> Namespace:
    off = ("no_save_optim", "no_save_rng", "data_parallel_random_init", "use_megatron_fsdp", "no_load_optim")
    off += ("no_load_rng", "finetune", "fp16", "bf16", "dist_ckpt_save_pre_mcore_014")
    off += ("distrib_optim_fully_reshardable_mem_efficient",)
    return Namespace(
        **dict.fromkeys(off, False),
        output_dir=directory,
        mcore_model=directory,
        async_save=async_save,
        dist_ckpt_optim_fully_reshardable=True,
        use_distributed_optimizer=True,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        tuner_type="full",
        consumed_train_samples=0,
    )


def save_as_swift(folder: str, directory: str, async_save: bool) -> dict[str, Any]:
    host, tiny, root = swift(folder), trained(), Path(directory)
    told = swift_arguments(directory, async_save)
    tracker = root / "latest_checkpointed_iteration.txt"
    host.save_mcore_checkpoint(told, tiny.model, tiny.optimizer, tiny.scheduler, iteration=2)
    saved = gathered(tiny)
    dist.barrier()
    premature = tracker.exists() and not (root / "iter_0000002" / "metadata.json").exists()
    tiny.train()
    host.maybe_finalize_async_save(told, blocking=True)
    dist.barrier()
    named = tracker.read_text()
    other = build(seed=7)
    with torch.no_grad():
        host.load_mcore_checkpoint(told, other.model, other.optimizer, other.scheduler)
    wrote = {**who_wrote(root), "loaded": same(gathered(other), saved)}
    return {**wrote, "tracker": named, "premature": premature, "durable": tracker in renamed or dist.get_rank() > 0}
