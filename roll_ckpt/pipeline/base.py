"""BasePipeline: when to save, in what order, and how to come back."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from roll_ckpt import names
from roll_ckpt.config import PipelineConfig
from roll_ckpt.errors import ConfigError, NotFound
from roll_ckpt.load.newest import newest_sound
from roll_ckpt.load.reader import Reader
from roll_ckpt.load.together import check_bytes, open_together
from roll_ckpt.pipeline import candidates
from roll_ckpt.pipeline.cluster import Cluster
from roll_ckpt.pipeline.metrics import add_ended
from roll_ckpt.pipeline.state_files import StateFiles
from roll_ckpt.pipeline.worker_state import Stateful, WorkerState
from roll_ckpt.ranks import rng
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import arena, pending
from roll_ckpt.save.begin import Request, SaveEstimate, begin
from roll_ckpt.save.save import Save
from roll_ckpt.upload.after_commit import AfterCommit, sends
from roll_ckpt.upload.hub.address import Remote


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
        self._state_files = StateFiles(config)
        self._group: RankGroup | None = None
        self._saves: list[Save] = []
        self._after_commit = AfterCommit(config)
        if config.checkpoint_config is not None:
            self._after_commit.send_to(config.checkpoint_config, config.output_dir)

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
        self._group = RankGroup.current()
        self._check_expected(registered)
        for cluster in clusters:
            cluster.attach(self.config)
        self._clusters = registered
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        arena.warm(self.config, sum(cluster.estimate_bytes() for cluster in clusters), device)

    def register_stateful(self, name: str, component: Stateful) -> None:
        """Save and restore `component` on every rank with the pipeline; call it before `resume()`."""
        self._state_files.register(name, component)

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
        if self._group is None:
            raise ConfigError("register the clusters first: set_checkpoint_clusters(...)")
        return self._group

    @property
    def _own_clusters(self) -> dict[str, int]:
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
        add_ended(metrics, self._saves, self._after_commit, fail_training=self.config.fail_training)
        if (global_step > 0 and global_step % self.config.save_steps == 0) or last:
            metrics |= self._save(global_step, last)
        if self.state.log_history:
            self.state.log_history[-1].update(metrics)
        return metrics

    def _save(self, step: int, last: bool) -> dict[str, Any]:
        began = time.monotonic()
        upload = self.config.checkpoint_config
        uploaded = last or (upload is not None and not upload.async_upload)
        met = self._ranks.rendezvous_count
        save = self._begin(step, uploaded)
        metrics: dict[str, Any] = {}
        if not save.begun:
            self._after_commit.awaited.discard(save.attempt.name)
            self._saves.append(save)
            if uploaded or not self._async_save:
                save.wait()
            add_ended(metrics, self._saves, self._after_commit, fail_training=self.config.fail_training)
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
                metrics[f"time/{cluster.name}/do_checkpoint/host_collectives"] = self._ranks.rendezvous_count - met
                met = self._ranks.rendezvous_count
            if problem is None:
                self._state_files.stage(
                    save.cluster_saves[first.name], self._pipeline_dir, self._ranks.rank, self.state
                )
            else:
                for cluster_save in save.cluster_saves.values():
                    cluster_save.fail(problem)
        self._saves.append(save)
        if uploaded or not self._async_save:
            metrics[f"time/{first.name}/do_checkpoint/host_collectives"] += 1
            pending.wait_on_all_ranks(self._ranks, save, uploaded=uploaded)
            add_ended(metrics, self._saves, self._after_commit, fail_training=self.config.fail_training)
        if problem is not None:
            raise problem
        metrics["time/do_checkpoint/total"] = time.monotonic() - began
        return metrics

    def _begin(self, step: int, uploaded: bool) -> Save:
        request = Request(
            output_dir=self.config.output_dir,
            name=names.checkpoint(step),
            step=step,
            clusters=self._own_clusters,
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
        listed = candidates.claim_and_list(self._ranks, self.config, self._own_clusters)
        step = self._resume_as_asked(listed)
        if self._ranks.rank == 0 and sends(self._own_clusters, self.config.expected_clusters):
            self._after_commit.catch_up(self.config.output_dir)
        return step

    def _resume_as_asked(self, listed: candidates.Candidates) -> int | None:
        wanted, output_dir = self.config.resume_from_checkpoint, self.config.output_dir
        if wanted is False:
            return None
        with ExitStack() as stack:
            if wanted is True:
                found = stack.enter_context(
                    newest_sound(
                        output_dir,
                        listed.newest_first(),
                        self._open_verified,
                        refused=listed.others,
                        advice=". To start anew set resume_from_checkpoint: false",
                    )
                )
                return None if found is None else self._restore(output_dir / found[0], found[1])
            if isinstance(wanted, str):
                path = candidates.pulled(self._ranks, self.config, Remote.parse(wanted))
            else:
                path = candidates.asked_for(self._ranks, self.config, wanted)
            return self._restore(path, self._open_verified(stack, path))

    def _open_verified(self, stack: ExitStack, checkpoint_dir: Path) -> Reader:
        reader = stack.enter_context(open_together(self._ranks, checkpoint_dir, self.config))
        if reader.checkpoint is None:
            raise NotFound(f"{checkpoint_dir}: no checkpoint of roll_ckpt is there")
        check_bytes(self._ranks, checkpoint_dir)
        return reader

    def _restore(self, checkpoint_dir: Path, reader: Reader) -> int:
        """Check that everything fits on every rank, then load the clusters, the state, and the random states last."""
        assert reader.checkpoint is not None
        ranks, timeout_s = self._ranks, self.config.commit_timeout_s
        for cluster in self._clusters.values():
            ranks.run_on_all_ranks(partial(cluster.check, checkpoint_dir), timeout_s)
        check_state = partial(self._state_files.check, checkpoint_dir, self._pipeline_dir, ranks, list(self._clusters))
        ranks.run_on_all_ranks(check_state, timeout_s)
        for cluster in self._clusters.values():
            cluster.load(checkpoint_dir, reader.checkpoint.manifest.name)
        self.state, random_states = self._state_files.load(reader, checkpoint_dir, self._pipeline_dir, ranks.rank)
        self._restore_rng(random_states, checkpoint_dir / self._pipeline_dir / names.rng_file(ranks.rank))
        if checkpoint_dir.parent.resolve() == self.config.output_dir.resolve():
            self._after_commit.resumed_from = checkpoint_dir.name
        return self.state.step

    def _restore_rng(self, state: dict[str, Any], where: Path) -> None:
        rng.restore_portable(state, where)
