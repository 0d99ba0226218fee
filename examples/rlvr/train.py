"""The main job: trains actor and critic, checkpoints them together, goes on where it was stopped.

    torchrun --standalone --nproc-per-node 2 -m examples.rlvr.train --config configs/rlvr.yaml

The same command again resumes. With `--only`, this torchrun job is one of two worlds that commit together.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from pathlib import Path

from examples.rlvr.journal import Journal, Place, work_dir_of
from examples.rlvr.screen import Screen, move_noise_to
from examples.rlvr.settings import RlvrConfig, read_settings
from examples.rlvr.stopping import StopAt
from roll_ckpt.errors import RollCkptError


def main() -> int:
    arguments = _arguments()
    rank = int(os.environ["RANK"])
    try:
        config = read_settings(arguments.config, arguments.output_dir, arguments.assignments)
    except RollCkptError as problem:
        if rank == 0:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    place = Place(work_dir_of(config.output_dir), arguments.only or "rlvr", rank)
    terminal = move_noise_to(place.log)
    if arguments.stop_at:
        arguments.stop_at.arm(place.stopped)
    screen = None
    if rank == 0:
        screen = Screen(terminal, place.world, config.max_steps, bar=arguments.only is None)
    try:
        _train(config, arguments, place, screen)
    except Exception as problem:
        if screen is not None:
            screen.close()
        terminal.write(f"rank {rank}: {type(problem).__name__}: {problem}\n  the whole story is in {place.log}\n")
        raise
    return 0


def _train(config: RlvrConfig, arguments: argparse.Namespace, place: Place, screen: Screen | None) -> None:
    # These load torch and DeepSpeed, which talk a lot: only after the noise goes to the log.
    import torch

    from examples.rlvr.pipeline import RlvrPipeline

    pipeline = RlvrPipeline(config, only=arguments.only)
    fresh = random.getstate(), torch.get_rng_state()
    began = time.monotonic()
    resumed_from = pipeline.resume()
    print(f"resume() took {time.monotonic() - began:.2f} s")
    if arguments.forget_rng:
        random.setstate(fresh[0])
        torch.set_rng_state(fresh[1])
    journal = Journal(place.journal, resumed_from)
    if screen is not None:
        screen.begin(resumed_from)
    for step in range(0 if resumed_from is None else resumed_from + 1, config.max_steps):
        figures = pipeline.train_step()
        pipeline.state.log_history.append(dict(figures))
        metrics = pipeline.do_checkpoint(step)
        journal.step(step, figures, metrics)
        if screen is not None:
            screen.step(step, figures, metrics)
    if screen is not None:
        screen.close()
        if resumed_from == config.max_steps - 1:
            screen.say(
                f"the run in {config.output_dir} is finished, its {config.max_steps} steps are saved. "
                f"Remove it to start anew, or go on with max_steps={2 * config.max_steps}."
            )
    torch.distributed.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun … -m examples.rlvr.train", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, help="instead of the file's; logs and uploads go to <it>-work")
    parser.add_argument("--only", choices=("actor_train", "critic"), help="train this cluster alone, as one world")
    parser.add_argument(
        "--stop-at",
        type=StopAt.parse,
        metavar="POINT:NAME[:CLUSTER]",
        help="stand still for ever at this point of a save, for somebody to kill the job there",
    )
    parser.add_argument(
        "--forget-rng",
        action="store_true",
        help="do not restore random numbers when resuming, to see that it shows",
    )
    parser.add_argument("assignments", nargs="*", metavar="KEY=VALUE", help="settings in place of the file's")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc-per-node 2 -m examples.rlvr.train …")
    if os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]:
        # All ranks are here: gloo need not find out an address that other hosts could reach.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
