"""What the ranks of a test world do in tests/test_unusual_state.py."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import unusual
from deepspeed_cases import OURS, cannot_be_saved, raised, settings
from pipeline_cases import pipeline
from tiny import config, engine, train

from roll_ckpt import Cluster, process
from roll_ckpt.config import Settings
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.save import pending
from roll_ckpt.state import StateSaver
from roll_ckpt.transaction import verification


class Net(torch.nn.Linear):
    """A layer with unusual buffers and frozen parameters."""

    def __init__(self, kinds: dict[str, Any]) -> None:
        super().__init__(8, 8)
        for name, value in kinds.items():
            if isinstance(value, torch.nn.Parameter):
                self.register_parameter(name.replace(".", " "), value)
            else:
                self.register_buffer(name.replace(".", " "), value)


def save_all_kinds(out: str, stage: int) -> dict[str, Any]:
    """An engine with all unusual buffers and client state saves; which values differ, loaded by us and by stock."""
    ours = settings(async_save=False, load={"allow": unusual.allowed()})
    net = Net(unusual.ordered(unusual.BUFFERS))
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    made = deepspeed.initialize(model=net, model_parameters=trained, config=config(stage, "fp32", ours))[0]
    made.backward(made(torch.ones(4, 8)).sum())
    made.step()
    safe = {name: value for name, value in unusual.ordered(unusual.STATE).items() if name not in unusual.REFUSED}
    rest = {name: value for name, value in unusual.ordered(unusual.STATE).items() if name in unusual.REFUSED}
    assert made.save_checkpoint(out, tag="safe", client_state=safe)
    assert made.save_checkpoint(out, tag="rest", client_state=rest)
    dist.barrier()
    names = {name for name, _ in made.module.named_buffers()}
    if stage < 3:  # under ZeRO-3 the parameters are elsewhere
        names |= {name for name, _ in made.module.named_parameters()}
    buffers = {name: value for name, value in made.module.state_dict().items() if name in names}
    stored = sorted(path.relative_to(out) for path in Path(out).glob("*/*model_states.pt"))
    differing = []
    for path in stored:
        client, loads = (safe, [made.checkpoint_engine.load]) if path.parts[0] == "safe" else (rest, [])
        for load in [_load_by_stock, *loads]:
            found = load(f"{out}/{path}")
            for held, told in ((found["module"], _through_stock(buffers)), (found, _through_stock(client))):
                differing += [f"{path}: {key}" for key in told if not unusual.same(held[key], told[key])]
    opened = OpenedCheckpoint(Path(out) / "safe")
    index = opened.tensor_index("model", dist.get_rank())
    assert index is not None
    problems = [str(problem) for problem in verification.verify(Path(out) / "safe")]
    return {"files": len(stored), "differing": differing, "problems": problems, "index": len(list(index))}


def _load_by_stock(path: str) -> Any:
    return torch.load(path, weights_only=False)


def _through_stock(state: Any) -> Any:
    """What stock torch makes of its own file: it normalises a few types."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def impossible_client_state(out: str, rank: int) -> dict[str, dict[str, Any]]:
    """What an engine is told of each impossible entry in the client state of `rank` alone."""
    made = engine(3, "bf16", settings())
    found = {}
    for place, (name, make) in enumerate(unusual.IMPOSSIBLE.items()):
        state = {"step": 1, "foo": make()} if dist.get_rank() == rank else {"step": 1}
        folder = f"{out}/{place}"
        told = raised(lambda state=state, folder=folder: made.save_checkpoint(folder, tag="t", client_state=state))
        dist.barrier()
        found[name] = {"told": told, "left": Path(folder).exists()}
    made.save_checkpoint(f"{out}/good", tag="t")
    state = {"now": unusual.IMPOSSIBLE["lock"]()} if dist.get_rank() == rank else {}
    later = raised(lambda: made.save_checkpoint(f"{out}/good", tag="later", client_state=state))
    pending.wait_pending()
    found["later"] = {"told": later, "left": (Path(out) / "good" / "later").exists()}
    return found


def client_state_of_who_does_not_save_it(out: str) -> list[str]:
    """Under ZeRO-2 rank 0 alone saves the client state: stock code does not look at that of rank 1."""
    made = engine(2, "bf16", settings(async_save=False))
    state = {"foo": (lambda: 0) if dist.get_rank() == 1 else 1}
    return [raised(lambda: made.save_checkpoint(out, tag="t", client_state=state))]


def impossible_module(out: str, stage: int) -> dict[str, Any]:
    """The module of one rank has extra state that cannot be pickled, at the first save and at a later one."""
    made = engine(stage, "bf16", settings())
    train(made, 1, seed=1)
    found: dict[str, Any] = {}
    with cannot_be_saved(made.module, rank=0):
        found["first"] = raised(lambda: made.save_checkpoint(out, tag="first"))
        dist.barrier()
        found["left"] = _entries(out)
        found["again"] = raised(lambda: made.save_checkpoint(out, tag="again"))
    found["good"] = made.save_checkpoint(out, tag="good")
    count = made.checkpoint_engine.ranks.rendezvous_count
    with cannot_be_saved(made.module, rank=0):
        found["later"] = raised(lambda: made.save_checkpoint(out, tag="later"))
    found["collectives"] = made.checkpoint_engine.ranks.rendezvous_count - count
    pending.wait_pending()
    dist.barrier()
    found["kept"] = _entries(out)
    return found


def _entries(out: str) -> list[str]:
    """Checkpoints, attempts and what else a save leaves; not DeepSpeed's scripts."""
    files = (path.relative_to(out).parts[0] for path in Path(out).rglob("*") if path.is_file() and path.suffix != ".py")
    return sorted({*files} - {".epochs", ".trash"})  # rank 0 may still be emptying the trash


class Component:
    def __init__(self) -> None:
        self.state: Any = {}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def pipeline_of_all_kinds(out: str) -> list[str]:
    """A component and a client state of every kind that a safe load takes; which ones came back differently."""
    more = {"load": {"allow": unusual.allowed()}}
    state = {name: value for name, value in unusual.ordered(unusual.STATE).items() if name not in unusual.REFUSED}
    component, made = Component(), engine(2, "bf16", None)
    component.state = dict(state)
    saved = pipeline(out, Cluster("actor", made, client_state=state), **more)
    saved.register_stateful("loader", component)
    saved.state.kv["tensor"] = torch.ones(2, 3)
    saved.state.log_history.append({"loss": torch.tensor(0.5), "rewards": torch.ones(2)})
    saved.resume()
    saved.do_checkpoint(1, is_last_step=True)
    dist.barrier()
    component.state, cluster = {}, Cluster("actor", made)
    again = pipeline(out, cluster, **more)
    again.register_stateful("loader", component)
    assert again.resume() == 1
    assert torch.equal(again.state.kv["tensor"], torch.ones(2, 3))
    assert again.state.log_history[0]["loss"] == 0.5 and again.state.log_history[0]["rewards"] == [1.0, 1.0]
    told = _through_stock(state)
    found = {"component": component.state, "client state": cluster.loaded_client_state}
    return [
        f"{where}: {key}" for where, held in found.items() for key in told if not unusual.same(held[key], told[key])
    ]


def impossible_in_a_pipeline(out: str, asynchronous: bool) -> dict[str, Any]:
    """One rank's component, client state or module cannot be saved, at the first save; then all is well."""
    component, client = Component(), {"epoch": 1}
    made = engine(3, "bf16", None)
    run = pipeline(out, Cluster("actor", made, client_state=lambda: client), async_save=asynchronous)
    run.register_stateful("loader", component)
    bad = dist.get_rank() == 1
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {}
    component.state = {"queue": [unusual.IMPOSSIBLE["lock"]()]} if bad else {}
    found["component"] = raised(lambda: run.do_checkpoint(1)), Path(out).exists()
    component.state = {}
    client["hook"] = unusual.IMPOSSIBLE["lambda"]() if bad else None  # type: ignore[assignment]
    found["client state"] = raised(lambda: run.do_checkpoint(1)), Path(out).exists()
    client.pop("hook")
    with cannot_be_saved(made.module, rank=1):
        found["module"] = raised(lambda: run.do_checkpoint(1)), _entries(out)
    logging.disable(logging.NOTSET)
    dist.barrier()
    run.do_checkpoint(1, is_last_step=True)
    found["kept"] = _entries(out)
    return found


def saver_of_what_changes(out: str) -> list[str]:
    """A state of one rank that cannot be saved at the first save, that can, and that cannot any more."""
    with process.installed(process.Process()):
        ours = StateSaver(Settings.parse({"async_save": True, "staging": OURS["staging"]}, "test"))
        told = []
        for step, bad in enumerate((True, False, True)):
            state = {"w": torch.ones(3), "deep": {"lock": unusual.IMPOSSIBLE["lock"]() if bad else 1}}
            if dist.get_rank() == 0:
                state = {"w": torch.ones(3)}
            told.append(raised(lambda state=state, step=step: ours.save(state, Path(out) / f"step_{step}", step=step)))
            pending.wait_pending()
            dist.barrier()
        return [*told, *_entries(out)]
