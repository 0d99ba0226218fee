"""Engines under different values of ROLL_CKPT, each in a child of one process that has imported DeepSpeed.

python tests/activation_cases.py RESULTS.json CASES.json        both are lists, in the same order

A case is {"environment": {...}, "section": {...} or null, "config": {...}, "before": code, "twice": whether
to make two engines}; its result is what the
child has printed, the kind of the engine's checkpoint engine (None: the engine was not made), and the error.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import numpy  # noqa: F401  (what each child would import by itself)
import torch
import torch._dynamo
import yaml  # noqa: F401

import roll_ckpt.config  # noqa: F401

PLAIN = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
}


def engine_of(case: dict[str, Any]) -> Any:
    config = {**PLAIN, **case.get("config", {})}
    if case.get("section") is not None:
        config["checkpoint"] = {"roll_ckpt": case["section"]}
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def start_job() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)


def in_child(case: dict[str, Any], result: Path) -> None:
    os.environ |= case["environment"]
    found: dict[str, Any] = {"engine": None, "error": ""}
    try:
        start_job()
        exec(case.get("before", ""), {})
        engine = engine_of(case)
        found["engine"] = type(engine.checkpoint_engine).__name__
        settings = getattr(engine.checkpoint_engine, "settings", None)
        if settings is not None:
            found["settings"] = settings.model_dump(mode="json")
        if case.get("twice"):
            engine_of(case)
    except Exception as problem:
        traceback.print_exc()
        found["error"] = f"{type(problem).__name__}: {problem}"
    result.write_text(json.dumps(found))


def run(case: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        output, result = Path(made, "output"), Path(made, "result")
        child = os.fork()
        if child == 0:
            descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            in_child(case, result)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)
        return {**json.loads(result.read_text()), "output": output.read_text(errors="replace")}


if __name__ == "__main__":
    results = []
    for case in json.loads(Path(sys.argv[2]).read_text()):
        results.append(run(case))
        print(case, results[-1], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(results))
