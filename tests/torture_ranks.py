"""A run in miniature for the torture, without torch: ranks that save without end, and an uploader.

Two clusters of two ranks each, in two processes (every one with a rank of both) or in four (two worlds that commit
together). Each saves step after step, two saves at a time; the one that commits also prunes.
"""

from __future__ import annotations

import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hand_made import HandMadeImage
from torture_harness import Blow, Copies, Run, Torture, arm, check_start

from roll_ckpt import names
from roll_ckpt.disk import failpoints, tree, writes
from roll_ckpt.errors import Damaged, EpochLost, NotFound, SaveFailed
from roll_ckpt.formats import records
from roll_ckpt.formats.records import Receipt, Vote
from roll_ckpt.native import extension
from roll_ckpt.native.extension import Arena
from roll_ckpt.native.mover import Mover
from roll_ckpt.transaction import attempts, ballot, claims, epochs, listing, retention, settlement
from roll_ckpt.transaction.attempts import Attempt
from roll_ckpt.transaction.epochs import Epoch
from roll_ckpt.upload import file_system

CLUSTERS = {"actor": 2, "critic": 2}
WORLDS = [(("actor", "critic"),), (("actor",), ("critic",))]
KEEP, IN_FLIGHT = 2, 2
TIMEOUT_S, PAUSE_S = 0.4, 0.004
BLOCK = 64 << 10
NFS_KEEPS_MS, NFS_SENT_TWICE = 30, 15
SIZES = [0, 100, 4096, BLOCK, 200_000]

VOTES = ("write.done", "vote.before", "vote.cast")
DECIDES = ("manifest.before", "manifest.written", "decision.linked", "commit.renamed", "latest.written")
COMMITS = ("epoch.claimed", "begin.made", *VOTES, *DECIDES, "attempt.removed", "prune.renamed", "prune.deleted")
UPLOADS = ("upload.copied", "upload.renamed")


class Ranks(Copies):
    """The kind of run; see torture_harness.Kind."""

    def __init__(self, nfs: bool = False) -> None:
        self.nfs = nfs
        self.points = {"rank": VOTES, "committer": COMMITS, "uploader": UPLOADS, "job": COMMITS}
        self.patience_s = 0.5

    def start(self, torture: Torture, run: Run, blow: Blow, *, take_over: bool) -> None:
        worlds = torture.noise.choice(WORLDS)
        run.leads = len(worlds)
        rewind = torture.noise.random() < 0.15
        members = [(clusters, rank) for clusters in worlds for rank in range(2)]
        armed = torture.noise.choice([m for m in members if (m[1] == 0) != (blow.victim == "rank")])
        links = {clusters: os.pipe() for clusters in worlds}
        for clusters, rank in members:
            strikes = blow.victim != "uploader" and (clusters, rank) == armed

            def work(clusters: tuple[str, ...] = clusters, rank: int = rank, strikes: bool = strikes) -> None:
                for pair in links.values():
                    for end, descriptor in enumerate(pair):
                        if (pair, end) != (links[clusters], 1 - rank):
                            os.close(descriptor)
                self._see(torture.folder)
                if strikes:
                    arm(blow, run.tell)
                Member(torture, run, clusters, rank, links[clusters][1 - rank], len(worlds) > 1, take_over).run(rewind)

            run.fork("rank" if rank else "committer", work)
        for pair in links.values():
            for descriptor in pair:
                os.close(descriptor)
        self.start_uploader(torture, run, blow if blow.victim == "uploader" else None)

    def start_uploader(self, torture: Torture, run: Run, blow: Blow | None) -> None:
        def work() -> None:
            self._see(torture.folder)
            if blow is not None:
                arm(blow, run.tell)
            upload(torture)

        run.fork("uploader", work)

    def _see(self, folder: Path) -> None:
        """Let this process see the folder as its own NFS client would."""
        if self.nfs:
            ctypes.CDLL(None).nfs_start(str(folder).encode(), NFS_KEEPS_MS, NFS_SENT_TWICE, os.getpid())

    def pids(self, run: Run, victim: str) -> list[int]:
        return [pid for pid in run.alive if victim in ("job", run.role_of[pid])]

    def check(self, checkpoint_dir: Path, step: int | None) -> None:
        told, number = (checkpoint_dir / "actor/note.txt").read_text().split()
        assert int(told) == step, f"{checkpoint_dir} says step {told}"
        assert (checkpoint_dir / "critic/note.txt").read_text().split() == [told, number], (
            f"{checkpoint_dir} is a mixture"
        )
        for cluster, size in CLUSTERS.items():
            for rank in range(size):
                data = (checkpoint_dir / cluster / f"shard_{rank}.bin").read_bytes()
                assert data == shard(step, int(number), cluster, rank), (
                    f"{checkpoint_dir}: {cluster} rank {rank} is a mixture"
                )


class Member:
    """One process: rank `rank` of the world of `clusters`. Rank 0 tells rank 1 over `link` what to save."""

    def __init__(
        self, torture: Torture, run: Run, clusters: tuple[str, ...], rank: int, link: int, several: bool, forced: bool
    ) -> None:
        self.torture, self.run_, self.clusters, self.rank, self.link = torture, run, clusters, rank, link
        self.several, self.forced = several, forced
        self.noise = random.Random(f"{run.number} {clusters} {rank}")
        self.mover = Mover(Arena(8 * BLOCK, BLOCK), 1, 2, direct=self.noise.random() < 0.5)
        self.journal = writes.append(torture.journals / f"{clusters[0]}.{rank}")
        self.epoch: Epoch | None = None
        self.over = False

    def run(self, rewind: bool) -> None:
        """Save step after step until the process is killed, its peer is gone, or another run has taken over."""
        saves: list[threading.Thread] = []
        try:
            for attempt in self._lead(rewind) if self.rank == 0 else self._follow():
                before = saves[-1] if saves else None
                saves.append(threading.Thread(target=self._save, args=(attempt, before)))
                saves[-1].start()
                if len(saves) > IN_FLIGHT:
                    saves.pop(0).join()
                time.sleep(self.noise.random() * PAUSE_S)
                if self.over:
                    break
            for save in saves:
                save.join()
        except (EpochLost, FileNotFoundError):
            if not self._taken_over(self.epoch.number if self.epoch else 0):
                raise

    def _lead(self, rewind: bool) -> Iterator[Attempt]:
        output_dir = self.torture.output_dir
        self.epoch = claims.claim(
            output_dir,
            run_id="torture",
            clusters={cluster: CLUSTERS[cluster] for cluster in self.clusters},
            expected_clusters=CLUSTERS if self.several else None,
            take_over=self.forced,
        )
        known = listing.committed(output_dir)
        if not self.forced:
            check_start(output_dir, self.epoch.number, self.torture.found, alone=not self.several)
        self.run_.tell(started=self.epoch.number)
        told = known[-2] if rewind and len(known) > 1 else known[-1] if known else None
        step = (told.step or 0) if told else 0
        while True:
            step += 1
            with suppress(SaveFailed):  # the other world was here before, and has given it up
                attempt = attempts.begin(self.epoch, names.checkpoint(step), step=step, expected=CLUSTERS)
                try:
                    os.write(self.link, f"{attempt.epoch} {attempt.attempt} {step}\n".encode())
                except BrokenPipeError:
                    return
                yield attempt

    def _follow(self) -> Iterator[Attempt]:
        with os.fdopen(self.link) as lines:
            for line in lines:
                number, attempt, step = map(int, line.split())
                name = names.checkpoint(step)
                output_dir = self.torture.output_dir
                yield Attempt(output_dir, name, step, "torture", number, attempt, CLUSTERS, True, output_dir)

    def _save(self, attempt: Attempt, before: threading.Thread | None) -> None:
        try:
            votes = [self._write(attempt, cluster) for cluster in self.clusters]
            if before is not None:
                before.join()
            for vote in votes:
                ballot.cast(attempt, vote)
            outcome = settlement.settle(attempt, lead=self.rank == 0, timeout_s=TIMEOUT_S)
            word = "committed" if outcome.committed else "abandoned"
            os.write(self.journal, f"{attempt.epoch} {attempt.step} {attempt.attempt} {word}\n".encode())
            if outcome.committed and self.epoch is not None and "actor" in self.clusters:
                output_dir, upload_dir = self.torture.output_dir, self.torture.upload_dir
                retention.prune(output_dir, self.epoch, KEEP, [file_system.Copies(output_dir, upload_dir)])
        except Exception as problem:
            if self._taken_over(attempt.epoch):
                self.over = True
            elif not (isinstance(problem, SaveFailed) and "was abandoned" in str(problem)) and not _gone(attempt):
                self.run_.tell(problem=f"{attempt.label}: {type(problem).__name__}: {problem}")

    def _taken_over(self, number: int) -> bool:
        return epochs.newest_number(self.torture.output_dir) > number

    def _write(self, attempt: Attempt, cluster: str) -> Vote:
        writes.make_dirs(attempt.checkpoint_dir / cluster)
        path = f"{cluster}/shard_{self.rank}.bin"
        data = shard(attempt.step, self.run_.number, cluster, self.rank)
        image = HandMadeImage(len(data))
        image.add(0, extension.address_of(data)[0], len(data), lazy=True)
        transfer = self.mover.save(attempt.checkpoint_dir / path, image)
        receipts = []
        if self.rank == 0:
            note = f"{attempt.step} {self.run_.number}".encode()
            writes.write_durable(attempt.checkpoint_dir / cluster / "note.txt", note)
            receipts.append(records.receipt_of_bytes(f"{cluster}/note.txt", note))
        digest = transfer.wait_written()
        root = records.root_of(digest.nbytes, digest.block_bytes, digest.crcs)
        receipts.append(Receipt(path, digest.nbytes, digest.block_bytes, root))
        failpoints.failpoint("write.done", cluster=cluster, rank=self.rank, name=attempt.name)
        return Vote(cluster, self.rank, attempt.epoch, attempt.attempt, tuple(receipts))


def _gone(attempt: Attempt) -> bool:
    """Whether the attempt was abandoned while this rank still wrote."""
    return not tree.exists(attempt.directory)


def upload(torture: Torture) -> None:
    """Upload what is owed, for ever."""
    while True:
        for name in file_system.owed(torture.output_dir, torture.upload_dir):
            # Replaced or pruned meanwhile: it is not there, or not what it was.
            with suppress(NotFound, Damaged, FileNotFoundError, SaveFailed):
                file_system.upload(torture.output_dir / name, torture.upload_dir)
        time.sleep(PAUSE_S)


def shard(step: int | None, number: int, cluster: str, rank: int) -> bytes:
    """The bytes that this rank writes at this step of this run."""
    words = f"{step} {number} {cluster} {rank}"
    noise = random.Random(words)
    return f"{words}\n".encode() + noise.randbytes(noise.choice(SIZES))
