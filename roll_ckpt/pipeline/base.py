"""BasePipeline: when to save, in what order, and how to come back."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import errors, names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.disk import tree, writes
from roll_ckpt.errors import ConfigError, Damaged, NotFound, SaveFailed, Unreadable, UnsupportedError
from roll_ckpt.formats import manifests
from roll_ckpt.formats.image import FileImage
from roll_ckpt.formats.torch_zip.layout import Layouts
from roll_ckpt.load import trust
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.reader import open_reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.names import WORKER_STATE, rng_file, stateful_file
from roll_ckpt.pipeline.after_commit import AfterCommit
from roll_ckpt.pipeline.cluster import Cluster
from roll_ckpt.pipeline.worker_state import Stateful, WorkerState
from roll_ckpt.ranks.group import LONGEST_S, RankGroup
from roll_ckpt.ranks.rng import capture, restore
from roll_ckpt.save import arena, claims, pending
from roll_ckpt.save.begin import Request, SaveEstimate, begin
from roll_ckpt.save.cluster_save import ClusterSave
from roll_ckpt.save.save import Save
from roll_ckpt.transaction import listing
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.progress import ProgressBar
from roll_ckpt.upload.hub.pull import pull

log = logging.getLogger("roll_ckpt")


class BasePipeline:
    """Trains clusters and checkpoints them, and itself, as one: every rank holds one and makes the same calls.

    Subclass it, register the clusters, call `resume()`, and `do_checkpoint(step)` at the end of each step.
    The shape is that of ROLL's `roll/pipeline/base_pipeline.py`.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.state = WorkerState()
        self._async_save = config.async_save is not False
        self._clusters: dict[str, Cluster] = {}
        self._stateful: dict[str, Stateful] = {}
        self._world: RankGroup | None = None
        self._saves: list[Save] = []
        self._after_commit = AfterCommit(config)
        self._layouts = Layouts(trust.allowed(config))
        self._warned: dict[str, set[str]] = {}

    # --- set-up

    def set_checkpoint_clusters(self, *clusters: Cluster) -> None:
        """Register the models that are saved together; every rank calls, once. No collective.

        Raises:
            ConfigError: no cluster, a name twice, or one that `expected_clusters` does not expect.
            UnsupportedError: an engine that cannot be saved; the reason is in the message.
        """
        if self._clusters:
            raise ConfigError("set_checkpoint_clusters() was called before; give all clusters at once")
        if not clusters:
            raise ConfigError("set_checkpoint_clusters() needs at least one cluster")
        registered: dict[str, Cluster] = {}
        for cluster in clusters:
            if cluster.name in registered:
                raise ConfigError(f"cluster {cluster.name} is registered twice; names must differ")
            registered[cluster.name] = cluster
        self._world = RankGroup.current()
        self._check_expected(registered)
        for cluster in clusters:
            cluster.attach(self.config)
        self._clusters = registered
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        arena.warm(self.config, sum(cluster.estimate_bytes() for cluster in clusters), device)

    def register_stateful(self, name: str, component: Stateful) -> None:
        """Save and restore `component` on every rank with the pipeline; call it before `resume()`."""
        names.check_name("stateful component", name)
        if name in self._stateful:
            raise ConfigError(f"stateful component {name} is registered twice; names must differ")
        self._stateful[name] = component

    def _check_expected(self, clusters: dict[str, Cluster]) -> None:
        expected = self.config.expected_clusters
        if expected is None:
            return
        size = self._ranks.size
        for name in clusters:
            if expected.get(name) != size:
                raise ConfigError(
                    f"cluster {name} has {size} ranks, expected_clusters says {expected}; give every cluster of the "
                    "run with its world size, the same in each world's configuration"
                )

    @property
    def _ranks(self) -> RankGroup:
        if self._world is None:
            raise ConfigError("register the clusters first: set_checkpoint_clusters(...)")
        return self._world

    @property
    def _world_clusters(self) -> dict[str, int]:
        return {name: self._ranks.size for name in self._clusters}

    @property
    def _pipeline_dir(self) -> str:
        """Where this world's own state lies in the unit; each of several worlds has a folder of its own."""
        if self.config.expected_clusters is None:
            return names.PIPELINE
        return f"{names.PIPELINE}/{next(iter(self._clusters))}"

    # --- saving

    def do_checkpoint(self, global_step: int, is_last_step: bool | None = None) -> dict[str, Any]:
        """Save if the step is due; every rank calls at the end of every step, after the optimizer steps.

        Steps count from 0. It saves at positive multiples of `save_steps`, and at the last step
        (`max_steps - 1` unless `is_last_step` says), where it returns only when everything is durable and
        uploaded. Otherwise it returns as soon as training may go on; not durable on return.

        Returns:
            Metrics of this call, and of earlier saves as they become known: see `docs/metrics.md`.

        Raises:
            RanksDisagree, RunIsLive, EpochLost: on every rank, with nothing on disk touched.
            NoRoom, SaveFailed: the save could not begin, or was abandoned (at the last step, or with
                `async_save: false` or `fail_training: true`; NoRoom also at the first save); older checkpoints are
                sound.
        """
        last = global_step == self.config.max_steps - 1 if is_last_step is None else is_last_step
        self.state.step = global_step
        if self.state.log_history:
            self.state.log_history[-1]["system/step"] = global_step
        metrics: dict[str, Any] = {}
        self._add_ended(metrics)
        if (global_step > 0 and global_step % self.config.save_steps == 0) or last:
            metrics |= self._save(global_step, last)
        if self.state.log_history:
            self.state.log_history[-1].update(metrics)
        return metrics

    def _save(self, step: int, last: bool) -> dict[str, Any]:
        began = time.monotonic()
        upload = self.config.checkpoint_config
        uploaded = last or (upload is not None and not upload.async_upload)
        met = self._ranks.meetings
        save = self._begin(step, uploaded)
        metrics: dict[str, Any] = {}
        if not save.begun:
            self._after_commit.awaited.discard(save.attempt.name)
            self._saves.append(save)
            if uploaded or not self._async_save:
                save.wait()
            self._add_ended(metrics)
            return metrics
        problem: Exception | None = None
        with save.staging():
            first = next(iter(self._clusters.values()))
            for cluster in self._clusters.values():
                cluster.bind(save)
                try:
                    metrics |= cluster.do_checkpoint(global_step=step, is_last_step=last, blocking=False)
                except Exception as found:  # raised below: the other ranks go on to the next cluster
                    problem = problem or found
                metrics[f"time/{cluster.name}/do_checkpoint/host_collectives"] = self._ranks.meetings - met
                met = self._ranks.meetings
            if problem is None:
                self._stage_state(save.tickets[first.name])
            else:
                for ticket in save.tickets.values():
                    ticket.fail(problem)
        self._saves.append(save)
        if uploaded or not self._async_save:
            metrics[f"time/{first.name}/do_checkpoint/host_collectives"] += 1
            pending.wait_together(self._ranks, save, uploaded=uploaded)
            self._add_ended(metrics)
        if problem is not None:
            raise problem
        metrics["time/do_checkpoint/total"] = time.monotonic() - began
        return metrics

    def _begin(self, step: int, uploaded: bool) -> Save:
        request = Request(
            output_dir=self.config.output_dir,
            name=names.checkpoint(step),
            step=step,
            clusters=self._world_clusters,
            expected_clusters=self.config.expected_clusters,
        )
        shares: dict[str, SaveEstimate] = {}
        problem = None
        try:
            shares = {name: cluster.prepare(step) for name, cluster in self._clusters.items()}
        except Exception as found:
            problem = f"{type(found).__name__}: {found}"
        return begin(
            self._ranks,
            request,
            self.config,
            nbytes=sum(part.nbytes for part in shares.values()),
            plans={name: part.plan for name, part in shares.items()},
            problem=problem,
            on_commit=partial(self._after_commit, awaited=uploaded),
        )

    def _stage_state(self, ticket: ClusterSave) -> None:
        """Stage the pipeline's own files with the first cluster's; an error becomes this rank's no vote."""
        directory, rank = ticket.save.attempt.unit / self._pipeline_dir, self._ranks.rank
        try:
            writes.make_dirs(directory)
            states: dict[str, Any] = {rng_file(rank): capture()}
            for name, component in self._stateful.items():
                states[stateful_file(name, rank)] = component.state_dict()
            for file, state in states.items():
                image, unsafe = self._layouts.lay_out(file, state, Path(file).stem, lambda storage: False)
                trust.warn_unloadable(directory / file, unsafe, self._warned.setdefault(file, set()))
                ticket.stage(directory / file, image, overlap=False)
            if rank == 0:
                ticket.stage(directory / WORKER_STATE, FileImage.of_bytes(self.state.to_json()), overlap=False)
        except Exception as problem:
            ticket.fail(problem)

    def _add_ended(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of saves that ended since the last call, with the step that each belongs to.

        Several may have ended: `checkpoint/ended` lists one record for each, the plain keys are the newest's.
        """
        for save in [save for save in self._saves if save.settled]:
            if save.failure is None and not save.finished:
                continue
            self._saves.remove(save)
            record = self._record(save)
            metrics.setdefault("checkpoint/ended", []).append(record)
            metrics |= record
            if save.failure is not None and self.config.fail_training and not save.reported:
                save.reported = True
                raise save.failure
        while self._after_commit.late:
            record = self._after_commit.late.popleft()
            if metrics.get("checkpoint/step") in (None, record["checkpoint/step"]):
                metrics |= record
            metrics.setdefault("checkpoint/ended", []).append(record)
            if "checkpoint/failed" in record:
                metrics["checkpoint/failed"] = record["checkpoint/failed"]
                if self.config.fail_training:
                    raise SaveFailed(record["checkpoint/failed"])

    def _record(self, save: Save) -> dict[str, Any]:
        record: dict[str, Any] = {"checkpoint/step": save.attempt.step}
        record |= self._after_commit.report.pop(save.attempt.name, {})
        for ticket in save.tickets.values():
            prefix = f"time/{ticket.cluster}/do_checkpoint"
            record |= {
                f"{prefix}/step": save.attempt.step,
                f"{prefix}/fence": ticket.timing.fence_s,
                f"{prefix}/write": ticket.timing.write_s,
                f"{prefix}/commit": ticket.timing.commit_s,
                f"{prefix}/durable": save.durable_s,
                f"{prefix}/bytes": ticket.nbytes,
            }
        if save.failure is not None:
            record["checkpoint/failed"] = str(save.failure)
        return record

    # --- coming back

    def resume(self) -> int | None:
        """Restore clusters, state and RNG as `resume_from_checkpoint` says; every rank calls, once.

        True takes the newest complete and sound checkpoint and falls back past damaged ones, saying so.
        Blocks. Claims the output directory and finishes or discards what a killed run left there.

        Returns:
            The step of the checkpoint (the loop goes on at step + 1), or None: start at step 0.

        Raises:
            NotFound: the path holds no complete checkpoint, or not the registered clusters.
            HubRefused, HubUnavailable, NoRoom: it could not be pulled from the Hub.
            Damaged: the checkpoint that was asked for by path is damaged; its files are named.
            Unreadable: the disk does not tell whether a checkpoint is sound; nothing older is taken in its place.
            RanksDisagree: the ranks do not see one and the same checkpoint.
            UnsupportedError: another number of ranks saved it. On every rank, before anything changes.
            ModelMismatch: it holds another model. RunIsLive: another live run owns the output directory.
        """
        step = self._restore(*self._claim_and_list())
        if self._ranks.rank == 0 and _uploads(self._world_clusters, self.config.expected_clusters):
            self._after_commit.catch_up()
        return step

    def _restore(self, committed: list[str], refused: list[str], unread: Mapping[str, str]) -> int | None:
        """Resume as the configuration says; `refused` are checkpoints that cannot be taken, as far as is known, and
        `unread` those that could not be looked at, with the reason."""
        wanted, output_dir = self.config.resume_from_checkpoint, self.config.output_dir
        if wanted is False:
            return None
        if isinstance(wanted, str):
            return self._resume_from(self._pulled(Remote.parse(wanted)), only=True)
        if wanted is not True:
            return self._resume_from(self._agreed_path(wanted), only=True)
        for name in reversed(committed):
            _refuse_to_pass(unread, names.step_of(name) or 0)
            step = self._resume_from(output_dir / name, only=False)
            if step is not None:
                if refused:
                    log.warning("%s: resumed from %s; refused: %s", output_dir, name, ", ".join(refused))
                return step
            refused = [*refused, name]
        _refuse_to_pass(unread, 0)
        if refused:
            raise Damaged(
                f"{output_dir}: none of its checkpoints is sound ({', '.join(refused)}); see `roll-ckpt verify "
                f"{output_dir}`. To start anew set resume_from_checkpoint: false"
            )
        return None

    def _pulled(self, remote: Remote) -> Path:
        """Let rank 0 pull a checkpoint beside the output directory; its path on every rank. Blocks."""
        directory = Path(f"{os.path.abspath(self.config.output_dir)}{names.PULLED}")

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            bar = ProgressBar()

            def show(here: int, of: int) -> None:
                bar({"name": remote.uri, "doing": "pulled", "done": here, "total": of})

            try:
                return {"unit": str(pull(remote, directory, show))}
            finally:
                bar.end()

        return Path(self._ranks.agree({}, decide, LONGEST_S)["unit"])

    def _agreed_path(self, wanted: Path) -> Path:
        """The checkpoint that a path means to rank 0; on every rank."""

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            with as_unreadable(wanted):
                return {"unit": os.path.abspath(_checked_path(wanted, self.config.output_dir))}

        return Path(self._ranks.agree({}, decide, self.config.commit_timeout_s)["unit"])

    def _claim_and_list(self) -> tuple[list[str], list[str], dict[str, str]]:
        """The committed checkpoints, the oldest first, what else bears the name of one, and what of that could not be
        read, with the reason; the same on every rank."""

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            config = self.config
            claims.claim(config.output_dir, config, self._world_clusters, config.expected_clusters)
            unread = {}

            def report(problem: Damaged | Unreadable) -> None:
                log.warning("%s; this checkpoint is left out", problem)
                if isinstance(problem, Unreadable) and problem.unit is not None:
                    unread[problem.unit.name] = str(problem)

            with as_unreadable(config.output_dir):
                committed = [found.name for found in listing.committed(config.output_dir, report)]
                others = [entry for entry in tree.list_dir(config.output_dir) if entry not in committed]
            return {"committed": committed, "others": others, "unread": unread}

        found = self._ranks.agree({}, decide, self.config.commit_timeout_s)
        committed, others = (
            [name for name in found[kind] if names.step_of(name) is not None] for kind in ("committed", "others")
        )
        return committed, others, found["unread"]

    def _resume_from(self, unit: Path, only: bool) -> int | None:
        with ExitStack() as stack:
            try:
                reader = stack.enter_context(open_together(self._ranks, unit, self.config))
                if reader.unit is None:
                    raise NotFound(f"{unit}: no checkpoint of roll_ckpt is there")
                check_bytes(self._ranks, unit)
            except Damaged as problem:
                if only:
                    raise
                log.error("%s. Falling back to the checkpoint before it.", problem)
                return None
            for cluster in self._clusters.values():
                self._ranks.together(partial(cluster.check, unit), self.config.commit_timeout_s)
            self._ranks.together(partial(self._check_state, unit), self.config.commit_timeout_s)
            for cluster in self._clusters.values():
                cluster.load(unit, reader.unit.manifest.name)
            self._restore_state(unit)
        if unit.parent.resolve() == self.config.output_dir.resolve():
            self._after_commit.resumed_from = unit.name
        return self.state.step

    def _check_state(self, unit: Path) -> None:
        """Raise unless `unit` holds this rank's part of the pipeline's own state. No collective."""
        directory, rank, size = unit / self._pipeline_dir, self._ranks.rank, self._ranks.size
        voters = [names.parse_vote_file(vote) for vote in manifests.read(unit).votes]
        for name in self._clusters:
            saved = sum(voter is not None and voter[0] == name for voter in voters)
            if saved != size:
                raise UnsupportedError(
                    f"{unit}: {saved} ranks saved cluster {name}, and this job has {size}; a pipeline resumes on as "
                    f"many ranks as saved it. Start it on {saved} ranks"
                )
        for path in (directory / WORKER_STATE, directory / rng_file(rank)):
            if not tree.exists(path):
                raise NotFound(f"{path}: the checkpoint holds no state of this pipeline for rank {rank}")
        for name in self._stateful:
            path = directory / stateful_file(name, rank)
            if not tree.exists(path):
                raise NotFound(
                    f"{path}: the checkpoint holds no state of {name!r} for rank {rank}; it was saved before the "
                    "component was registered"
                )

    def _restore_state(self, unit: Path) -> None:
        directory, rank = unit / self._pipeline_dir, self._ranks.rank
        with open_reader(unit, self.config) as reader:
            for name, component in self._stateful.items():
                component.load_state_dict(reader.load(directory / stateful_file(name, rank), "cpu"))
            path = directory / WORKER_STATE
            self.state = WorkerState.from_json(reader.read_bytes(path), path)
            path = directory / rng_file(rank)
            self._restore_rng(reader.load(path, "cpu"), path)

    def _restore_rng(self, state: dict[str, Any], where: Path) -> None:
        restore(state, where)


def _uploads(clusters: Collection[str], expected: Collection[str] | None) -> bool:
    """Whether this world uploads and prunes for the run: the one whose cluster comes first does."""
    return expected is None or min(expected) in clusters


def _refuse_to_pass(unread: Mapping[str, str], step: int) -> None:
    """Raise if a checkpoint that could not be read is as new as `step`, or newer."""
    newer = [why for name, why in unread.items() if (found := names.step_of(name)) is not None and found >= step]
    if newer:
        raise Unreadable(f"{'; '.join(newer)}. {errors.BY_HAND}")


def _checked_path(path: Path, output_dir: Path) -> Path:
    for candidate in (path, output_dir / path):
        if tree.exists(candidate / names.MANIFEST):
            return candidate
    raise NotFound(
        f"resume_from_checkpoint: {path} holds no complete checkpoint (no {names.MANIFEST} in it); give a committed "
        f"checkpoint-N directory; `roll-ckpt ls {output_dir}` lists them"
    )
