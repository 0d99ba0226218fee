"""Feeds changed bytes to every parser until the time is over: `make fuzz`, or python tests/fuzz_parsers.py --seconds 60

Each parser has a process of its own, with a limit of its memory and of the time for one input. Guided by coverage where
atheris is installed (pip install atheris), else by chance alone. What fails is kept in build/fuzz/, and told.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

LONGEST_S = 20
MEMORY_BYTES = 3 << 30
FOUND = Path("build/fuzz")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="of all parsers together")
    parser.add_argument("--parser", action="append", help="only this one; may be given more than once")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 30), help="for the same inputs again")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.worker:
        logging.disable()
        return work(told.parser[0], told.seconds, told.seed)
    from hostile import PARSERS

    names = told.parser or list(PARSERS)
    FOUND.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        command = [sys.executable, __file__, "--worker", "--parser", name, "--seed", str(told.seed)]
        code = subprocess.run([*command, "--seconds", str(told.seconds / len(names))]).returncode
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)} (see {FOUND})" if failed else f"nothing found; seed {told.seed}")
    return bool(failed)


def work(name: str, seconds: float, seed: int) -> int:
    try:
        import atheris
    except ImportError:
        return by_chance(name, seconds, seed)
    import torch  # noqa: F401 (first, or else all of torch would be instrumented)

    with atheris.instrument_imports(include=["roll_ckpt"], enable_loader_override=False):
        import hostile
    parser = hostile.PARSERS[name]

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.3 and not parser.sealed:
            return bytes(atheris.Mutate(data, max_size))
        return hostile.edited(parser, data, edits(rng))[:max_size]

    folder = FOUND / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(parser.seeds):
        (folder / f"seed_{number}").write_bytes(data)
    options = [f"-max_total_time={int(seconds) or 1}", f"-timeout={LONGEST_S}", f"-rss_limit_mb={MEMORY_BYTES >> 20}"]
    options += [f"-seed={seed % (1 << 31)}", "-max_len=100000", "-verbosity=0", "-print_final_stats=1"]
    atheris.Setup(
        [name, *options, f"-artifact_prefix={folder}/", str(folder)],
        lambda data: hostile.outcome(parser, data),
        custom_mutator=mutate,
    )
    print(f"{name}:", flush=True)
    atheris.Fuzz()
    return 0


def by_chance(name: str, seconds: float, seed: int) -> int:
    import hostile

    parser, rng, runs, taken = hostile.PARSERS[name], random.Random(f"{seed} {name}"), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    end = time.monotonic() + seconds
    data = b""
    try:
        while time.monotonic() < end:
            data = hostile.edited(parser, rng.choice(parser.seeds), edits(rng))
            (FOUND / "last").write_bytes(data)  # a segmentation fault tells nothing more
            faulthandler.dump_traceback_later(LONGEST_S, exit=True)
            taken += hostile.outcome(parser, data) is None
            faulthandler.cancel_dump_traceback_later()
            runs += 1
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        assert more < MEMORY_BYTES, f"{more} bytes of memory were taken"
    finally:
        faulthandler.cancel_dump_traceback_later()
        if sys.exc_info()[0] is not None:
            (FOUND / f"{name.replace(' ', '_')}.{os.getpid()}").write_bytes(data)
    print(f"{name}: {runs} inputs, {taken} taken")
    return 0


def edits(rng: random.Random) -> list[tuple[int, int, int, int]]:
    return [
        (rng.getrandbits(20), rng.getrandbits(20), rng.getrandbits(20), rng.getrandbits(20))
        for _ in range(rng.choice((1, 1, 2, 4)))
    ]


if __name__ == "__main__":
    sys.exit(main())
