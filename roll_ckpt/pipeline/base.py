"""BasePipeline: decides when to save, saves all clusters as one checkpoint, and resumes from the newest sound one."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.errors import ConfigError
from roll_ckpt.load.checkpoint import as_unreadable
from roll_ckpt.load.reader import Reader
from roll_ckpt.pipeline import candidates
from roll_ckpt.pipeline.cluster import Cluster
from roll_ckpt.pipeline.outcomes import Outcomes
from roll_ckpt.pipeline.staging import prepare_all, stage_all
from roll_ckpt.pipeline.state_files import Components, StateFiles, bytes_of
from roll_ckpt.pipeline.worker_state import Stateful, WorkerState
from roll_ckpt.ranks import rng
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, gate, pending
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.course import Course
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit, sends


class BasePipeline:
    """Checkpoints several clusters and the pipeline's own state as one. Every rank makes one and makes the same calls.

    Subclass it or use it as it is: register the clusters, call `resume()` once, and `do_checkpoint(step)` at the end of
    each step. Use it from the training thread only.

    `state` is saved with each checkpoint; `do_checkpoint` sets `state.step`, and `resume` replaces `state`. The
    interface follows ROLL's `roll/pipeline/base_pipeline.py`.

    Raises:
        ConfigError: a destination in `config` is not valid.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.state = WorkerState()
        self._async_save = config.async_save is not False
        self._clusters: dict[str, Cluster] = {}
        self._state_files = StateFiles(config)
        self._group: RankGroup | None = None
        self._saves: list[Save] = []
        self._has_staged = False
        self._course = Course()
        self._after_commit = AfterCommit(config, self._course)
        self._outcomes = Outcomes(self._saves, self._after_commit, config.fail_training)
        if config.checkpoint_config is not None:
            self._after_commit.send_to(config.checkpoint_config, config.output_dir)

    # --- set-up

    def set_checkpoint_clusters(self, *clusters: Cluster) -> None:
        """Register all clusters that are saved together. Every rank calls, once, in the same order.

        No collective; does not block, except that memory for staging is prepared in the background. Nothing is written.

        Raises:
            ConfigError: no cluster is given, a name is given twice, clusters are registered already, or
                `expected_clusters` expects others.
            UnsupportedError: a model cannot be saved; the message gives the reason.
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
        self._group = RankGroup.current()
        _check_expected(self.config, registered, self._group.size)
        for cluster in clusters:
            cluster.attach(self.config)
        self._clusters = registered
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        arena.warm(self.config, sum(cluster.estimate_bytes() for cluster in clusters), device)

    def register_stateful(self, name: str, component: Stateful) -> None:
        """Save and restore `component` together with the pipeline. Every rank calls, before `resume()`; does not block.

        Each rank saves the state of its own object, in a file of its own.

        Args:
            name: part of that file's name in the checkpoint; the same on every rank and in every run.
            component: an object with `state_dict()` and `load_state_dict(state)`.

        Raises:
            ConfigError: `name` cannot be part of a file name, or is registered already.
        """
        self._state_files.register(name, component)

    @property
    def _ranks(self) -> RankGroup:
        if self._group is None:
            raise ConfigError("register the clusters first: set_checkpoint_clusters(...)")
        return self._group

    @property
    def _own_clusters(self) -> dict[str, int]:
        return {name: self._ranks.size for name in self._clusters}

    @property
    def _pipeline_dir(self) -> str:
        """The folder of this pipeline's own files in a checkpoint. Of several jobs, each has a folder of its own."""
        if self.config.expected_clusters is None:
            return names.PIPELINE
        return f"{names.PIPELINE}/{next(iter(self._clusters))}"

    # --- saving

    def do_checkpoint(self, global_step: int, is_last_step: bool | None = None) -> dict[str, Any]:
        """Save a checkpoint if one is due. Every rank calls at the end of every step, after the optimizer steps.

        A save is due at positive multiples of `save_steps` and at the last step; steps count from 0. Otherwise the call
        only collects metrics and does not block.

        A due save blocks until training may go on: everything except the tensors that only the optimizer changes has
        then been copied. It is not durable on return; the next optimizer step waits for the copies that are left. At
        the last step, and with `async_save: false`, it returns when the checkpoint is committed and durable; at the
        last step, and with `async_upload: false`, when it is uploaded as well.

        Args:
            global_step: the step that has just ended.
            is_last_step: whether it is the last one; None: whether it is `max_steps - 1`.

        Returns:
            Metrics of this call on this rank, and of earlier saves that have ended since: see `docs/metrics.md`.

        Raises:
            RanksDisagree, RunIsLive, EpochLost: on every rank, before anything is written.
            SaveFailed: on every rank, before anything is written, if a `client_state` or a component of any rank
                raises or cannot be saved.
            NoRoom, SaveFailed: on every rank, if the first save of the run cannot begin or cannot be staged. A later
                save raises them only if the call waits for its outcome; else they are logged, and reported in
                `checkpoint/failed`. With `fail_training: true` the next due save raises them on every rank, or before
                it the next optimizer step.
            Exception: what a framework raises while staging, on that rank; the others then raise SaveFailed. The save
                is abandoned on every rank.

        Whatever is raised, checkpoints that were committed before are sound.
        """
        last = global_step == self.config.max_steps - 1 if is_last_step is None else is_last_step
        self.state.step = global_step
        self.state.log({"system/step": global_step})
        metrics = self._outcomes.ended()
        if (global_step > 0 and global_step % self.config.save_steps == 0) or last:
            with _entered(self._ranks, f"save {names.checkpoint(global_step)} to", self.config):
                save = self._begin_and_stage(global_step, last, metrics)
            if not save.begun:
                self._outcomes.of_not_begun(save, metrics, waits=self._waits(last))
            elif self._waits(last):
                wait = partial(self._outcomes.wait, save, metrics, uploaded=last or self._uploads_now)
                pending.meet_after(self._ranks, save, wait)
        self.state.log(metrics)
        return metrics

    def _waits(self, last: bool) -> bool:
        return last or self._uploads_now or not self._async_save

    @property
    def _uploads_now(self) -> bool:
        upload = self.config.checkpoint_config
        return upload is not None and not upload.async_upload

    def _begin_and_stage(self, step: int, last: bool, metrics: dict[str, Any]) -> Save:
        began, counted = time.monotonic(), self._ranks.rendezvous_count
        save, components = self._begin(step, last or self._uploads_now)
        self._saves.append(save)
        if not save.begun:
            return save
        own = partial(self._state_files.stage, self._pipeline_dir, self._ranks.rank, self.state, components)
        with pending.staging(self._ranks, save, first=not self._has_staged):
            metrics |= stage_all(save, self._clusters, own, self._ranks, step=step, last=last, counted=counted)
        self._has_staged = True
        first = f"time/{next(iter(self._clusters))}/do_checkpoint/host_collectives"
        metrics[first] += 2 if self._waits(last) else 1
        metrics["time/do_checkpoint/total"] = time.monotonic() - began
        return save

    def _begin(self, step: int, uploaded: bool) -> tuple[Save, Components]:
        """Agree on a save; the components are laid out before it, since what cannot be saved must not begin one."""
        request = Request(
            output_dir=self.config.output_dir,
            name=names.checkpoint(step),
            step=step,
            clusters=self._own_clusters,
            course=self._course,
            expected_clusters=self.config.expected_clusters,
        )
        estimates, components, problem = prepare_all(
            self._clusters, self._state_files, step, self._ranks.rank, self._outcomes.raise_failure
        )
        save = begin(
            self._ranks,
            request,
            self.config,
            nbytes=sum(estimate.nbytes for estimate in estimates.values()) + bytes_of(components),
            plans={name: estimate.plan for name, estimate in estimates.items()},
            problem=problem,
            on_commit=partial(self._after_commit, awaited=uploaded),
        )
        return save, components

    # --- resuming

    def resume(self) -> int | None:
        """Restore clusters, components, `state` and random states as the setting `resume_from_checkpoint` says.

        Every rank calls, once, after registering clusters and components and before the first `do_checkpoint`. Blocks
        while every byte of the checkpoint is verified and loaded. Also claims the output directory for this run, and
        finishes or discards the saves that a killed run left unfinished there.

        `resume_from_checkpoint: true` takes the newest sound checkpoint; damaged ones are logged and passed over. All
        checks run on every rank before the first tensor changes.

        Returns:
            The step of the checkpoint (go on at step + 1), or None if there is none to resume from (start at step 0).

        Raises, on every rank:
            ConfigError, UnsupportedError: nothing can be uploaded to `checkpoint_config`; nothing was written.
            RunIsLive: another live run owns the output directory.
            NotFound: the path holds no complete checkpoint, or lacks a registered cluster or component.
            HubRefused, HubUnavailable, NoRoom: the checkpoint could not be pulled from the Hub.
            Damaged: the checkpoint that was named is damaged, or all are; damaged files are named.
            Unreadable: the disk does not tell whether a checkpoint is sound; no older one is taken in its place.
            RanksDisagree: the ranks do not see the same checkpoint.
            UnsupportedError: it was saved on another number of ranks, or holds objects that a safe load refuses.
            ModelMismatch: it holds another model, or one of another framework.
        """
        uploads = self._ranks.rank == 0 and sends(self._own_clusters, self.config.expected_clusters)
        with _entered(self._ranks, "resume from", self.config):
            if self.config.checkpoint_config is not None:
                check = self._after_commit.check if uploads else lambda: None
                self._ranks.run_on_all_ranks(check, self.config.commit_timeout_s)
            listed = candidates.claim_and_list(self._ranks, self.config, self._own_clusters)
            with candidates.open_chosen(self._ranks, self.config, listed) as chosen:
                step = None if chosen is None else self._restore(*chosen)
        if uploads:
            self._after_commit.catch_up(self.config.output_dir)
        return step

    def _restore(self, checkpoint_dir: Path, reader: Reader) -> int:
        """Check on every rank that all of it can be loaded; then load clusters, state, and last the random states."""
        assert reader.checkpoint is not None
        ranks, timeout_s = self._ranks, self.config.commit_timeout_s
        for cluster in self._clusters.values():
            ranks.run_on_all_ranks(partial(cluster.check, checkpoint_dir), timeout_s)
        check_state = partial(self._state_files.check, checkpoint_dir, self._pipeline_dir, ranks, list(self._clusters))
        ranks.run_on_all_ranks(check_state, timeout_s)
        states: list[Any] = []

        def read_states() -> None:
            with as_unreadable(checkpoint_dir):
                states.extend(self._state_files.read(reader, checkpoint_dir, self._pipeline_dir, ranks.rank))

        ranks.run_on_all_ranks(read_states, timeout_s, working=True)
        for cluster in self._clusters.values():
            cluster.load(checkpoint_dir, reader.checkpoint.manifest.name)
        self.state, random_states, components = states
        self._state_files.load(components)
        self._restore_rng(random_states, checkpoint_dir / self._pipeline_dir / names.rng_file(ranks.rank))
        if checkpoint_dir.parent.resolve() == self.config.output_dir.resolve():
            self._after_commit.resumed_from = checkpoint_dir.name
            self._course.resumed(reader.checkpoint.manifest)
        return self.state.step

    def _restore_rng(self, state: dict[str, Any], where: Path) -> None:
        rng.restore_portable(state, where)


def _check_expected(config: PipelineConfig, clusters: dict[str, Cluster], size: int) -> None:
    expected = config.expected_clusters
    for name in () if expected is None else clusters:
        if (expected or {}).get(name) != size:
            raise ConfigError(
                f"cluster {name} has {size} ranks, expected_clusters says {expected}; give every cluster of the "
                "run with its number of ranks, the same in the configuration of every job"
            )


def _entered(ranks: RankGroup, what: str, config: PipelineConfig) -> AbstractContextManager[None]:
    return gate.entered(ranks, f"{what} {os.path.abspath(config.output_dir)}", config.commit_timeout_s)
