"""What the ranks of a world do in tests/test_folder.py: one folder, and what others do to it."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed_cases import new_arena, settings
from tiny import engine, train

from roll_ckpt import process
from roll_ckpt.disk import tree
from roll_ckpt.save.claims import ClaimedDirectories
from roll_ckpt.save.pending import PendingSaves, wait_pending


def go_back_and_go_on(out: str) -> dict[str, Any]:
    """Save three times, go back to the first in the same process, and save once more."""
    with new_arena():
        ours = engine(2, "bf16", settings(max_ckpt_to_keep=2, staging={"arena_bytes": 16 << 20}))
        for step in (10, 20, 30):
            train(ours, 1, seed=step)
            ours.save_checkpoint(out, tag=f"s{step}", client_state={"step": step})
        wait_pending()
        _wait_ended()
        kept = sorted(entry for entry in os.listdir(out) if entry.startswith("s"))
        ours.load_checkpoint(out, tag="s20")
        train(ours, 1, seed=21)
        ours.save_checkpoint(out, tag="s21", client_state={"step": 21})
        wait_pending()
        _wait_ended()
        after = sorted(entry for entry in os.listdir(out) if entry.startswith("s"))
        (Path(out) / "latest").unlink(missing_ok=True)
        dist.barrier()
        return {"kept": kept, "after": after, "newest": ours.load_checkpoint(out)[1]["step"]}


def _wait_ended() -> None:
    """Until pruning after the last save has ended on rank 0."""
    for save in process.part(PendingSaves).saves():
        save._finished.wait()
    dist.barrier()


def two_engines(out: str, same_name: bool) -> dict[str, Any]:
    """Two engines save into one folder and prune there; then each is loaded without a tag."""
    with new_arena():
        more = {"max_ckpt_to_keep": 1, "staging": {"arena_bytes": 16 << 20}}
        names = ("model", "model") if same_name else ("actor", "critic")
        actor, critic = (engine(2, "bf16", settings(**more, cluster=name), seed=i) for i, name in enumerate(names))
        for step in (1, 2):
            for who, trained, number in (("a", actor, 100 * step), ("c", critic, step)):
                train(trained, 1, seed=step)
                tag = f"step{number}" if same_name else f"{who}{number}"
                trained.save_checkpoint(out, tag=tag, client_state={"who": who, "step": step})
        wait_pending()
        _wait_ended()
        left = sorted(path.parent.name for path in Path(out).glob("*/manifest.json"))
        if same_name:
            return {"left": left}
        loaded = [trained.load_checkpoint(out)[1] for trained in (actor, critic)]
        return {"left": left, "loaded": [(state["who"], state["step"]) for state in loaded]}


def load_only(out: str) -> dict[str, Any]:
    """A job that only loads: what it changes on disk, and what it owns."""
    with new_arena():
        before = _listing(Path(out))
        ours = engine(3, "bf16", settings(staging={"arena_bytes": 16 << 20}), seed=9)
        tag, state = ours.load_checkpoint(out)
        claimed = dict(process.part(ClaimedDirectories)._epochs)
        return {"tag": tag, "step": state["step"], "changed": _listing(Path(out)) != before, "claimed": list(claimed)}


def _listing(out: Path) -> list[tuple[str, int]]:
    found = [(path, os.lstat(out.parent / path).st_mtime_ns) for path, _ in tree.walk_all(out.parent)]
    dist.barrier()
    return found


def save_once(out: str, stage: int = 3) -> list[float]:
    """Save one checkpoint; the losses of the steps after it."""
    with new_arena():
        ours = engine(stage, "bf16", settings(staging={"arena_bytes": 16 << 20}))
        train(ours, 2, seed=1)
        ours.save_checkpoint(out, tag="one", client_state={"step": 2})
        wait_pending()
        return train(ours, 2, seed=2)


def load_and_go_on(out: str, stage: int = 3, tag: str | None = "one") -> list[float]:
    with new_arena():
        ours = engine(stage, "bf16", settings(staging={"arena_bytes": 16 << 20}), seed=5)
        assert ours.load_checkpoint(out, tag=tag)[1]["step"] == 2
        return train(ours, 2, seed=2)


def nested_tags(out: str) -> dict[str, Any]:
    """Tags that stock DeepSpeed takes: in folders, with a dot, named like the cluster."""
    with new_arena():
        ours = engine(2, "bf16", settings(staging={"arena_bytes": 16 << 20}))
        found: dict[str, Any] = {}
        for step, tag in enumerate(("epoch1/step5", ".best", "model", "epoch1/step6")):
            train(ours, 1, seed=step)
            assert ours.save_checkpoint(out, tag=tag, client_state={"step": step})
        wait_pending()
        stock = engine(2, "bf16", None, seed=8)
        for tag in ("epoch1/step5", ".best", "model"):
            found[tag] = ours.load_checkpoint(out, tag=tag)[1]["step"], stock.load_checkpoint(out, tag=tag)[1]["step"]
        found["latest"] = ours.load_checkpoint(out)[1]["step"], stock.load_checkpoint(out)[1]["step"]
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(out) / "latest").unlink()
            victim = next((Path(out) / "epoch1/step6").glob("*optim_states.pt"))
            victim.write_bytes(bytes(victim.stat().st_size))
        dist.barrier()
        found["after damage"] = ours.load_checkpoint(out)[1]["step"]
        return found


def delete_all_between_async_saves(out: str) -> list[bool]:
    """Somebody removes the folder, and what lies beside it, while saves are pending and between them."""
    with new_arena():
        ours = engine(2, "bf16", settings(staging={"arena_bytes": 16 << 20}, commit_timeout_s=20))
        told = []
        for step in range(4):
            train(ours, 1, seed=step)
            told.append(ours.save_checkpoint(out, tag=f"t{step}", client_state={"step": step}))
            if step % 2 == 0:
                wait_pending()
            dist.barrier()
            if dist.get_rank() == 0:
                for path in (Path(out), Path(out).parent / f".{Path(out).name}.roll_ckpt"):
                    shutil.rmtree(path, ignore_errors=True)
            dist.barrier()
        wait_pending()
        train(ours, 1, seed=9)
        told.append(ours.save_checkpoint(out, tag="last", client_state={"step": 9}))
        wait_pending()
        torch.manual_seed(0)
        return [*told, ours.load_checkpoint(out)[1]["step"] == 9]


def signal_in_the_step(out: str) -> dict[str, Any]:
    """A signal comes within the optimizer step, and its handler saves: the save holds the state after the step."""
    with new_arena():
        ours = engine(2, "bf16", settings(staging={"arena_bytes": 16 << 20}, async_save=False))
        train(ours, 1, seed=1)
        base = ours.optimizer.optimizer
        step = base.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            told = step(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.01)
            return told

        before = signal.signal(signal.SIGUSR1, lambda *_: ours.save_checkpoint(out, tag="signal"))
        base.step = stepped
        try:
            train(ours, 1, seed=2)
        finally:
            base.step = step
            signal.signal(signal.SIGUSR1, before)
        losses = train(ours, 2, seed=3)
        again = engine(2, "bf16", settings(staging={"arena_bytes": 16 << 20}), seed=7)
        again.load_checkpoint(out, tag="signal")
        return {"steps": again.global_steps, "same": train(again, 2, seed=3) == losses}
