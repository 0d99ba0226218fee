"""Stops rank 0 of Megatron-LM's training at a point of its second save, for a test to kill the job there.

A rank imports this at its start, see sitecustomize.py. STOP is the point, and the file STOPPED is made there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.training import checkpointing

from roll_ckpt.disk import failpoints

SAVE = 2

passed: Counter[str] = Counter()


def reach(point: str) -> None:
    passed[point] += 1
    if point == os.environ["STOP"] and passed[point] == SAVE:
        Path(os.environ["STOPPED"]).touch()
        while True:
            time.sleep(1)


finish, save_config, print_rank_0 = FileSystemWriterAsync.finish, serialization.save_config, checkpointing.print_rank_0


def stopping_finish(*args: Any, **kwargs: Any) -> None:
    reach("files")
    finish(*args, **kwargs)
    reach("metadata")


def stopping_save_config(*args: Any, **kwargs: Any) -> None:
    save_config(*args, **kwargs)
    reach("complete")


def stopping_print(message: str) -> None:
    print_rank_0(message)
    if "successfully saved checkpoint" in message:
        reach("named")


def observe(operation: str, paths: tuple[str, ...]) -> None:
    if operation == "rename" and paths[-1].endswith("latest_checkpointed_iteration.txt"):
        reach("tracker")


if os.environ["RANK"] == "0":
    FileSystemWriterAsync.finish = stopping_finish
    serialization.save_config = stopping_save_config
    checkpointing.print_rank_0 = stopping_print
    failpoints.observer = observe
