"""What the ranks of a test world do in tests/test_unpickler.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed_cases import settings
from pipeline_cases import pipeline
from saved_values import Pair, plain_values, same
from tiny import engine, train

from roll_ckpt import Cluster
from roll_ckpt.errors import UnsupportedError
from roll_ckpt.save import pending


def client_states(out: str) -> dict[str, Any]:
    """Plain values in a client state, saved and loaded by stock DeepSpeed and by us; then one that needs a setting."""
    ours, stock = engine(2, "bf16", settings()), engine(2, "bf16", None)
    for made, tag in ((ours, "ours"), (stock, "stock")):
        train(made, 1, seed=1)
        made.save_checkpoint(out, tag=tag, client_state={"mine": plain_values()})
    pending.wait_pending()
    told: dict[str, Any] = {}
    for tag in ("ours", "stock"):
        told[f"{tag} by us"] = same(ours.load_checkpoint(out, tag=tag)[1]["mine"], plain_values())
        told[f"{tag} by stock"] = same(stock.load_checkpoint(out, tag=tag)[1]["mine"], plain_values())
    ours.save_checkpoint(out + ".newest", tag="old")
    train(ours, 1, seed=2)
    ours.save_checkpoint(out + ".newest", tag="new", client_state={"pair": Pair(1, 2)})
    pending.wait_pending()
    try:
        told["newest"] = ours.load_checkpoint(out + ".newest")[0]
    except UnsupportedError as problem:
        told["newest"] = str(problem)
    allowing = engine(2, "bf16", settings(load={"allow": ["saved_values.Pair"]}))
    told["allowed"] = allowing.load_checkpoint(out + ".newest")[1]["pair"] == Pair(1, 2)
    return told


class Component:
    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"mine": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["mine"]


def components(out: str) -> dict[str, Any]:
    """Plain values in a component; then one component that needs a setting, on rank 1 alone."""
    rank = torch.distributed.get_rank()
    told = {}
    for name, state in (("plain", plain_values()), ("pair", Pair(1, 2) if rank == 1 else None)):
        for saving in (True, False):
            trained = engine(2, "bf16", None)
            made, component = pipeline(str(Path(out) / name), Cluster("actor", trained)), Component(state)
            made.register_stateful("mine", component)
            before = [p.detach().clone() for p in trained.parameters()]
            if not saving:
                component.state = None
            try:
                made.resume()
            except UnsupportedError as problem:
                told[name] = str(problem)
                told["untouched"] = all(map(torch.equal, before, trained.parameters()))
                continue
            if saving:
                train(trained, 1, seed=3)
                made.do_checkpoint(1, is_last_step=True)
            else:
                told[name] = same(component.state, state)
    return told
