"""OpenRLHF's own `DeepspeedStrategy` trains, saves, rotates and loads, under torchrun on CPU: see test_openrlhf.py.

    torchrun ... tests/openrlhf_job.py FOLDER VARIANT ... [--inside N]      one unbroken run, then one to be killed
    torchrun ... tests/openrlhf_job.py FOLDER VARIANT ... --resume          the killed run, to its end

All variants train beside each other, step by step, in FOLDER/whole/<variant> and then in FOLDER/killed/<variant>. Each
rank appends what it sees to FOLDER/whole.<rank> and FOLDER/killed.<rank>, as JSON lines. The run to be killed creates
FOLDER/stopped.<rank> when the first N variants are inside their last save and the others are between two steps.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

SAVE_STEPS, SAVES, KEEP = 2, 6, 3
STEPS = SAVE_STEPS * SAVES + 1


SYNC: dict[str, Any] = {"commit_timeout_s": 20}  # a save that waits for another rank shall say so soon
ASYNC: dict[str, Any] = {**SYNC, "async_save": True}


@dataclass(frozen=True)
class Variant:
    """A ZeRO stage, our settings (None: stock), and what the host does with its checkpoints."""

    stage: int
    ours: dict[str, Any] | None = None
    attach: bool = False
    """Use `attach` on the engine that OpenRLHF made, instead of a section in its config."""
    metric: bool = False
    """Give each save a metric, as PPO does: the rotation then deletes what has none, or the worst."""
    model: bool = False
    """Put the weights beside the checkpoint, as SFT does with `save_hf_ckpt`."""


VARIANTS = {
    "stock2": Variant(2),
    "stock3": Variant(3),
    "stock2-metric": Variant(2, metric=True),
    "stock2-model": Variant(2, model=True),
    "stock3-model": Variant(3, model=True),
    "zero2": Variant(2, SYNC),
    "zero3": Variant(3, SYNC, attach=True),
    "zero2-async": Variant(2, ASYNC, attach=True),
    "zero3-async": Variant(3, ASYNC),
    "zero2-metric": Variant(2, SYNC, metric=True),
    "zero2-async-metric": Variant(2, ASYNC, metric=True),
    "zero2-model": Variant(2, SYNC, model=True),
    "zero3-async-model": Variant(3, ASYNC, model=True),
}


# --- what OpenRLHF needs and a CPU has not -------------------------------------------------------------------


class StandIn(ModuleType):
    """A module in which every name is an empty class: enough for an import of what is never called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed and that this job does not use."""

    PACKAGES = ("bitsandbytes", "flash_attn", "pylatexenc", "ray", "requests", "ring_flash_attn", "torchdata", "vllm")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] in self.PACKAGES:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def strategy_class() -> type[Any]:
    """OpenRLHF's `DeepspeedStrategy`, with a CPU in the place of the GPU."""
    finder = StandIns()
    sys.meta_path.append(finder)  # last: what is installed is found before
    from openrlhf.utils.deepspeed import DeepspeedStrategy, deepspeed

    sys.meta_path.remove(finder)
    of_cpu = deepspeed.init_device_mesh
    deepspeed.init_device_mesh = lambda device, *rest, **named: of_cpu("cpu", *rest, **named)
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda: None  # a function of its own: torch.compile wants no two names for one
    torch.cuda.current_device = lambda: "cpu"
    return DeepspeedStrategy


def strategy(base: type[Any], variant: Variant) -> Any:
    class Strategy(base):  # type: ignore[misc]
        def get_ds_train_config(self, *arguments: Any, **named: Any) -> dict[str, Any]:
            config = super().get_ds_train_config(*arguments, **named)
            config["optimizer"]["params"]["torch_adam"] = True  # the fused one is for GPUs
            if variant.ours is not None and not variant.attach:
                config["checkpoint"]["roll_ckpt"] = variant.ours
            return config

    ds = Namespace(param_dtype="bf16", zero_stage=variant.stage, tensor_parallel_size=1)
    told = Namespace(ds=ds, train=Namespace(), local_rank=-1)
    made = Strategy(
        seed=3, max_norm=1.0, micro_train_batch_size=4, train_batch_size=8, zero_stage=variant.stage, args=told
    )
    made.setup_distributed()
    return made


# --- the training ---------------------------------------------------------------------------------------------


class Trained:
    """One variant: its strategy and engine, and its directory."""

    def __init__(self, base: type[Any], name: str, folder: Path) -> None:
        self.name, self.variant, self.folder = name, VARIANTS[name], folder / name
        self.strategy = strategy(base, self.variant)
        torch.manual_seed(3)
        layers = [torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1)]
        adam = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        asked = {"optim": "adam", "adam": adam, "scheduler_steps": 100, "max_norm": 1.0}
        self.engine = self.strategy.prepare((torch.nn.Sequential(*layers), asked))[0]
        if self.variant.attach:
            from roll_ckpt.config import DeepSpeedConfig
            from roll_ckpt.deepspeed import attach

            attach(self.engine, DeepSpeedConfig.parse(self.variant.ours, "the test"), "engine")

    def resume(self) -> int:
        """Load what `latest` names, as OpenRLHF does; the step it was saved at."""
        path, states = self.strategy.load_ckpt(self.engine, str(self.folder))
        assert path is not None, f"{self.name}: nothing to load"
        return int(states["consumed_samples"])

    def step(self, step: int) -> float:
        torch.manual_seed(100 * step + dist.get_rank())
        loss = self.engine(torch.randn(4, 16).bfloat16()).float().pow(2).mean()
        self.strategy.backward(loss, self.engine, None)
        self.strategy.optimizer_step(None, self.engine, None)
        return float(loss)

    def save(self, step: int) -> float:
        """Save as OpenRLHF's trainers do; how many seconds it took."""
        began = time.monotonic()
        metric = {"metric_value": float(step), "metric_key": "reward"} if self.variant.metric else {}
        self.strategy.save_ckpt(
            self.engine, str(self.folder), f"global_step{step}", KEEP, 1000, {"consumed_samples": step}, **metric
        )
        if self.variant.model and self.strategy.is_rank_0():
            weights = self.folder / f"global_step{step}_hf"
            weights.mkdir(exist_ok=True)
            (weights / "config.json").write_text("{}")
        return time.monotonic() - began


class Run:
    """One rank of a run of all variants."""

    def __init__(self, base: type[Any], folder: Path, name: str, variants: list[str], resume: bool = False) -> None:
        self.folder, self.name = folder, name
        self.variants = [Trained(base, variant, folder / name) for variant in variants]
        self.at = {trained.name: trained.resume() if resume else 0 for trained in self.variants}

    def tell(self, **facts: Any) -> None:
        with open(self.folder / f"{self.name}.{dist.get_rank()}", "a") as log:
            print(json.dumps(facts), file=log)

    def play(self, inside: int | None = None) -> None:
        """Train to the end, or until the last save, in which the first `inside` variants get stuck."""
        for step in range(min(self.at.values()) + 1, STEPS + 1):
            due = [trained for trained in self.variants if step > self.at[trained.name]]
            for trained in due:
                self.tell(variant=trained.name, step=step, loss=trained.step(step))
            if step == SAVE_STEPS * SAVES and inside is not None:
                for trained in due[:inside]:
                    self.get_stuck(trained, step)
                self.stop()
            if step % SAVE_STEPS == 0:
                for trained in due:
                    self.tell(variant=trained.name, step=step, took_s=trained.save(step))
        if "roll_ckpt" in sys.modules:
            sys.modules["roll_ckpt"].wait_pending()
        dist.barrier()
        for trained in self.variants:
            self.tell(variant=trained.name, left=list(left(trained.folder)))

    def get_stuck(self, trained: Trained, step: int) -> None:
        """Begin a save that stops when its files are there and its checkpoint is not. Returns if it is asynchronous."""
        stuck = threading.Event()

        def listener(reached: str, where: dict[str, object]) -> None:
            if reached == "vote.before":
                stuck.set()
                self.stop() if "async_save" not in (trained.variant.ours or {}) else threading.Event().wait()

        if trained.variant.ours is None:
            trained.engine.checkpoint_engine.commit = lambda *_: self.stop()  # stock writes `latest` after it
        else:
            from roll_ckpt.disk import failpoints

            failpoints.listener = listener
        trained.save(step)
        stuck.wait()

    def stop(self) -> NoReturn:
        (self.folder / f"stopped.{dist.get_rank()}").touch()
        while True:
            time.sleep(1)


def left(folder: Path) -> Iterator[tuple[str, bool]]:
    """The directories in `folder`, and whether each has the file that OpenRLHF puts there."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield path.name, (path / "metric.json").is_file()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("variants", nargs="+", choices=VARIANTS)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--inside", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    base = strategy_class()
    if any(VARIANTS[name].ours is not None for name in asked.variants):
        import roll_ckpt.deepspeed  # noqa: F401  (installs itself)
    if asked.resume:
        Run(base, asked.folder, "killed", asked.variants, resume=True).play()
    else:
        Run(base, asked.folder, "whole", asked.variants).play()
        Run(base, asked.folder, "killed", asked.variants).play(asked.inside)


if __name__ == "__main__":
    main()
