"""Real jobs for the torture: a ZeRO actor and a Megatron-core critic in one pipeline, on two ranks.

Everything is imported once, and each run forked from there: it starts within a second. Training is deterministic, and
every run writes down a digest of all parameters, moments and random states after each step: whoever comes to that
step again, by training or by resuming, has to have the same.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import deepspeed
import mixed_cases
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hub_client import settings
from megatron_cpu import build, install
from tiny import engine
from torture_harness import ANY, LIMIT_S, OPERATION, Age, Blow, Copies, Run, Torture, age_of, arm, check_start
from torture_ranks import COMMITS, KEEP, UPLOADS, VOTES

from roll_ckpt import names, process
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.errors import EpochLost
from roll_ckpt.formats import manifests
from roll_ckpt.save import claims, pending
from roll_ckpt.save.save import Save
from roll_ckpt.upload.hub import push_queue, worker
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.pull import pull

RANKS, REPO = 2, "dev/torture"
PEER_IS_GONE = ("peer", "gloo", "Broken pipe", "Connection re", "did not come", "no answer from rank 0")


class Jobs(Copies):
    """The kind of run; see torture_harness.Kind. Rank 0 uploads, on a thread of its own."""

    def __init__(self) -> None:
        warm()
        self.points = {"rank": VOTES, "committer": COMMITS, "uploader": UPLOADS, "job": COMMITS}
        self.patience_s = 4.0

    def start(self, torture: Torture, run: Run, blow: Blow, *, take_over: bool) -> None:
        to = self.destination(torture)
        fork_ranks(run, blow, torture.folder / "log", lambda rank: train(torture, run, rank, to, take_over))

    def start_uploader(self, torture: Torture, run: Run, blow: Blow | None) -> None:
        """A run has its own."""

    def destination(self, torture: Torture) -> dict[str, str]:
        return {"type": "file_system", "output_dir": str(torture.upload_dir)}

    def pids(self, run: Run, victim: str) -> list[int]:
        role = "committer" if victim == "uploader" else victim
        return [pid for pid in run.alive if victim == "job" or run.role_of[pid] == role]

    def check(self, checkpoint_dir: Path, step: int | None) -> None:
        told = json.loads((checkpoint_dir / "pipeline/worker_state_pipeline.json").read_text())
        assert told["step"] == step, f"{checkpoint_dir} says step {told['step']}"


class HubJobs(Jobs):
    """Jobs that push to a local Hub, by the real client in a process of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        code = (
            "import sys, pathlib; from roll_ckpt_hub_dev import LocalHub; "
            "print(LocalHub(pathlib.Path(sys.argv[1])).url, flush=True); sys.stdin.read()"
        )
        self._server = subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "server")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout is not None
        os.environ.update(settings(self._server.stdout.readline().strip(), folder / "home"))
        self.points["uploader"] = (ANY,)

    def destination(self, torture: Torture) -> dict[str, str]:
        return {"type": "hub", "repo_id": REPO}

    def pids(self, run: Run, victim: str) -> list[int]:
        return _uploaders(run.alive) if victim == "uploader" else super().pids(run, victim)

    def uploaded(self, torture: Torture) -> dict[str, Age]:
        told = push_queue.list_entries(torture.output_dir) if tree.exists(torture.output_dir / names.HUB) else []
        return {entry.name: (entry.age[0], entry.age[1], entry.age[2]) for entry in told if entry.state == "done"}

    def drain(self, torture: Torture) -> None:
        worker.push_all_owed(torture.output_dir, lambda event: None, again=True)
        assert push_queue.owed(torture.output_dir) == []
        for name, age in (torture.uploaded | self.uploaded(torture)).items():
            checkpoint_dir = pull(Remote.parse(f"hf://{REPO}@{name}"), torture.folder / "pulled")
            assert age_of(manifests.read(checkpoint_dir)) == age, f"the Hub has another {name} than that of {age}"
            self.check(checkpoint_dir, age[1])


def _uploaders(parents: Collection[int]) -> list[int]:
    """The uploaders that these processes have started."""
    found = []
    for other in Path("/proc").iterdir():
        with suppress(OSError):
            if other.name.isdecimal() and b"roll_ckpt.upload.hub.worker" in (other / "cmdline").read_bytes().split(
                b"\0"
            ):
                parent = int((other / "stat").read_text().rpartition(")")[2].split()[1])
                found += [int(other.name)] if parent in parents else []
    return found


def warm() -> None:
    """Import what the ranks need, so that they need not; nothing may start a thread here."""
    torch.set_num_threads(1)
    install()
    for module in ("core.models.gpt.gpt_layer_specs", "core.optimizer", "core.pipeline_parallel", "core.distributed",
                   "core.dist_checkpointing.strategies.torch", "core.optimizer_param_scheduler"):  # fmt: skip
        importlib.import_module(f"megatron.{module}")
    assert threading.active_count() == 1


def fork_ranks(run: Run, blow: Blow, log: Path, work: Callable[[int], None]) -> None:
    """Fork the ranks of a job, one or all of which a blow will strike."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    armed = 1 if blow.victim == "rank" else 0 if (blow.victim, blow.when) != ("uploader", OPERATION) else None
    for rank in range(RANKS):

        def start(rank: int = rank) -> None:
            descriptor = writes.append(log)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            if rank == armed:
                arm(blow, run.tell)
            try:
                deepspeed.init_distributed("gloo", dist_init_required=True)
                work(rank)
            except Exception as problem:
                traceback.print_exc()
                if not any(word in str(problem) for word in PEER_IS_GONE) and not isinstance(problem, EpochLost):
                    raise
            process.current().leave()  # a forked process does not come to it by itself

        run.fork("rank" if rank else "committer", start)


def train(torture: Torture, run: Run, rank: int, to: dict[str, str], take_over: bool) -> None:
    """Resume, and train and save step after step, until the process is killed or its peer is gone."""
    pair = mixed_cases.both()
    pipeline = mixed_cases.registered(
        str(torture.output_dir), *pair, max_steps=10**9, max_ckpt_to_keep=KEEP, take_over=take_over,
        commit_timeout_s=1.5, exit_timeout_s=5,
        checkpoint_config=to,
    )  # fmt: skip
    digests = Digests(torture.folder / f"digests.{rank}")
    journal = writes.append(torture.journals / str(rank))
    step = pipeline.resume()
    if rank == 0:
        number = claims.epoch_of(torture.output_dir).number
        if not take_over:
            check_start(torture.output_dir, number, torture.found, alone=True)
        run.tell(started=number)
    if step is not None:
        digests.check(step, pair)
    saves: list[Save] = []
    step = step or 0
    while True:
        step += 1
        train_both(pair, step)
        digests.check(step, pair)
        pipeline.do_checkpoint(step)
        saves += [save for save in pending.pending() if save not in saves]
        for save in [save for save in saves if save.settled]:
            saves.remove(save)
            write_down(run, journal, save)


def train_both(pair: mixed_cases.Both, step: int) -> None:
    pair[1].steps = step  # its data follow from that
    mixed_cases.steps(pair, step, 1)


def write_down(run: Run, journal: int, save: Save) -> None:
    attempt, failure = save.attempt, save.failure
    if failure is None:
        os.write(journal, f"{attempt.epoch} {attempt.step} {attempt.attempt} committed\n".encode())
    elif "no vote came from" in str(failure):
        os.write(journal, f"{attempt.epoch} {attempt.step} {attempt.attempt} abandoned\n".encode())
    elif not isinstance(failure, EpochLost):
        run.tell(problem=str(failure))


class Digests:
    """What the state of this rank was after each step that any run has trained."""

    def __init__(self, path: Path) -> None:
        self.known = dict(line.split() for line in path.read_text().splitlines()) if path.exists() else {}
        self._file = writes.append(path)

    def check(self, step: int, pair: mixed_cases.Both) -> None:
        """AssertionError if the state is another one than it was at this step before."""
        now = digest(pair)
        if str(step) not in self.known:
            self.known[str(step)] = now
            os.write(self._file, f"{step} {now}\n".encode())
        assert self.known[str(step)] == now, f"rank {dist.get_rank()}: the state is not that of step {step}"


def digest(pair: mixed_cases.Both) -> str:
    """Of all parameters, main parameters, moments and counts of this rank."""
    told = hashlib.sha256()
    for tensor in itertools.chain(*state(pair).values()):
        told.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


def state(pair: mixed_cases.Both) -> dict[str, list[torch.Tensor]]:
    """The tensors of each cluster that training goes on from."""
    actor, critic = pair
    models = {"actor": [*actor.module.parameters(), *actor.module.buffers()], "critic": critic.model[0].parameters()}
    return {
        name: [*tensors, *(tensor for made in schedules(pair)[name][1] for tensor in _of_optimizer(made))]
        for name, tensors in models.items()
    }


def _of_optimizer(optimizer: Any) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from (value for _, value in sorted(optimizer.state.get(parameter, {}).items()))


# --- the control --------------------------------------------------------------------------------------------


def control(folder: Path, kills: int, noise: random.Random) -> Counter[str]:
    """Kill jobs that save the same state by torch.distributed.checkpoint, each cluster for itself, and a file that
    names the step to resume from as soon as one cluster has saved it; what the starts after that find, counted."""
    warm()
    found: Counter[str] = Counter()
    for number in range(1, kills + 1):
        folder.mkdir(exist_ok=True)
        run = Run(number)
        when = noise.choice(["control.actor", "control.critic", ANY]) if found else "control.actor"
        blow = Blow("job", when, 1 + int(noise.expovariate(0.7)))
        fork_ranks(run, blow, folder / "log", lambda rank, run=run: train_control(folder, run, rank))  # type: ignore[misc]
        run.listen(lambda run=run: run.heard("struck") or run.heard("resumed") or run.heard("problem"), LIMIT_S)
        patience_s = noise.random() if blow.when == ANY else LIMIT_S
        run.listen(lambda run=run: run.heard("struck") or run.heard("problem") or not run.alive, patience_s)
        run.kill()
        run.close()
        assert not run.heard("problem"), run.heard("problem")
        told = run.heard("resumed")[0]
        found[told] += 1
        if told.startswith("lost"):
            shutil.rmtree(folder)
    return found


def train_control(folder: Path, run: Run, rank: int) -> None:
    pair = engine(2, "bf16", None), build()
    train_both(pair, 0)  # there are no moments to load into before that
    tracker = folder / "latest"
    digests = Digests(folder / f"digests.{rank}")
    step = int(tracker.read_text() or 0) if tracker.exists() else 0
    told = [""] * RANKS
    if step:
        dist.all_gather_object(told, load_control(folder, step, pair, digests))
    if rank == 0:
        run.tell(resumed=max(told) or ("resumed" if step else "started anew"))
    if any(told):
        return
    while True:
        step += 1
        train_both(pair, step)
        digests.check(step, pair)
        for name, part in parts(pair).items():
            dcp.save(part, checkpoint_id=folder / f"step-{step}" / name)
            if rank == 0:
                tracker.write_text(str(step))
            failpoints.failpoint(f"control.{name}")
        if rank == 0:
            shutil.rmtree(folder / f"step-{step - KEEP}", ignore_errors=True)


def load_control(folder: Path, step: int, pair: mixed_cases.Both, digests: Digests) -> str:
    """What is wrong with the state of this step."""
    rank = dist.get_rank()
    try:
        for name, part in parts(pair).items():
            dcp.load(part, checkpoint_id=folder / f"step-{step}" / name)
            scheduler, optimizers = schedules(pair)[name]
            scheduler.load_state_dict(part[f"{rank}.scheduler"])
            for group, told in zip(_groups(optimizers), part[f"{rank}.groups"], strict=True):
                group.update(told)
        digests.check(step, pair)
    except AssertionError:
        return "lost: a mixture"
    except BaseException as problem:  # CheckpointException is no Exception
        print(problem)
        return "lost: the tracker names what cannot be loaded"
    return ""


def parts(pair: mixed_cases.Both) -> dict[str, dict[str, Any]]:
    """What each cluster saves: this rank's tensors under names of its own, its scheduler and learning rates."""
    rank = dist.get_rank()
    made: dict[str, dict[str, Any]] = {}
    for name, tensors in state(pair).items():
        scheduler, optimizers = schedules(pair)[name]
        made[name] = {f"{rank}.{index}": tensor for index, tensor in enumerate(tensors)}
        made[name][f"{rank}.scheduler"] = scheduler.state_dict()
        made[name][f"{rank}.groups"] = [
            {key: value for key, value in group.items() if key != "params"} for group in _groups(optimizers)
        ]
    return made


def schedules(pair: mixed_cases.Both) -> dict[str, tuple[Any, list[Any]]]:
    """Each cluster's scheduler, and the optimizers that it schedules."""
    actor, critic = pair
    parts = getattr(critic.optimizer, "chained_optimizers", [critic.optimizer])
    return {
        "actor": (actor.lr_scheduler, [actor.optimizer.optimizer]),
        "critic": (critic.scheduler, [part.optimizer for part in parts]),
    }


def _groups(optimizers: list[Any]) -> list[dict[str, Any]]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]
