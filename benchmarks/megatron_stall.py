"""How long a Megatron save holds up the training thread: stock's asynchronous save and ours, in one run.

    python benchmarks/megatron_stall.py

starts two data parallel ranks on CPU and gloo that train a GPT with the distributed optimizer, and saves it by
turns through stock Megatron-core (`dist_checkpointing.save(async_sharded_save=True)` with cached metadata and a
cached distribution, then `AsyncCallsQueue`; also without its check of access integrity) and through
`megatron.attach` (also with a fence at once, as if the next step came without a forward and a backward pass),
after a warm-up of all. Prints a table and writes build/megatron_stall.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "build" / "megatron_stall.json"

Row = dict[str, float]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="measured saves of each kind")
    parser.add_argument("--warm-up", type=int, default=4, help="saves of each kind that do not count")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--directory", type=Path, help="where checkpoints go; default a new one under /tmp")
    return parser.parse_args()


def start(arguments: list[str]) -> int:
    """Run this file under torchrun on two ranks."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    return subprocess.run([*command, *arguments], env={**os.environ, "PYTHONPATH": path}, check=False).returncode


class Stock:
    """Stock Megatron-core's asynchronous save, with everything it can cache."""

    def __init__(self, bare: Any, check: bool) -> None:
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        self.bare = bare
        self.check = check
        self.queue = AsyncCallsQueue()
        self.strategy = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            do_cache_distribution=True,
        )

    def save(self, directory: Path, step: int) -> Row:
        import torch.distributed as dist
        from megatron.core import dist_checkpointing

        if dist.get_rank() == 0:
            directory.mkdir(parents=True)
        dist.barrier()
        began = time.perf_counter()
        state = self.bare.state(step)
        generated = time.perf_counter()
        request = dist_checkpointing.save(
            state,
            str(directory),
            self.strategy,
            validate_access_integrity=self.check,
            async_sharded_save=True,
            content_metadata=self.bare.content_metadata,
        )
        planned = time.perf_counter()
        self.queue.schedule_async_request(request)
        done = time.perf_counter()
        return {"state": generated - began, "plan": planned - generated, "stall": done - generated}

    def finish(self) -> None:
        self.queue.maybe_finalize_async_calls(blocking=True)


class Ours:
    """The same state through `megatron.attach`."""

    def __init__(self, attached: Any, fence: bool) -> None:
        self.attached = attached
        self.fence = fence
        self.last: Any = None

    def save(self, directory: Path, step: int) -> Row:
        import torch.distributed as dist

        spent = 0.0
        stock_state = self.attached.state

        def timed_state(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            state = stock_state(*args, **kwargs)
            spent += time.perf_counter() - began
            return state

        dist.barrier()
        self.attached.state = timed_state
        began = time.perf_counter()
        self.last = self.attached.save(directory, step)
        whole = time.perf_counter() - began
        self.attached.state = stock_state
        if self.fence:
            self.attached.fence()
        return {"state": spent, "stall": whole - spent}

    def finish(self) -> None:
        self.last.wait(600)


def measure(who: Any, tiny: Any, directory: Path) -> Row:
    """One save between two steps, and what it costs until it is durable."""
    import torch.distributed as dist

    tiny.train()
    began = time.perf_counter()
    row = who.save(directory, tiny.steps)
    tiny.train()
    row["step_after"] = time.perf_counter() - began - row["state"] - row["stall"]
    if isinstance(who, Ours):
        row["fence"] = sum(cluster_save.timing.fence_s for cluster_save in who.last.cluster_saves.values())
    who.finish()
    row["durable"] = time.perf_counter() - began
    if isinstance(who, Ours):
        row["durable"] = who.last.durable_s
    dist.barrier()
    return row


def worst(rows: list[Row]) -> list[Row]:
    """For each save the slower rank, whom the others wait for."""
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    return [{key: max(rank[key] for rank in ranks) for key in ranks[0]} for ranks in zip(*gathered, strict=True)]


def rank_main(told: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    import megatron_cpu

    tiny = megatron_cpu.build(hidden=told.hidden, layers=told.layers, bf16=told.bf16)
    from roll_ckpt.config import Settings
    from roll_ckpt.megatron import attach

    settings = Settings(async_save=True)
    attached = attach(tiny.model, tiny.optimizer, tiny.scheduler, settings=settings)
    shared = [tempfile.mkdtemp(prefix="megatron_stall_", dir=told.directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(shared)
    root = Path(str(shared[0]))
    kinds: dict[str, Any] = {
        "stock": Stock(attached, check=True),
        "stock, unchecked": Stock(attached, check=False),
        "ours": Ours(attached, fence=False),
        "ours, fenced at once": Ours(attached, fence=True),
    }
    tiny.train(2)
    attached.warm()
    rows: dict[str, list[Row]] = {name: [] for name in kinds}
    nbytes = {}
    for turn in range(told.warm_up + told.rounds):
        for name, who in kinds.items():
            directory = root / name.replace(", ", "-").replace(" ", "-") / f"iter_{turn}"
            rows[name].append(measure(who, tiny, directory))
            nbytes[name] = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(directory)
            dist.barrier()
    measured = {name: worst(found[told.warm_up :]) for name, found in rows.items()}
    if dist.get_rank() == 0:
        shutil.rmtree(root)
        report(told, measured, nbytes)
    dist.barrier()
    for who in kinds.values():
        if isinstance(who, Stock):
            who.queue.close()
    dist.destroy_process_group()


def report(told: argparse.Namespace, measured: dict[str, list[Row]], nbytes: dict[str, int]) -> None:
    import megatron.core
    import torch

    summary = {
        name: {
            key: {
                "median_s": statistics.median(row[key] for row in rows),
                "min_s": min(row[key] for row in rows),
                "max_s": max(row[key] for row in rows),
            }
            for key in rows[0]
        }
        for name, rows in measured.items()
    }
    ratios = {
        name: summary["ours"]["stall"]["median_s"] / summary[name]["stall"]["median_s"]
        for name in ("stock", "stock, unchecked")
    }
    result = {
        "command": " ".join(["python", *sys.argv]),
        "ranks": 2,
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "model": {"hidden": told.hidden, "layers": told.layers, "bf16": told.bf16},
        "checkpoint_bytes": nbytes,
        "saves": {"warm_up": told.warm_up, "measured": told.rounds},
        "seconds": summary,
        "ours_over": ratios,
        "rows": measured,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['command']}: 2 ranks, {nbytes['ours'] / 1e6:.0f} MB saved ({nbytes['stock'] / 1e6:.0f} by stock)")
    print(f"{'milliseconds, slower rank':<28}" + "".join(f"{name:>26}" for name in summary))
    keys = list(dict.fromkeys(key for found in summary.values() for key in found))
    for key in keys:
        cells = [_cell(found.get(key)) for found in summary.values()]
        print(f"{LABELS[key]:<28}" + "".join(f"{cell:>26}" for cell in cells))
    told_ratios = ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items())
    print(f"ours, in the save: {told_ratios}   -> {RESULT.relative_to(ROOT)}")


LABELS = {
    "state": "sharded_state_dict",
    "plan": "  dist_checkpointing.save",
    "stall": "in the save",
    "fence": "fence before the next step",
    "step_after": "the next training step",
    "durable": "until durable",
}


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['median_s'] * 1e3:.1f} ({found['min_s'] * 1e3:.1f}-{found['max_s'] * 1e3:.1f})"


def main() -> None:
    arguments = parse()
    if "RANK" not in os.environ:
        sys.exit(start(sys.argv[1:]))
    rank_main(arguments)


if __name__ == "__main__":
    main()
