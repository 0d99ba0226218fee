"""What the ranks of a world do in tests/test_corruption.py: checkpoints of every kind, and loads of damaged ones."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed_cases import raised
from megatron_cases import attach
from megatron_cpu import Tiny, build
from patches import replaced
from pipeline_cases import Config
from tiny import engine, train

from roll_ckpt import BasePipeline, Cluster, MegatronModel, PipelineConfig
from roll_ckpt.disk import reads
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import RollCkptError
from roll_ckpt.load.together import check_bytes

STAGING = {"check": "full"}  # as tests/megatron_cases.py has it: a process has one arena


class Cursor:
    """A component of the pipeline."""

    def __init__(self) -> None:
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "seen": torch.arange(self.at)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Run:
    """An actor under ZeRO-3, a reward model under ZeRO-2 and a critic under Megatron-core, on new weights."""

    def __init__(self, seed: int = 0) -> None:
        self.actor = engine(3, "bf16", None, seed=seed, width=96)
        self.reward = engine(2, "bf16", None, seed=seed + 1, width=96)
        self.critic: Tiny = build(seed=123 + seed, hidden=64)
        self.cursor = Cursor()

    def train(self) -> None:
        self.cursor.at += 1
        train(self.actor, 1, seed=self.cursor.at)
        train(self.reward, 1, seed=self.cursor.at)
        self.critic.train()

    def pipeline(self, out: Path, **more: Any) -> BasePipeline:
        values = {"output_dir": out, "save_steps": 1, "max_steps": 9, "staging": STAGING}
        made = BasePipeline(PipelineConfig.parse({**values, **more}, "test"))
        critic = MegatronModel(self.critic.model, self.critic.optimizer, self.critic.scheduler)
        client = {"client_state": {"epochs": 3}}
        made.set_checkpoint_clusters(
            Cluster("actor", self.actor, config=Config(), **client),
            Cluster("reward", self.reward),
            Cluster("critic", critic, **client),
        )
        made.register_stateful("cursor", self.cursor)
        return made

    def save(self, folder: Path, step: int) -> None:
        """One step in each of the ways that there are: a pipeline's, plain DeepSpeed's, plain Megatron's."""
        pipeline = self.pipeline(folder / "run")
        pipeline.do_checkpoint(step, is_last_step=True)
        for name in ("actor", "reward"):
            trained = getattr(self, name)
            trained.save_checkpoint(str(folder / name), tag=f"global_step{step}", client_state={"note": "kept"})
        attach(self.critic).save(folder / "critic" / f"iter_{step}", step)
        dist.barrier()

    def weights(self) -> list[torch.Tensor]:
        """All that it trains, as it is now; a copy."""
        held = [
            self.actor.optimizer.fp32_partitioned_groups_flat,
            self.reward.optimizer.single_partition_of_fp32_groups,
        ]
        tensors = [*held[0], *held[1], *self.critic.model[0].parameters()]
        return [tensor.detach().clone() for tensor in tensors]


def build_runs(out: str) -> None:
    """Steps 1 and 2 of a run, and step 2 of another."""
    run = Run()
    for folder, step in (("ours", 1), ("ours", 2), ("another", 2)):
        run.train()
        run.save(Path(out) / folder, step)


# --- loads of damaged checkpoints ----------------------------------------------------------------------------


class Told(logging.Handler):
    """What the log says, inside the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> Told:
        logging.getLogger("roll_ckpt").addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger("roll_ckpt").removeHandler(self)


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fall_back(sound: str, damaged: list[str]) -> list[tuple[Any, str, bool]]:
    """Of each damaged run: the step that it resumes from (or the error), what the log says, and whether the models
    are those of step 1 of the sound run (or untouched)."""
    run = Run(seed=9)
    assert run.pipeline(Path(sound), resume_from_checkpoint=f"{sound}/checkpoint-1").resume() == 1
    wanted = run.weights()
    found: list[tuple[Any, str, bool]] = []
    for out in damaged:
        run.train()
        before = run.weights()
        assert not same(before, wanted)
        with Told() as told:
            try:
                step: Any = run.pipeline(Path(out)).resume()
            except RollCkptError as problem:
                step = f"{type(problem).__name__}: {problem}"
        found.append((step, "\n".join(told.lines), same(run.weights(), wanted if step == 1 else before)))
    return found


def load_plain(folder: str) -> dict[str, tuple[str, str, bool]]:
    """What plain loads of a damaged newest checkpoint say, what the log says, and whether the models are untouched."""
    run = Run(seed=9)
    run.pipeline(Path(folder) / "unused")

    def load_newest(out: str) -> tuple[Path | None, int]:
        ours = attach(run.critic)
        newest = ours.find(out)
        with replaced(check_bytes, lambda ranks, checkpoint_dir, timeout_s: None):  # find has done it
            return newest, ours.load(str(newest))

    loads: dict[str, Callable[[], object]] = {
        "asked for": lambda: run.actor.load_checkpoint(f"{folder}/actor", tag="global_step2"),
        "reward": lambda: run.reward.load_checkpoint(f"{folder}/reward", tag="global_step2"),
        "critic": lambda: attach(run.critic).load(f"{folder}/critic/iter_2"),
        "none sound": lambda: run.actor.load_checkpoint(f"{folder}/none sound"),
        "none with a manifest": lambda: run.actor.load_checkpoint(f"{folder}/none with a manifest"),
        "no critic": lambda: attach(run.critic).find(f"{folder}/no critic"),
        "newest": lambda: run.actor.load_checkpoint(f"{folder}/actor"),
        "newest critic": lambda: load_newest(f"{folder}/critic"),
    }
    found = {}
    for name, load in loads.items():
        before = run.weights()
        with Told() as told:
            try:
                said = str(load())
            except RollCkptError as problem:
                said = f"{type(problem).__name__}: {problem}"
        found[name] = (said, "\n".join(told.lines), same(run.weights(), before))
    return found


def load_where_one_rank_differs(folder: str, why: str, rank: int = 1, step: int = 2) -> dict[str, tuple[str, bool]]:
    """What loads say of which one rank alone meets something else in the manifests of one step: it is damaged, or its
    disk refuses. And whether the models are untouched."""
    run = Run(seed=9)
    run.pipeline(Path(folder) / "unused")
    hurt = tuple(f"{name}{step}/manifest.json" for name in ("global_step", "iter_", "checkpoint-"))
    read_bytes = reads.read_bytes

    def read(path: Path, *limit: int) -> bytes:
        if dist.get_rank() == rank and str(path).endswith(hurt):
            if why == "refused":
                raise OSError(errno.EIO, "Input/output error", str(path))
            return read_bytes(path, *limit)[:-9]
        return read_bytes(path, *limit)

    loads: dict[str, Callable[[], object]] = {
        "actor": lambda: run.actor.load_checkpoint(f"{folder}/actor")[0],
        "critic": lambda: attach(run.critic).find(f"{folder}/critic"),
        "critic by path": lambda: attach(run.critic).load(f"{folder}/critic/iter_2"),
        "run": lambda: run.pipeline(Path(folder) / "run").resume(),
    }
    found = {}
    with mock.patch.object(reads, "read_bytes", read), mock.patch.object(ReadRetries, "pauses_s", (0,)):
        for name, load in loads.items():
            before = run.weights()
            try:
                said = str(load())
            except RollCkptError as problem:
                said = f"{type(problem).__name__}: {problem}"
            found[name] = (said, same(run.weights(), before))
    return found


def change_after_the_check(folder: str, paths: dict[str, list[str]]) -> dict[str, str]:
    """What loads say whose files change between the check of all bytes and their own reading."""
    run = Run(seed=9)
    loads: dict[str, Callable[[str], object]] = {
        "reward": lambda out: run.reward.load_checkpoint(out, tag="global_step2"),
        "critic": lambda out: attach(run.critic).load(f"{out}/iter_2"),
        "run": lambda out: run.pipeline(Path(out), resume_from_checkpoint=f"{out}/checkpoint-2").resume(),
    }
    run.pipeline(Path(folder) / "unused")
    found = {}
    for way, load in loads.items():
        for path in paths[way]:
            out = Path(folder) / f"{way} {Path(path).name}"

            def check_and_change(
                world: Any, checkpoint_dir: Path, timeout_s: float, changed: Path = out / path
            ) -> None:
                check_bytes(world, checkpoint_dir, timeout_s)
                if dist.get_rank() == 0:
                    data = changed.read_bytes()
                    changed.unlink()
                    changed.write_bytes(data[:20] + bytes([data[20] ^ 1]) + data[21:])
                dist.barrier()

            with replaced(check_bytes, check_and_change):
                found[str(out / path)] = raised(lambda load=load, out=out: load(str(out)))
    return found
