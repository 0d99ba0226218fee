"""What the ranks of a world do in tests/test_mixed.py: an actor under DeepSpeed, a critic under Megatron-core."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import long_runs
import torch
import torch.distributed as dist
from deepspeed_cases import raised
from megatron_cpu import Tiny, build, gathered
from pipeline_cases import Config, pipeline
from tiny import engine, train

from roll_ckpt import BasePipeline, Cluster, MegatronModel
from roll_ckpt.disk import writes
from roll_ckpt.errors import SaveFailed
from roll_ckpt.pipeline.metrics import add_ended
from roll_ckpt.save import pending

Both = tuple[Any, Tiny]


def both(seed: int = 0, tp: int = 1, hidden: int = 32) -> Both:
    tiny = build(tp, seed=123 + seed, dropout=0.1, hidden=hidden)
    return engine(2, "bf16", None, seed=seed), tiny


def registered(
    out: str, actor: Any, critic: Tiny, *, sharding_type: str = "dp_reshardable", **more: Any
) -> BasePipeline:
    trained = MegatronModel(critic.model, critic.optimizer, critic.scheduler, sharding_type=sharding_type)
    options = more.pop("options", {})
    return pipeline(out, Cluster("actor", actor), Cluster("critic", trained, **options), **more)


def steps(pair: Both, first: int, count: int) -> list[Any]:
    actor, critic = pair
    told = []
    for step in range(first, first + count):
        told.append((train(actor, 1, seed=step), critic.train()))
    return told


def resumed(out: str) -> list[list[Any]]:
    """The steps after a save: of the run that saved while it went on, and of one that resumed from it."""
    pair = both()
    made = registered(out, *pair)
    assert made.resume() is None
    steps(pair, 0, 2)
    made.do_checkpoint(1)
    unbroken = steps(pair, 2, 2)
    pending.wait_pending()
    dist.barrier()
    other = both(seed=5)
    again = registered(out, *other)
    assert again.resume() == 1
    other[1].steps = 2
    return [unbroken, steps(other, 2, 2)]


def resumed_elsewhere(out: str) -> list[str]:
    """The critic, saved data parallel and loaded tensor parallel: which of its tensors differ."""
    pair = both()
    made = registered(out, *pair, sharding_type="fully_reshardable")
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    wanted = gathered(pair[1])
    other = both(seed=5, tp=2)
    again = registered(out, *other, sharding_type="fully_reshardable")
    assert again.resume() == 1
    found = gathered(other[1])
    return [name for name in wanted if not torch.equal(wanted[name], found[name])]


def another_critic(out: str) -> tuple[str, bool]:
    """What resuming with another critic says, and whether the actor stayed as it was."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    other = both(seed=5, hidden=64)
    before = [parameter.clone() for parameter in other[0].module.parameters()]
    told = raised(registered(out, *other).resume)
    after = other[0].module.parameters()
    return told, all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def another_framework(out: str) -> str:
    """The cluster `critic` was saved under Megatron-core; now it is an engine."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    swapped = pipeline(out, Cluster("actor", pair[0]), Cluster("critic", engine(2, "bf16", None)))
    return raised(swapped.resume)


def pretrained_files(out: str) -> dict[str, Any]:
    pair = both()
    made = registered(out, *pair, options={"config": Config(), "client_state": lambda: {"epochs": 3}})
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    other = both(seed=5)
    again = registered(out, *other)
    again.resume()
    return dict(again._clusters["critic"].loaded_client_state)


class Custom:
    """Nothing that a safe load knows."""


def weights(pair: Both) -> list[torch.Tensor]:
    return [part.detach().clone() for chunk in (pair[0].module, pair[1].model[0]) for part in chunk.parameters()]


def refused(resume: Any, pair: Both) -> tuple[str, bool]:
    """What it says, and whether both models stayed as they were."""
    before = weights(pair)
    told = raised(resume)
    return told, all(torch.equal(a, b) for a, b in zip(before, weights(pair), strict=True))


def unloadable_client_state(out: str) -> tuple[str, bool, str]:
    """A client state that a safe load refuses: what resuming does, and what comes back where it is allowed."""
    pair = both()
    made = registered(out, *pair, options={"client_state": {"args": Custom()}})
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    other = both(seed=5)
    told, untouched = refused(registered(out, *other).resume, other)
    again = registered(out, *both(seed=5), load={"allow": [f"{Custom.__module__}.{Custom.__name__}"]})
    again.resume()
    return told, untouched, type(again._clusters["critic"].loaded_client_state["args"]).__name__


def only_model_resumes(out: str) -> tuple[str, bool]:
    """A whole checkpoint, and a cluster that saves only its model."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    other = both(seed=5)
    clusters = [
        Cluster("actor", other[0]),
        Cluster("critic", MegatronModel(other[1].model, other[1].optimizer), save_only_model=True),
    ]
    return refused(pipeline(out, *clusters).resume, other)


class Component:
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def new_component(out: str) -> tuple[str, bool]:
    """Resuming with a component that was not there when it was saved."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    other = both(seed=5)
    again = registered(out, *other)
    again.register_stateful("loader", Component())
    return refused(again.resume, other)


def save_critic_alone(out: str) -> None:
    tiny = build()
    made = pipeline(out, Cluster("critic", MegatronModel(tiny.model, tiny.optimizer, tiny.scheduler)))
    made.resume()
    tiny.train(2)
    made.do_checkpoint(1, is_last_step=True)


def resume_critic_alone(out: str, checkpoint: str) -> tuple[str, bool]:
    """A pipeline of Megatron clusters only: what it says, and whether the model stayed as it was."""
    tiny = build(seed=7)
    cluster = Cluster("critic", MegatronModel(tiny.model, tiny.optimizer, tiny.scheduler))
    before = [part.detach().clone() for part in tiny.model[0].parameters()]
    told = raised(pipeline(out, cluster, resume_from_checkpoint=checkpoint).resume)
    return told, all(torch.equal(a, b) for a, b in zip(before, tiny.model[0].parameters(), strict=True))


@contextmanager
def no_directory_on_one_rank() -> Iterator[None]:
    stock = writes.make_dirs

    def failing(path: Path, **how: bool) -> None:
        if path.name == "critic":
            raise OSError("no more directories")
        stock(path, **how)

    with mock.patch.object(writes, "make_dirs", failing if dist.get_rank() == 1 else stock):
        yield


def no_directory(out: str) -> list[str]:
    """Saves with and without a directory for the critic on rank 1, which plans and later replays."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    steps(pair, 0, 1)
    told = []
    for step in (1, 3):
        with no_directory_on_one_rank():
            told.append(raised(lambda step=step: made.do_checkpoint(step, is_last_step=True)))  # type: ignore[misc]
        made.do_checkpoint(step + 1, is_last_step=True)
    return told


class Collides:
    def save_pretrained(self, directory: str) -> None:
        Path(directory, "metadata.json").write_text("{}")


def collision(out: str) -> str:
    pair = both()
    made = registered(out, *pair, options={"config": Collides()})
    made.resume()
    steps(pair, 0, 1)
    return raised(lambda: made.do_checkpoint(1, is_last_step=True))


def only_model(out: str) -> tuple[str, list[str]]:
    """Weights alone: what resuming says, and what lies in the critic's folder."""
    pair = both()
    made = registered(out, *pair, options={"save_only_model": True})
    made.resume()
    steps(pair, 0, 1)
    made.do_checkpoint(1, is_last_step=True)
    dist.barrier()
    from megatron.core import dist_checkpointing

    held = dist_checkpointing.load_tensors_metadata(f"{out}/checkpoint-1/critic")
    return raised(registered(out, *both(seed=5)).resume), sorted(held)


def refusals(out: str) -> dict[str, str]:
    actor, critic = both()
    trained = MegatronModel(critic.model, critic.optimizer, critic.scheduler)
    return {
        "frozen": raised(lambda: pipeline(out, Cluster("critic", trained, exclude_frozen_parameters=True))),
        "neither": raised(lambda: pipeline(out, Cluster("critic", critic))),
        "form": raised(lambda: registered(out, actor, critic, sharding_type="fully_sharded_model_space")),
    }


def escaping(out: str, background: bool) -> tuple[str, list[str]]:
    """The actor's part raises on rank 1 when all was staged, while the critic has yet to be planned by all ranks; what
    the save says there, and what a later save has left on disk."""
    pair = both()
    made = registered(out, *pair, options={"client_state": {}}, async_save=background)
    made.resume()
    steps(pair, 0, 1)
    actor: Any = made._clusters["actor"]._backend
    stage = actor.stage

    def staged_and_raised(save: Any, directory: Path) -> Any:
        stage(save, directory)
        raise RuntimeError("out of the actor")

    if dist.get_rank() == 1:
        actor.stage = staged_and_raised
    told = ""
    try:
        made.do_checkpoint(1)
    except Exception as problem:
        told = str(problem)
    actor.stage = stage
    pending.wait_pending()
    dist.barrier()
    made.do_checkpoint(2, is_last_step=True)
    return told, sorted(path.name for path in Path(out).glob("checkpoint-*"))


def failing_early(out: str, background: bool) -> list[str]:
    """The actor's part raises on every rank before it has a vote to cast; what a later save has left on disk."""
    pair = both()
    made = registered(out, *pair, async_save=background)
    made.resume()
    steps(pair, 0, 1)
    actor: Any = made._clusters["actor"]
    do_checkpoint = actor.do_checkpoint

    def raised_at_once(**told: Any) -> Any:
        raise RuntimeError("the actor is not there")

    actor.do_checkpoint = raised_at_once
    told = ""
    try:
        made.do_checkpoint(1)
    except Exception as problem:
        told = f"{type(problem).__name__}: {problem}"
    actor.do_checkpoint = do_checkpoint
    pending.wait_pending()
    dist.barrier()
    made.do_checkpoint(2, is_last_step=True)
    return [told, *sorted(path.name for path in Path(out).glob("checkpoint-*"))]


def rendezvous(out: str) -> list[list[int]]:
    """How many each of two saves counts, for the actor and for the critic."""
    pair = both()
    made = registered(out, *pair)
    made.resume()
    counted = []
    for step in (1, 2):
        steps(pair, step, 1)
        metrics = made.do_checkpoint(step)
        counted.append([metrics[f"time/{name}/do_checkpoint/host_collectives"] for name in ("actor", "critic")])
    pending.wait_pending()
    return counted


class Moody:
    """A component that cannot say its state at every tenth save."""

    def __init__(self) -> None:
        self.saves = 0

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.saves % 10 == 7:
            raise ValueError("not today")
        return {"saves": self.saves}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def many_saves(out: str, saves: int) -> list[dict[str, Any]]:
    """Samples of what this rank and the directory hold, while both train, save, copy and prune at every step; some
    saves fail, some are waited for, and now and then a model is saved by itself under a new name."""
    pair = both()
    copies = {"type": "file_system", "output_dir": out + ".copies"}
    made = registered(out, *pair, max_ckpt_to_keep=2, max_steps=10**6, checkpoint_config=copies)
    made.register_stateful("moody", Moody())
    made.resume()

    def save(step: int) -> None:
        steps(pair, step, 1)
        with suppress(SaveFailed):
            made.do_checkpoint(step, is_last_step=step % 10 in (4, 7))
        if step % 10 == 5:
            pair[0].save_16bit_model(out + ".models", f"model-{step}.bin")

    def look(seconds: list[float]) -> dict[str, Any]:
        pending.wait_pending()
        for one in pending.pending():
            assert one._finished.wait(60)
        add_ended({}, made._saves, made._after_commit, fail_training=False)
        dist.barrier()
        critic = made._clusters["critic"]._backend._handle  # type: ignore[attr-defined]
        roots = [made, pair[0].checkpoint_engine, critic.strategy.base_strategy]
        found = long_runs.sample(Path(out), roots, seconds)
        dist.barrier()
        return found

    kept = [json.dumps(found) for found in long_runs.measured(saves, save, look)]  # one object each
    return [json.loads(found) for found in kept]
