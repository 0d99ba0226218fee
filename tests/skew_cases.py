"""One rank fails and the others do not: what the ranks of a world do in tests/test_skew.py."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from deepspeed_cases import cannot_be_saved, raised, settings
from gate_cases import state
from pipeline_cases import pipeline
from tiny import engine, train

from roll_ckpt import Cluster, process
from roll_ckpt.config import Settings
from roll_ckpt.load import reader as reader_module
from roll_ckpt.save import begin as begin_module
from roll_ckpt.save import pending
from roll_ckpt.state import StateSaver
from roll_ckpt.transaction import ballot, settlement
from roll_ckpt.upload import after_commit

TIMEOUT_S = 3


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device", "/the/run")


def broken(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("it is broken")


def hung(*args: Any, **kwargs: Any) -> Any:
    time.sleep(TIMEOUT_S + 1)
    raise ValueError("it hung")


PHASES: dict[str, tuple[Any, str]] = {
    "begin": (begin_module.attempts, "check_room"),
    "vote": (ballot, "cast"),
    "settle": (settlement, "decided"),
    "upload": (after_commit.retention, "prune"),
    "load": (reader_module.Reader, "load"),
}


def told(action: Callable[[], object]) -> str:
    """What `action` raises, "" if nothing."""
    try:
        action()
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def one_fails(out: str, phase: str, how: str, failing: int, asynchronous: bool) -> list[Any]:
    """A good save, one in whose `phase` the rank `failing` fails, and a good one: what the second said, what became of
    it, what a load and the third save said, and what is loaded then."""
    with process.installed(process.Process()):
        values = {"commit_timeout_s": TIMEOUT_S, "async_save": asynchronous, "max_ckpt_to_keep": 9}
        ours, path = StateSaver(Settings.parse({**values, "staging": {"arena_bytes": 32 << 20}}, "the test")), Path(out)
        ours.save(state(1), path / "step_1", step=1).wait(60)
        saves: list[Any] = []
        made, action = state(2), {"full": full, "broken": broken, "hung": hung}[how]
        here = dist.get_rank() == failing
        patch: Any = contextlib.nullcontext()
        if here and phase in PHASES:
            patch = mock.patch.object(*PHASES[phase], action)
        elif here and phase == "stage":
            patch = mock.patch.object(StateSaver, "_stage", action)
        elif here:
            patch = mock.patch.object(begin_module, "wait_pending", action)
        with patch:
            second = told(lambda: saves.append(ours.save(made, path / "step_2", step=2)))
            outcome = told(lambda: saves[0].wait(60, uploaded=True)) if saves else ""
            loaded = told(lambda: ours.load(path / "step_1")) if phase == "load" else ""
        pending.wait_pending()
        dist.barrier()
        third = told(lambda: ours.save(state(3), path / "step_3", step=3).wait(60))
        return [second, outcome, loaded, third, ours.load(path / "step_1")["step"], ours.load(path / "step_3")["step"]]


def deepspeed_raises(out: str, stage: int, method: str, failing: int, asynchronous: bool) -> list[str]:
    """Stock code of rank `failing` raises in the middle of save_checkpoint; what each rank was told, and then."""
    made = engine(stage, "bf16", settings(async_save=asynchronous))
    train(made, 1, seed=1)
    made.save_checkpoint(out, tag="good")
    owner = made.optimizer if method in ("state_dict", "checkpoint_event_prologue") else made
    patch = mock.patch.object(owner, method, broken) if dist.get_rank() == failing else contextlib.nullcontext()
    with patch:
        second = told(lambda: made.save_checkpoint(out, tag="bad"))
    pending.wait_pending()
    train(made, 1, seed=2)
    third = told(lambda: made.save_checkpoint(out, tag="next"))
    pending.wait_pending()
    return [second, third, *sorted(path.name for path in Path(out).iterdir() if path.is_dir() and path.name[0] != ".")]


def engine_fails_at_the_fence(out: str) -> list[str]:
    """With `fail_training`, the failure of a save is known to rank 1 alone when the next save begins."""
    made = engine(3, "bf16", settings(fail_training=True))
    made.save_checkpoint(out, tag="good")
    with cannot_be_saved(made.module, rank=1):
        made.save_checkpoint(out, tag="bad")
    pending.wait_pending()
    if dist.get_rank() == 0:
        for save in _saves(made):
            save.reported = True
    dist.barrier()
    return [told(partial(made.save_checkpoint, out, tag=tag)) for tag in ("first", "second")]


def _saves(made: Any) -> list[Any]:
    saves: list[Any] = made.checkpoint_engine.saves
    return saves


class Component:
    def state_dict(self) -> dict[str, Any]:
        return broken()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def pipeline_fails(out: str, where: str, background: bool) -> list[str]:
    """A component's `state_dict`, the client state, or an upload's failure: on rank 1, the last on rank 0."""
    client = {"state": broken} if where == "client_state" and dist.get_rank() == 1 else {"state": dict}
    pipe = pipeline(out, Cluster("actor", engine(2, "bf16", None), client_state=client["state"]),
                    async_save=background, fail_training=where == "upload")  # fmt: skip
    component = Component()
    if dist.get_rank() != 1 or where != "component":
        component.state_dict = dict  # type: ignore[method-assign]
    pipe.register_stateful("loader", component)
    pipe.resume()
    if where == "upload" and dist.get_rank() == 0:
        pipe._after_commit.late.append({"checkpoint/step": 0, "checkpoint/failed": "the hub said no"})
    first = told(lambda: pipe.do_checkpoint(1))
    pending.wait_pending()
    component.state_dict = dict  # type: ignore[method-assign]
    pipe._clusters["actor"]._client_state = dict
    dist.barrier()
    return [first, told(lambda: pipe.do_checkpoint(2, is_last_step=True))]


def save_while_another_loads(out: str) -> list[str]:
    """Rank 1 loads while rank 0 saves; then both save."""
    with process.installed(process.Process()):
        ours, path = StateSaver(Settings.parse({"staging": {"arena_bytes": 32 << 20}}, "the test")), Path(out)
        ours.save(state(1), path / "step_1", step=1)
        began = time.monotonic()
        first = raised(lambda: ours.load(path / "step_1") if dist.get_rank() else ours.save(state(2), path / "step_2"))
        assert time.monotonic() - began < 60, "far less than commit_timeout_s"
        return [first, told(lambda: ours.save(state(3), path / "step_3", step=3))]
