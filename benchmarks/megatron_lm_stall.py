"""How long a save holds up Megatron-LM's unchanged training loop: stock's and ours, synchronous and asynchronous.

    MEGATRON_LM=/path/to/Megatron-LM python benchmarks/megatron_lm_stall.py

starts `pretrain_gpt.py` on two data parallel ranks on CPU and gloo, by turns with and without
`import roll_ckpt.megatron`, with a GPT whose checkpoint has about 100 MB. Counted is what the slower rank spends in
`save_checkpoint`, and until the next save in `maybe_finalize_async_save`, from the third save of each start on. Prints
a table.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = """--num-layers 8 --hidden-size 256 --num-attention-heads 8 --seq-length 64 --max-position-embeddings 64
    --ckpt-fully-parallel-save --ckpt-assume-constant-structure --save-interval 3"""
WARM_UP = 2
_SPENT = re.compile(r"\[(save|finalize) of rank (\d+) took (\S+) s\]")


def measure() -> None:
    """In a rank: tell how long each call takes that belongs to saving."""
    from megatron.training import training

    def timed(what: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent = time.perf_counter() - began
            print(f"\n[{what} of rank {os.environ['RANK']} took {spent:.6f} s]", flush=True)
            return result

        return wrapper

    training.save_checkpoint = timed("save", training.save_checkpoint)
    training.maybe_finalize_async_save = timed("finalize", training.maybe_finalize_async_save)


def blocked(log: str) -> list[float]:
    """For each save after the warm-up, the seconds that the slower rank spent on it."""
    spent: dict[str, list[float]] = defaultdict(list)
    for what, rank, seconds in _SPENT.findall(log):
        if what == "save":
            spent[rank].append(float(seconds))
        elif spent[rank]:
            spent[rank][-1] += float(seconds)
    return [max(ranks) for ranks in zip(*spent.values(), strict=True)][WARM_UP:]


def run(checkout: Path, saves: int, ours: bool, is_async: bool) -> list[float]:
    import megatron_lm_job as job

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        steps = ["--train-iters", str(3 * (saves + WARM_UP) + 2), "--save", folder]
        asked = [*MODEL.split(), *steps, *(job.async_arguments(checkout) if is_async else [])]
        imports = "megatron_lm_stall" + " roll_ckpt.megatron" * ours
        path = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        os.environ["PYTHONPATH"] = path
        if job.start(checkout, log, asked, imports).wait():
            sys.exit(log.read_text()[-6000:])
        return blocked(log.read_text())[:saves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="starts of each kind, by turns")
    parser.add_argument("--saves", type=int, default=6, help="measured saves of each start")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    found: dict[tuple[bool, bool], list[float]] = defaultdict(list)
    for _ in range(asked.rounds):
        for is_async in (False, True):
            for ours in (False, True):
                found[is_async, ours] += run(Path(os.environ["MEGATRON_LM"]).resolve(), asked.saves, ours, is_async)
    print("| blocked, ms | stock | roll_ckpt | roll_ckpt / stock |\n|---|---|---|---|")
    for is_async, name in ((False, "synchronous"), (True, "asynchronous")):
        row = [[1000 * spent for spent in found[is_async, ours]] for ours in (False, True)]
        cells = [f"{statistics.median(kind):.0f} ({min(kind):.0f} to {max(kind):.0f}) of {len(kind)}" for kind in row]
        ratio = statistics.median(row[1]) / statistics.median(row[0])
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
elif "RANK" in os.environ:
    measure()
