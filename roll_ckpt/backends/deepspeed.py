"""The DeepSpeed backend: `engine.save_checkpoint()` and its kin go through us.

`install()` wraps methods of `DeepSpeedEngine`. An engine whose config has `checkpoint.roll_ckpt`, or that a
`Cluster` attached, gets our `CheckpointEngine`; every other engine behaves as before. Stock code still decides
what a checkpoint holds and how its files are called; we decide where they go (an attempt directory that is
renamed into place when all ranks have voted), how their bytes get there, and when `latest` is written.

Written against DeepSpeed 0.19 (`runtime/engine.py`, `runtime/checkpoint_engine/checkpoint_engine.py`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import DummyOptim
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import tensor_fragment
from deepspeed.utils.tensor_fragment import fragment_address

from roll_ckpt import commit, disk, errors, loader, names, retention, saver
from roll_ckpt.config import DeepSpeedConfig, Settings
from roll_ckpt.image import FileImage, Until
from roll_ckpt.layout import torch_zip
from roll_ckpt.world import World

log = logging.getLogger("roll_ckpt")

SECTION = "checkpoint.roll_ckpt in the DeepSpeed config"
FRAMEWORK = "deepspeed"

_OFFLOAD_BUFFER = "_offload_buffer"

ALLOWED_GLOBALS = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
"""What DeepSpeed's own files hold beyond torch's `weights_only` list."""


class RollCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """What a `DeepSpeedEngine` calls to save and load files; one for each engine.

    `is_decoupled` is true and `get_commit_info` None, so stock code neither writes `latest` nor commits: both
    happen in our transaction. Its methods never raise between stock code's barriers; an error becomes a no
    vote, which every rank sees.
    """

    def __init__(self, engine: DeepSpeedEngine, settings: Settings, cluster: str) -> None:
        super().__init__()
        self.name = "roll_ckpt"
        self.settings = settings
        self.cluster = cluster
        self.world = World.current()
        self._engine = weakref.ref(engine)
        self._ticket: saver.Ticket | None = None
        self._stable: frozenset[int] = frozenset()
        self._leased: frozenset[int] = frozenset()
        self._reader: loader.Reader | None = None
        self._saves: list[saver.Save] = []
        self._loose_problem: str | None = None
        self._warned: set[str] = set()
        self._allowed = [*ALLOWED_GLOBALS, *loader.allowed(settings)]
        self._layouts = torch_zip.Layouts(self._allowed)
        self.verified: Path | None = None
        """A checkpoint whose every byte all ranks have just read; loading from it reads it once."""

    @property
    def engine(self) -> DeepSpeedEngine:
        engine = self._engine()
        assert engine is not None, "the DeepSpeed engine of this checkpoint engine is gone"
        return engine

    # What DeepSpeed calls.

    def create(self, info: object) -> None:
        """Nothing to do: the attempt was begun before stock code ran."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._no_raise():
            disk.make_dirs(Path(path))

    def save(self, state_dict: object, path: str) -> None:
        """Lay out and stage one file. Outside of `save_checkpoint`: write it at once, durable on return."""
        with self._no_raise():
            # A file by itself may have another name each time: its layout is not kept.
            layouts = torch_zip.Layouts(self._allowed) if self._ticket is None else self._layouts
            image, unsafe = layouts.lay_out(Path(path).name, state_dict, Path(path).stem, self._until)
            loader.warn_unloadable(Path(path), unsafe, self._warned)
            if self._ticket is None:
                saver.write_file(Path(path), image, self.settings)
            else:
                self._ticket.stage(Path(path), image, overlap=bool(self._stable))

    def load(self, path: str, map_location: Any = None) -> Any:
        if self._reader is not None:
            return self._reader.load(Path(path), map_location)
        with loader.reading(Path(path).parent, self.settings, ALLOWED_GLOBALS) as reader:
            return reader.load(Path(path), map_location)

    def commit(self, info: object) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return True

    def get_commit_info(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return False

    def cleanup(self) -> None:
        self.fence()

    # What our wrappers call.

    def fence(self, changes: saver.Changes = lambda storage: True) -> None:
        """Wait until no save of this engine reads its tensors any more; not for the disk, but that those which were
        offloaded when it began and which `changes` are written.

        Raises:
            SaveFailed: an earlier save failed in the background and `fail_training` is set.
        """
        saver.wait_copied(self._saves, changes)

    def save_checkpoint(
        self,
        stock: Callable[..., Any],
        save_dir: str,
        tag: object = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """`engine.save_checkpoint` as one transaction on `save_dir/tag`; every rank calls.

        With `async_save` it returns once all but the stable tensors are copied, otherwise when committed. False: the
        disk refused before the first byte.
        """
        if not save_dir:
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        self.fence(_nothing)
        name = str(tag) if tag is not None else f"global_step{self.engine.global_steps}"
        request = saver.Request(
            Path(save_dir), name, self.engine.global_steps, {self.cluster: self.world.size}, None, save_latest
        )
        nbytes, problem = 0, None
        try:
            names.check_name("tag", name)
            nbytes = estimate_bytes(self.engine)
        except Exception as found:
            problem = str(found)
        save = saver.begin(self.world, request, self.settings, nbytes=nbytes, problem=problem, on_commit=self._prune)
        if not save.begun:
            self._saves.append(save)  # `fail_training` raises it at the next fence
            if not self.settings.async_save:
                save.wait()
            return False
        with save.staging():
            arguments = {
                "client_state": client_state or {},
                "save_latest": save_latest,
                "exclude_frozen_parameters": exclude_frozen_parameters,
            }
            self.run_stock(stock, save, save.attempt.directory, name, arguments)
        if not self.settings.async_save:
            saver.wait_together(self.world, save, uploaded=True)
        return True

    def run_stock(
        self, stock: Callable[..., Any], save: saver.Save, directory: Path, tag: str, arguments: dict[str, Any]
    ) -> saver.Ticket:
        """Let stock `save_checkpoint` write into `directory`, inside the attempt of `save`."""
        ticket = save.ticket(self.cluster, {})
        self._saves.append(save)
        try:
            with self._no_raise(ticket):
                ticket.facts |= describe(self.engine)
                ticket.parameters = parameters_of(self.engine)
                if self.settings.staging.overlap:
                    self._stable = stable_storages(self.engine)
                    self._leased = self._stable & offloaded_storages(self.engine)
                if self._leased:
                    get_accelerator().synchronize()  # offload_states(non_blocking=True) may still be copying there
            self._ticket = ticket
            stock(self.engine, str(directory), tag=tag, **arguments)
        finally:
            self._ticket = None
            self._stable = self._leased = frozenset()
        return ticket

    def save_16bit_model(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`engine.save_16bit_model`: blocks, durable on return; a failure is raised on every rank.

        Raises:
            UnsupportedError: rank 0 holds a part of the model only. Nothing was written.
        """
        refuse_parts(self.engine)
        self._loose_problem = None
        result = stock(self.engine, *args, **kwargs)

        def report() -> None:
            if self._loose_problem is not None:
                raise errors.SaveFailed(
                    f"save_16bit_model: rank {self.world.rank}: {self._loose_problem}; an older file is untouched"
                )

        self.world.together(report, self.settings.commit_timeout_s)
        return result

    def load_checkpoint(
        self, stock: Callable[..., Any], load_dir: str, tag: object = None, *args: Any, **kwargs: Any
    ) -> Any:
        """`engine.load_checkpoint`: waits for pending saves, checks the model and every byte.

        Without a tag it takes the one that `latest` names, or else the newest, and falls back past damaged ones to
        the newest sound one, saying so.

        Raises:
            Damaged: the tag that was asked for is damaged, or all are. Unreadable: the disk does not tell whether one
                is; nothing older is taken in its place. RanksDisagree: the ranks do not see one and the same
                checkpoint. On every rank, before anything is loaded.
        """
        self.fence()
        saver.wait_pending()
        if self.engine.load_universal_checkpoint():
            return stock(self.engine, load_dir, tag, *args, **kwargs)
        refused: list[str] = []
        for name in self._agree_on_tags(Path(load_dir), None if tag is None else str(tag)):
            told = inspect.signature(stock).bind(self.engine, load_dir, name, *args, **kwargs)
            told.apply_defaults()
            with ExitStack() as stack:
                try:
                    self._reader = self._open_checked(stack, Path(load_dir), told.arguments)
                except errors.Damaged as problem:
                    if tag is not None:
                        raise
                    log.error("%s. Falling back to the newest sound checkpoint.", problem)
                    refused.append(name)
                    continue
                if refused:
                    log.warning("%s: loading %s; refused: %s", load_dir, name, ", ".join(refused))
                try:
                    return stock(self.engine, load_dir, name, *args, **kwargs)
                finally:
                    self._reader = None
        if refused:
            raise errors.Damaged(
                f"{load_dir}: none of its checkpoints is sound ({', '.join(refused)}); see "
                f"`roll-ckpt verify {load_dir}`"
            )
        return stock(self.engine, load_dir, tag, *args, **kwargs)

    def _open_checked(self, stack: ExitStack, load_dir: Path, told: Mapping[str, Any]) -> loader.Reader:
        """A reader of the tag that `told` names, checked as far as it can be; open until `stack` is left."""
        directory = load_dir / told["tag"]
        reader = stack.enter_context(loader.reading_together(self.world, directory, self.settings, ALLOWED_GLOBALS))
        if reader.unit is not None:
            self._check_together(reader.unit, load_dir, told)
            reader.cached = True
        return reader

    def _agree_on_tags(self, load_dir: Path, tag: str | None) -> list[str]:
        """The tags to load, the one to try first first, the same on every rank; none where there is no such directory.
        What a killed run left there is finished or discarded first."""

        def decide(posts: list[dict[str, Any]]) -> dict[str, Any]:
            asked = {post["tag"] for post in posts}
            if len(asked) > 1:
                raise errors.RanksDisagree(f"{load_dir}: ranks ask to load different tags: {sorted(map(str, asked))}")
            saver.recover(load_dir, self.settings, {self.cluster: self.world.size})
            with loader.legible(load_dir):
                tags = tags_to_load(load_dir) if tag is None else [tag]
                patience = disk.Patience()
                return {"tags": [name for name in tags if patience.again(partial(disk.is_dir, load_dir / name))]}

        found: list[str] = self.world.agree({"tag": tag}, decide, self.settings.commit_timeout_s)["tags"]
        return found

    def _check_together(self, unit: loader.Unit, load_dir: Path, told: Mapping[str, Any]) -> None:
        """Refuse on every rank another model, another world's optimizer partitions, and damaged files."""
        clusters, where = unit.manifest.clusters, str(load_dir / told["tag"])
        cluster = load_dir.resolve().name if load_dir.resolve().name in clusters else next(iter(clusters))

        def check() -> None:
            resuming = told["load_optimizer_states"] and not told["load_module_only"]
            if resuming and self.engine.zero_optimization():
                check_world(clusters[cluster], self.world.size, where)
            if told["custom_load_fn"] is None:
                saved = unit.parameters(cluster, self.world.rank)
                loader.compare_models(saved, parameters_of(self.engine), where, strict=told["load_module_strict"])

        self.world.together(check, self.settings.commit_timeout_s)
        if self.verified != unit.directory:
            loader.check_bytes(self.world, unit.directory)

    def _prune(self, save: saver.Save) -> None:
        if save.lead and self.settings.max_ckpt_to_keep:
            output_dir = save.attempt.output_dir
            retention.prune(output_dir, saver.epoch_of(output_dir), keep=self.settings.max_ckpt_to_keep)

    @contextmanager
    def _no_raise(self, ticket: saver.Ticket | None = None) -> Iterator[None]:
        """Inside stock code's barriers: an error becomes a no vote, or what `save_16bit_model` reports."""
        try:
            yield
        except Exception as problem:
            ticket = ticket or self._ticket
            if ticket is not None:
                ticket.fail(problem)
            else:
                self._loose_problem = f"{type(problem).__name__}: {problem}"

    def _until(self, storage: torch.UntypedStorage) -> Until:
        if storage._cdata in self._leased:
            return Until.WRITTEN
        return Until.FENCE if storage._cdata in self._stable else Until.RETURN


# --- a cluster of a pipeline ---------------------------------------------------------------------------------

MODEL_ONLY_FILE = "pytorch_model.bin"


class Engine:
    """A `DeepSpeedEngine` as a cluster of a pipeline: see `cluster.Backend`.

    Raises:
        ConfigError: the engine's own `checkpoint.roll_ckpt` contradicts `settings`.
        UnsupportedError: the engine uses what is refused by name.
    """

    framework = FRAMEWORK

    def __init__(
        self,
        engine: DeepSpeedEngine,
        settings: Settings,
        cluster: str,
        *,
        save_only_model: bool,
        exclude_frozen_parameters: bool,
    ) -> None:
        if not isinstance(engine, DeepSpeedEngine):
            raise errors.ConfigError(
                f"cluster {cluster}: trained is {type(engine).__name__}; give a DeepSpeedEngine, or a MegatronModel"
            )
        _check_section(engine, settings, cluster)
        if save_only_model:
            refuse_parts(engine)
        self._engine = engine
        self._cluster = cluster
        self._save_only_model = save_only_model
        self._exclude_frozen = exclude_frozen_parameters
        self._client_state: Mapping[str, Any] = {}
        self._ours = attach(engine, settings, cluster)
        self.world = self._ours.world

    def estimate_bytes(self) -> int:
        return estimate_bytes(self._engine)

    def prepare(self, step: int, client_state: Mapping[str, Any]) -> saver.Share:
        self._client_state = client_state
        return saver.Share(self.estimate_bytes())

    def fence(self) -> None:
        self._ours.fence()

    def stage(self, save: saver.Save, directory: Path) -> saver.Ticket:
        arguments: dict[str, Any] = {"exclude_frozen_parameters": self._exclude_frozen}
        if self._save_only_model:
            ticket = self._ours.run_stock(self._stock_model_only, save, directory, MODEL_ONLY_FILE, arguments)
        else:
            name = save.attempt.name
            arguments |= {"client_state": self._client_state, "save_latest": False}
            ticket = self._ours.run_stock(stock("save_checkpoint"), save, directory, name, arguments)
        if ticket.rank == 0:
            self._add_stock_files(ticket, directory)
        return ticket

    def _stock_model_only(self, engine: Any, save_dir: str, tag: str, **kwargs: Any) -> None:
        if not stock("save_16bit_model")(engine, save_dir, tag, **kwargs):
            raise errors.UnsupportedError(
                f"cluster {self._cluster}: save_only_model under ZeRO-3 needs "
                "stage3_gather_16bit_weights_on_model_save in the DeepSpeed config"
            )

    def _add_stock_files(self, ticket: saver.Ticket, directory: Path) -> None:
        """Count the scripts that stock code writes beside the tag, and write `latest` as it would."""
        name = ticket.save.attempt.name
        try:
            for path in disk.walk(directory):
                if path.partition("/")[0] != name and path != MODEL_ONLY_FILE:
                    ticket.adopt(directory / path)
            if not self._save_only_model:
                ticket.stage(directory / names.LATEST, FileImage.of_bytes(name.encode()), overlap=False)
        except Exception as problem:
            ticket.fail(problem)

    def check(self, opened: loader.Unit, where: str) -> None:
        check_world(opened.manifest.clusters[self._cluster], self.world.size, where)
        saved = opened.parameters(self._cluster, self.world.rank)
        loader.compare_models(saved, parameters_of(self._engine), where)

    def load(self, unit: Path, name: str) -> Mapping[str, Any]:
        self._ours.verified = unit
        try:
            path, client_state = self._engine.load_checkpoint(str(unit / self._cluster), tag=name)
        finally:
            self._ours.verified = None
        if path is None:
            raise errors.NotFound(f"{unit / self._cluster}: DeepSpeed found nothing to load for it")
        return dict(client_state)


def _check_section(engine: DeepSpeedEngine, settings: Settings, cluster: str) -> None:
    own = section_of(engine)
    for key in sorted(own.model_fields_set) if own is not None else ():
        wanted = cluster if key == "cluster" else getattr(settings, key)
        if getattr(own, key) != wanted:
            raise errors.ConfigError(
                f"cluster {cluster}: {SECTION} sets {key} to {getattr(own, key)!r}, the pipeline's configuration to "
                f"{wanted!r}; remove one of them"
            )


# --- what we read off an engine ------------------------------------------------------------------------------


def describe(engine: DeepSpeedEngine) -> dict[str, Any]:
    """Facts for the manifest: framework, stage, precision and parallel sizes."""
    return {
        "framework": FRAMEWORK,
        "framework_version": deepspeed.__version__,
        "zero_stage": int(engine.zero_optimization_stage()),
        "dtype": str(engine.get_data_types()[0]).removeprefix("torch."),
        "dp_world_size": engine.seq_dp_world_size,
        "mp_world_size": engine.mp_world_size,
        "global_steps": engine.global_steps,
    }


def parameters_of(engine: DeepSpeedEngine) -> dict[str, dict[str, Any]]:
    """Name, dtype and global shape of every parameter of the engine's module on this rank."""
    return {
        name: {
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "shape": list(getattr(parameter, "ds_shape", parameter.shape)),
        }
        for name, parameter in engine.module.named_parameters()
    }


def _base_optimizer(engine: DeepSpeedEngine) -> Any:
    """The torch optimizer under DeepSpeed's wrapper; without one a `DummyOptim`, None or an offload hook."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _optimizer_tensors(engine: DeepSpeedEngine, *, offload_buffers: bool = True) -> Iterator[torch.Tensor]:
    """The flat partitions (or plain parameters) that the optimizer owns, and its state for them."""
    base = _base_optimizer(engine)
    for group in base.param_groups:
        yield from (parameter.data for parameter in group["params"])
    for state in base.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and (offload_buffers or not key.endswith(_OFFLOAD_BUFFER)):
                yield value
    # ZeRO-3 leaves its flat partitions in the base optimizer only while that steps.
    yield from getattr(engine.optimizer, "fp32_partitioned_groups_flat", ())


def _optimized_parameters(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """The module's parameters that this engine's optimizer writes; frozen ones and others' are not among them."""
    for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
        for group in getattr(engine.optimizer, name, ()):
            yield from (parameter for parameter in group if parameter.requires_grad)


def overlappable(engine: DeepSpeedEngine) -> bool:
    """Whether the engine's state changes in the optimizer step alone, so that copies may run until then.

    A hybrid engine fuses LoRA weights to generate; PEFT merges them, and AdaLoRA masks them: between two steps.
    """
    adapted = any(hasattr(module, "peft_config") for module in engine.module.modules())
    return not (isinstance(engine, DeepSpeedHybridEngine) or adapted)


def stable_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages that only the optimizer step changes: flat partitions, their state, plain parameters."""
    if not overlappable(engine):
        return frozenset()
    tensors = list(_optimizer_tensors(engine))
    if engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [parameter.data for parameter in _optimized_parameters(engine)]
    return _storages(tensors)


def offloaded_storages(engine: DeepSpeedEngine) -> frozenset[int]:
    """Storages of the optimizer that `offload_states` has left on the host.

    They stay as they are until it is called again; none where that cannot be known. Where the host is the device
    `reload_states` moves nothing, and the next step writes to them. Counters are on the host at all times, and are
    not among them.
    """
    if not getattr(engine.optimizer, "offloaded_states", None):
        return frozenset()
    if any("offload_states" in vars(owner) for owner in (engine, engine.optimizer)):
        return frozenset()  # somebody's own, which would not wait before it overwrites them
    if os.environ.get("DS_PIN_MEMORY_BACKEND", "").strip().lower() == "native":
        return frozenset()  # such memory is freed when DeepSpeed drops the tensor, whoever holds its storage
    return _storages(t for t in _stepped_tensors(engine) if t.device.type == "cpu" and t.dim() > 0)


def _stepped_tensors(engine: DeepSpeedEngine) -> Iterator[torch.Tensor]:
    """What the optimizer step writes; ZeRO-3's host buffers that wait for the next offload are not among it."""
    yield from _optimizer_tensors(engine, offload_buffers=False)
    yield from (parameter.data for parameter in _optimized_parameters(engine))


def _storages(tensors: Iterable[torch.Tensor]) -> frozenset[int]:
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


def check_world(saved: Mapping[str, Any], world_size: int, where: str) -> None:
    """Refuse to resume on another number of ranks than saved; `saved` are the cluster's facts in the manifest.

    Raises:
        UnsupportedError: names both sizes. Nothing was loaded.
    """
    if saved["world_size"] != world_size:
        raise errors.UnsupportedError(
            f"{where} was saved by {saved['world_size']} ranks and this job has {world_size}; this version resumes on "
            "the same number of ranks only. Start that many, or convert it with DeepSpeed's ds_to_universal"
        )


def estimate_bytes(engine: DeepSpeedEngine) -> int:
    """About what this rank will write, in bytes."""
    tensors = []
    if engine.save_zero_checkpoint or engine.save_non_zero_checkpoint:
        tensors += list(_optimizer_tensors(engine))
    if engine.save_non_zero_checkpoint and engine.zero_optimization_stage() < ZeroStageEnum.weights:
        tensors += [*engine.module.parameters(), *engine.module.buffers()]
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def tags_to_load(load_dir: Path) -> list[str]:
    """The tags of a plain DeepSpeed directory in the order in which a load tries them when none is given.

    A directory that `latest` names wins, because users edit it; then our committed ones, the newest first.

    Raises:
        Damaged: there are checkpoints of ours, and none has a manifest that can be trusted.
        Unreadable: `latest` names none, and the disk does not tell which is the newest.
    """
    latest = load_dir / names.LATEST
    try:
        named = (disk.Patience().again(partial(disk.read_text_or_none, latest)) or "").strip()
    except errors.Damaged as problem:
        log.warning("%s; the newest checkpoint is loaded", problem)
        named = ""
    chosen = [named] if named and _is_tag(named) and disk.is_dir(load_dir / named) else []
    try:
        tags = [found.name for found in commit.newest_first(load_dir) if found.name not in chosen]
    except (errors.Damaged, errors.Unreadable) as problem:
        if not chosen:
            raise
        log.warning("%s", problem)
        tags = []
    if tags and named and not chosen:
        log.warning("%s names %s, which is not there; loading %s", latest, named, tags[0])
    return chosen + tags


def _is_tag(name: str) -> bool:
    try:
        return bool(names.check_name("tag", name))
    except errors.ConfigError:
        return False


# --- refusals ------------------------------------------------------------------------------------------------


def refuse_unsupported(engine: DeepSpeedEngine) -> None:
    """Raise for what this version does not support, by name and with the reason.

    Raises:
        UnsupportedError
    """
    _refuse({**_refusals_of_config(engine), **_refusals_of_engine(engine)})


def _refuse(refusals: dict[str, tuple[bool, str]]) -> None:
    for name, (found, reason) in refusals.items():
        if found:
            raise errors.UnsupportedError(f"roll_ckpt does not support {name} in this version: {reason}")


def refuse_parts(engine: DeepSpeedEngine) -> None:
    """Raise if `save_16bit_model` would write a part of the model as if it were the model.

    Raises:
        UnsupportedError
    """
    experts = engine.expert_parallel_group.values() if engine.has_moe_layers else ()
    for name, parted in {
        "a PipelineModule": isinstance(engine, PipelineEngine),
        "experts on several ranks": any(dist.get_world_size(group) > 1 for group in experts),
        "AutoTP below ZeRO-3": engine.autotp_size() > 1 and engine.zero_optimization_stage() < ZeroStageEnum.weights,
    }.items():
        if parted:
            raise errors.UnsupportedError(
                f"save_16bit_model and save_only_model do not support {name}: DeepSpeed gathers nothing there and "
                "would write what rank 0 holds alone. Save a whole checkpoint"
            )


def refuse_rivals(engine: DeepSpeedEngine) -> None:
    """Raise if the config also asks for another checkpoint engine.

    Raises:
        ConfigError: names both keys.
    """
    values = engine._config._param_dict
    for key, present in {
        "checkpoint.writer": bool((values.get("checkpoint") or {}).get("writer")),
        "datastates_ckpt": "datastates_ckpt" in values,
    }.items():
        if present:
            raise errors.ConfigError(
                f"the DeepSpeed config sets both {key} and checkpoint.roll_ckpt; each replaces the checkpoint "
                "engine, remove one"
            )


def _refusals_of_config(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    """What can be told before the engine has an optimizer, groups or swap files."""
    zero = engine._config.zero_config
    offloads = [zero.offload_optimizer, zero.offload_param]
    return {
        "NVMe offload": (
            any(offload is not None and offload.device == "nvme" for offload in offloads),
            "the state lies in swap files, which DeepSpeed copies past the checkpoint engine: no digest and no vote "
            "would cover them. Offload to the CPU instead",
        ),
        "offload_optimizer.ratio below 1 (Twin-Flow)": (
            zero.stage == ZeroStageEnum.weights
            and zero.offload_optimizer is not None
            and zero.offload_optimizer.device != "none"
            and zero.offload_optimizer.ratio < 1,
            "the moments of the part that stays on the GPU are not in DeepSpeed's checkpoint",
        ),
        "zero_quantized_nontrainable_weights": (
            zero.zero_quantized_nontrainable_weights,
            "DeepSpeed's checkpoint holds the frozen weights as 8-bit integers without their scales",
        ),
        "ZeRO++ quantization (zero_quantized_weights, zero_quantized_gradients)": (
            zero.zero_quantized_weights or zero.zero_quantized_gradients,
            "its kernels do not exist on CPUs, so that it could not be tried. hpZ alone works",
        ),
        "ZenFlow": (
            zero.zenflow is not None,
            "its second optimizer changes weights after the step, and neither that one's state nor the moments in "
            "its overlapping process are in DeepSpeed's checkpoint",
        ),
        "SuperOffload": (
            zero.offload_optimizer is not None and zero.offload_optimizer.super_offload,
            "its weights change during backward, and the moments in its worker process are not in DeepSpeed's "
            "checkpoint",
        ),
        "a PipelineModule in bf16 below ZeRO-1": (
            engine.pipeline_parallelism and engine.bfloat16_enabled() and zero.stage == ZeroStageEnum.disabled,
            "DeepSpeed cannot load its own checkpoints of it. Set zero_optimization.stage to 1",
        ),
        "use_node_local_storage": (
            bool(engine.use_node_local_storage()),
            "the commit needs one directory that all ranks see",
        ),
    }


def _refusals_of_engine(engine: DeepSpeedEngine) -> dict[str, tuple[bool, str]]:
    subset = engine.seq_dp_world_size * engine.mp_world_size
    if isinstance(engine, PipelineEngine):
        grid = engine.module.mpu()
        subset = grid.data_parallel_size * grid.pipe_parallel_size * grid.model_parallel_size
    return {
        "sequence parallelism over a device mesh": (
            engine.mesh_device is not None and engine.sequence_parallel_size > 1,
            "every rank of a sequence would write the same files. Give DeepSpeed an mpu instead: "
            "deepspeed.runtime.sequence_parallel.parallel_state_sp",
        ),
        "an engine on a subset of its world": (
            subset != dist.get_world_size(),
            f"DeepSpeed's own save waits for all {dist.get_world_size()} ranks and would hang; give the engine's "
            "ranks a torchrun job of their own",
        ),
    }


def _without_optimizer(engine: DeepSpeedEngine) -> bool:
    base = _base_optimizer(engine)
    return isinstance(base, DummyOptim) or not hasattr(base, "param_groups")


# --- installation --------------------------------------------------------------------------------------------


def attach(engine: DeepSpeedEngine, settings: Settings, cluster: str) -> RollCheckpointEngine:
    """Put our checkpoint engine into `engine`; every rank calls. No collective.

    Raises:
        UnsupportedError, ConfigError: see `refuse_unsupported` and `refuse_rivals`; the engine is left as it was.
    """
    install()
    if _without_optimizer(engine) or engine.checkpoint_engine is None:
        raise errors.UnsupportedError(
            f"cluster {cluster}: DeepSpeed cannot save an engine without an optimizer at any ZeRO stage; "
            "keep frozen models out of the checkpoint clusters"
        )
    refuse_rivals(engine)
    refuse_unsupported(engine)
    engine.checkpoint_engine.cleanup()
    ours = RollCheckpointEngine(engine, settings, cluster)
    engine.checkpoint_engine = ours
    _of_optimizer[engine.optimizer] = ours
    return ours


_of_optimizer: weakref.WeakKeyDictionary[Any, RollCheckpointEngine] = weakref.WeakKeyDictionary()


def attached(engine: DeepSpeedEngine) -> RollCheckpointEngine | None:
    """Our checkpoint engine in `engine`, if it is there."""
    ours = getattr(engine, "checkpoint_engine", None)
    return ours if isinstance(ours, RollCheckpointEngine) else None


def section_of(engine: DeepSpeedEngine) -> DeepSpeedConfig | None:
    """The engine's `checkpoint.roll_ckpt`, checked, or None if its config has none."""
    values = (engine._config._param_dict.get("checkpoint") or {}).get("roll_ckpt")
    return None if values is None else DeepSpeedConfig.parse(values, SECTION)


def stock(name: str) -> Callable[..., Any]:
    """DeepSpeed's own method behind our wrapper."""
    method = getattr(DeepSpeedEngine, name)
    return getattr(method, "__wrapped__", method)  # type: ignore[no-any-return]


def install() -> None:
    """Wrap DeepSpeed's methods once in this process. Engines without our section behave as before."""
    if hasattr(DeepSpeedEngine._configure_checkpointing, "__wrapped__"):
        return

    def wrap(name: str, replacement: Callable[..., Any], home: type = DeepSpeedEngine) -> None:
        original = getattr(home, name)

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return replacement(original, self, *args, **kwargs)

        setattr(home, name, method)

    wrap("_do_sanity_check", _do_sanity_check)
    wrap("_configure_checkpointing", _configure_checkpointing)
    wrap("save_checkpoint", _save_checkpoint)
    wrap("load_checkpoint", _load_checkpoint)
    wrap("save_16bit_model", _save_16bit_model)
    wrap("_take_model_step", _take_model_step)
    wrap("reload_states", _reload_states)
    # ZeRO-3 offloads into the buffers of the last time; below it waiting keeps the host at one copy.
    for name in ("offload_states", "load_module_state_dict", "destroy"):
        wrap(name, _fence_first)
    for home in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):  # some trainers call it there
        wrap("offload_states", _offload_optimizer, home)
    for name in _SETTERS:
        for home in (deepspeed.utils, tensor_fragment):
            if hasattr(home, name):
                setattr(home, name, _fencing(getattr(home, name)))


_SETTERS = (
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
)


def _fencing(setter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(setter)
    def fenced(*args: Any, **kwargs: Any) -> Any:
        saver.fence()
        return setter(*args, **kwargs)

    return fenced


def _do_sanity_check(original: Callable[..., Any], engine: DeepSpeedEngine) -> None:
    """Refuse what the config asks for before DeepSpeed starts on it: swap folders, processes, minutes of work."""
    if section_of(engine) is not None:
        refuse_rivals(engine)
        _refuse(_refusals_of_config(engine))
    original(engine)


def _configure_checkpointing(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kw: Any) -> None:
    original(engine, *args, **kw)
    settings = section_of(engine)
    if settings is not None and not _without_optimizer(engine):
        attach(engine, settings, settings.cluster)


def _save_checkpoint(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        return ours.save_checkpoint(original, *args, **kwargs)
    if section_of(engine) is not None:
        raise errors.UnsupportedError(
            "this engine has no optimizer, and DeepSpeed cannot save such an engine at any ZeRO stage; keep it "
            "out of the saves, or remove checkpoint.roll_ckpt from its config"
        )
    return original(engine, *args, **kwargs)


def _load_checkpoint(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is None:
        return original(engine, *args, **kwargs)
    loaded = ours.load_checkpoint(original, *args, **kwargs)
    _forget_secondary_partitions(engine)
    return loaded


def _forget_secondary_partitions(engine: DeepSpeedEngine) -> None:
    """hpZ gathers weights from second partitions. After a load DeepSpeed drops those of trained parameters only, and
    frozen ones would keep the values of before."""
    for parameter in engine.module.parameters():
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            parameter.ds_secondary_tensor = None


def _save_16bit_model(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is None:
        return original(engine, *args, **kwargs)
    return ours.save_16bit_model(original, *args, **kwargs)


def _fence_first(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        ours.fence()
    return original(engine, *args, **kwargs)


def _offload_optimizer(original: Callable[..., Any], optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    ours = _of_optimizer.get(optimizer)
    if ours is not None:
        ours.fence()
    return original(optimizer, *args, **kwargs)


def _take_model_step(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        stepped = functools.cache(lambda: _storages(_stepped_tensors(engine)))
        ours.fence(lambda storage: storage._cdata in stepped())
    return original(engine, *args, **kwargs)


def _reload_states(original: Callable[..., Any], engine: DeepSpeedEngine, *args: Any, **kwargs: Any) -> Any:
    ours = attached(engine)
    if ours is not None:
        ours.fence(_nothing)  # it copies out of the host's buffers, and those it drops a save holds
    return original(engine, *args, **kwargs)


def _nothing(storage: torch.UntypedStorage) -> bool:
    return False
