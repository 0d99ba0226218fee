"""Kill runs at every moment that has a name and at others; see what the next start finds.

    make torture N=1000                                    a thousand kills, and a table of them
    python tests/torture.py --kills 1000 [--seed 1] [--part real]

Parts, each in a process of its own:

    miniature   ranks without torch (torture_ranks.py), forked, so that a kill costs a tenth of a second
    nfs         the same, on a file system that answers as NFS does (nfs.cpp)
    real        a ZeRO actor and a Megatron-core critic in one pipeline (torture_jobs.py)
    hub         the same job, pushing to a local Hub
    control     the same actor and critic under torch.distributed.checkpoint and a tracker file; it has to lose some

A run saves step after step, with saves that overlap, prunes and uploads, until it is struck: one rank, the one that
commits, the one that uploads, or all. The others are left to end, or are killed. The next run has to find the newest
checkpoint for which all have voted, every byte of it as it was at that step, and nothing of what was not complete.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import shims
from torture_harness import VICTIMS, Kind, Lost, Torture
from torture_ranks import Ranks

FAST = Path("/dev/shm")
SHARES = {"miniature": 0.8, "nfs": 0.14, "real": 0.04, "hub": 0.02}
CONTROL_KILLS = 20
SAY_EVERY_S = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="how often to strike, in all parts (default: 1000)")
    parser.add_argument("--seed", type=int, default=None, help="whom, when and where; it is printed")
    parser.add_argument("--part", choices=[*SHARES, "control"], help="all kills there, and nothing else")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    seed = int(time.time()) if told.seed is None else told.seed
    if told.inside:
        print(json.dumps(run_part(told.part, told.kills, seed)))
        return
    kills = {told.part: told.kills} if told.part else shared_out(told.kills)
    results = {part: started(part, count, seed) for part, count in kills.items()}
    control = results.pop("control", None)
    lost = [f"{part}: {result['lost']}" for part, result in results.items() if result["lost"]]
    if results:
        print(table(results))
        print(
            f"\n{sum(sum(result['kills'].values()) for result in results.values())} kills, "
            f"{sum(result['committed'] for result in results.values())} checkpoints committed, "
            f"{len(lost)} lost, torn or mixed (seed {seed})"
        )
    if control is not None:
        found = ", ".join(f"{count} {what}" for what, count in sorted(control.items()))
        print(f"control, torch.distributed.checkpoint with a tracker file: {found}")
        if not any(what.startswith("lost") for what in control):
            lost.append("the control lost nothing: this torture proves nothing")
    if lost:
        sys.exit("\n".join(lost))


def shared_out(kills: int) -> dict[str, int]:
    shares = {part: max(1, round(kills * share)) for part, share in SHARES.items()}
    shares["miniature"] = max(1, kills - sum(shares.values()) + shares["miniature"])
    return {**shares, "control": CONTROL_KILLS}


def started(part: str, kills: int, seed: int) -> dict[str, Any]:
    """Run one part in a process of its own: what is preloaded or imported there stays there."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if part == "nfs":
            environment["LD_PRELOAD"] = str(shims.build("nfs", Path(folder)))
        command = [sys.executable, __file__, "--part", part, "--kills", str(kills), "--seed", str(seed), "--inside"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{part} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_part(part: str, kills: int, seed: int) -> dict[str, Any]:
    logging.disable(logging.WARNING)
    noise = random.Random(f"{part} {seed}")
    folder = Path(tempfile.mkdtemp(dir=FAST if os.access(FAST, os.W_OK) else None, prefix=f"torture_{part}_"))
    if part == "control":
        from torture_jobs import control

        return dict(control(folder / "control", kills, noise))
    kind: Kind
    if part == "real":
        from torture_jobs import Jobs

        kind = Jobs()
    elif part == "hub":
        from torture_jobs import HubJobs

        kind = HubJobs(folder)
    else:
        kind = Ranks(nfs=part == "nfs")
    torture = Torture(kind, folder / part, noise)
    lost = ""
    said = time.monotonic()
    try:
        while torture.kills.total() < kills or torture.committed < kills // 2:
            torture.strike()
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                print(f"  {part}: {torture.kills.total()} of {kills} kills", file=sys.stderr)
        torture.finish()
        shutil.rmtree(folder)
    except Lost as problem:
        lost = f"{problem}; see {folder}"
    return {
        "kills": {f"{where}, {victim}": count for (where, victim), count in torture.kills.items()},
        "committed": torture.committed,
        "lost": lost,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """How often each victim was struck, and where."""
    counts: Counter[tuple[str, str]] = Counter()
    for result in results.values():
        for key, count in result["kills"].items():
            where, _, victim = key.rpartition(", ")
            counts[where, victim] += count
    rows = [(where, *(counts[where, victim] for victim in VICTIMS)) for where in sorted({w for w, _ in counts})]
    rows.append(("all", *(sum(row[1 + at] for row in rows) for at in range(len(VICTIMS)))))
    head = f"{'':45}" + "".join(f"{victim:>11}" for victim in VICTIMS)
    return "\n".join([head, *(f"{where:45}" + "".join(f"{n or '':>11}" for n in counts) for where, *counts in rows)])


if __name__ == "__main__":
    main()
