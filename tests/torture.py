"""Kill runs at every moment that has a name and at others; see what the next start finds.

    make torture N=1000                                    a thousand kills, and a table of them
    python tests/torture.py --kills 1000 [--seed 1] [--part real]

Parts, each in a process of its own:

    miniature   ranks without torch (torture_ranks.py), forked, so that a kill costs a tenth of a second
    nfs         the same, on a file system that answers as NFS does (nfs.cpp)
    real        a ZeRO actor and a Megatron-core critic in one pipeline (torture_jobs.py)
    control     the same actor and critic under torch.distributed.checkpoint and a tracker file; it has to lose some

A run saves step after step, with saves that overlap, prunes and uploads, until it is struck: one rank, the one that
commits, the one that uploads, or all. The others are left to end, or are killed. The next run has to find the newest
checkpoint for which all have voted, every byte of it as it was at that step, and nothing of what was not complete.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
from pathlib import Path

from torture_harness import Lost, Torture

FAST = Path("/dev/shm")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--part", default="miniature")
    told = parser.parse_args()
    logging.disable(logging.WARNING)
    folder = Path(tempfile.mkdtemp(dir=FAST if os.access(FAST, os.W_OK) else None, prefix="torture_"))
    if told.part == "control":
        from torture_jobs import control

        print(control(folder / "x", told.kills, random.Random(told.seed)))
        return
    if told.part == "real":
        from torture_jobs import Jobs as kind
    else:
        from torture_ranks import Ranks as kind
    t = Torture(kind(), folder / "x", random.Random(told.seed))
    try:
        t.torture(told.kills)
    except Lost as problem:
        print(folder, problem)
        sys.exit(1)
    finally:
        for key, n in sorted(t.kills.items()):
            print(n, *key)
        print(t.runs, t.committed, t.found)


if __name__ == "__main__":
    main()
