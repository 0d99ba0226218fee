"""Loads weights without the optimizer where DeepSpeed would read files past us, or leave the weights as they are.

Under ZeRO-3 the weights are in the optimizer's fp32 partitions alone. For `load_optimizer_states=False` stock DeepSpeed
reads them with `get_fp32_state_dict_from_zero_checkpoint`: from the tag that `latest` names, whichever was asked for,
running what the pickles say. With `load_module_only=True` it loads nothing and does not say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine

from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.index import parameters_of
from roll_ckpt.backends.deepspeed.saved import Files, Load, data_parallel_rank
from roll_ckpt.backends.deepspeed.sources import Indexed, Sharded, Source, Whole
from roll_ckpt.errors import ModelMismatch
from roll_ckpt.load.compare import compare_models
from roll_ckpt.ranks.group import RankGroup


class Weights:
    """The weights-only load of one checkpoint into one engine, on any number of ranks and at any ZeRO stage.

    DeepSpeed's own `load_checkpoint` runs around it: it loads the model states, which hold all but the weights, and
    refreshes the optimizer's copies of the weights. Each rank reads only what it will hold of each parameter.
    """

    def __init__(
        self, engine: DeepSpeedEngine, ranks: RankGroup, files: Files, found: Indexed | None, timeout_s: float
    ) -> None:
        self.files = files
        self.state: Mapping[str, Any] = {}
        """The model states, once DeepSpeed has loaded them through our checkpoint engine."""
        self._engine = engine
        self._ranks = ranks
        self._indexed = found
        self._timeout_s = timeout_s

    def model_files(self) -> list[str]:
        """In place of DeepSpeed's `_get_all_ckpt_names`: there may be no file for this rank, or for this ZeRO stage."""
        rank = data_parallel_rank(self._engine)
        return [str(self.files.model(rank, mp_rank)) for mp_rank in range(self._engine.mp_world_size)]

    def load_module(
        self,
        stock: Callable[..., Any],
        load: Load,
        *,
        strict: bool,
        custom_load_fn: Callable[..., Any] | None,
    ) -> None:
        """In place of DeepSpeed's `load_module_state_dict`, which is `stock`. Every rank calls; blocks.

        `load` loads one file of the checkpoint. A `custom_load_fn` is given the whole model in fp32.

        Raises, on every rank:
            ModelMismatch: the checkpoint holds another model; nothing was loaded.
            Damaged, Unreadable: a file that cannot be verified is damaged, or the disk failed meanwhile.
        """
        engine, source = self._engine, self._source(load)
        if custom_load_fn is not None:
            src: dict[str, Any] = {}
            self._together(lambda: src.update(self._whole(source, load)))
            fetch = engine.zero_optimization_partition_weights()
            stock(engine, checkpoint={"module": src}, custom_load_fn=custom_load_fn, fetch_z3_params=fetch)
            return
        named = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
        others = {key: value for key, value in self.state["module"].items() if key not in named}
        self._ranks.run_on_all_ranks(lambda: self._check(source, named, others, strict), self._timeout_s)
        engine.module.load_state_dict(others, strict=False)
        self._together(lambda: fill(engine.module, source))

    def _together(self, work: Callable[[], object]) -> None:
        self._ranks.run_on_all_ranks(work, self._timeout_s, working=True)

    def _source(self, load: Load) -> Source:
        if not self.files.partitioned:
            return Whole(self.state["module"])
        return self._indexed or Sharded(self.files, self.state, version.checkpoint_mp_rank(self._engine), load)

    def _check(self, source: Source, named: set[str], others: Mapping[str, Any], strict: bool) -> None:
        where, live = str(self.files.directory), parameters_of(self._engine)
        saved = {name: told for name, told in source.shapes().items() if name in live or name not in {*named, *others}}
        compare_models(saved, live, where, strict)
        wanted = self._engine.module.state_dict(keep_vars=True).keys() - named
        apart = sorted(wanted ^ others.keys())
        if strict and apart:
            raise ModelMismatch(
                f"{where} holds another model; nothing was loaded. These are either in it or in this model: "
                f"{', '.join(apart[:10])}. Load it with load_module_strict=False to keep what is there"
            )

    def _whole(self, source: Source, load: Load) -> dict[str, Any]:
        """The whole state dict on the CPU, its weights in fp32."""
        shapes = {name: torch.Size(told["shape"]) for name, told in source.shapes().items()}
        found = {name: value for name, value in self.state["module"].items() if name not in shapes}
        weights = {name: torch.empty(shape.numel()) for name, shape in shapes.items()}
        for name, at, values in source.fragments({name: (0, shape.numel()) for name, shape in shapes.items()}):
            weights[name][at : at + values.numel()].copy_(values)
        found |= {name: flat.view(shapes[name]) for name, flat in weights.items()}
        mp_rank = version.checkpoint_mp_rank(self._engine)
        rank0 = load(self.files.model(0, mp_rank)) if self.files.partitioned else self.state
        shared: Mapping[str, str] = rank0.get("shared_params") or {}  # only rank 0 looks for tied parameters
        return found | {name: found[other] for name, other in shared.items() if other in found}


@dataclass(frozen=True)
class _Target:
    """What this rank holds of a parameter: elements `first` to `last`, and the flat tensor for them."""

    parameter: Any
    first: int
    last: int
    flat: torch.Tensor

    def finish(self) -> None:
        if not hasattr(self.parameter, "ds_tensor") and not self.parameter.is_contiguous():
            self.parameter.data.copy_(self.flat.view(self.parameter.shape))


def _target(parameter: Any) -> _Target:
    if hasattr(parameter, "ds_tensor"):
        share = parameter.ds_tensor.ds_numel
        first = min(parameter.ds_numel, dist.get_rank(parameter.ds_process_group) * share)
        last = min(parameter.ds_numel, first + share)
        return _Target(parameter, first, last, parameter.ds_tensor.data.view(-1)[: last - first])
    data = parameter.data if parameter.is_contiguous() else torch.empty_like(parameter).contiguous()
    return _Target(parameter, 0, parameter.numel(), data.view(-1))


def fill(module: torch.nn.Module, source: Source) -> None:
    """Put the weights of `source` into what this rank holds of the parameters of `module`. This rank alone; blocks.

    Parameters that `source` does not have keep their values. Under ZeRO-3 all parameters must be partitioned.

    Raises:
        Damaged, Unreadable: see `Source.fragments`; the parameters before that are changed.
    """
    targets = {name: _target(parameter) for name, parameter in module.named_parameters()}
    there = source.shapes()
    wanted = {name: (target.first, target.last) for name, target in targets.items() if name in there}
    with torch.no_grad():
        for name, at, values in source.fragments(wanted):
            place = at - targets[name].first
            targets[name].flat[place : place + values.numel()].copy_(values)
        for name in wanted:
            targets[name].finish()


_loading: ContextVar[Weights | None] = ContextVar("roll_ckpt_weights_only_load", default=None)


@contextmanager
def loading(weights: Weights | None) -> Iterator[None]:
    """Inside the block, `state_dict_of_zero_checkpoint` serves `weights`. This thread alone."""
    token = _loading.set(weights)
    try:
        yield
    finally:
        _loading.reset(token)


def state_dict_of_zero_checkpoint(
    stock: Callable[..., Any], checkpoint_dir: str | Path, *args: Any, **more: Any
) -> Any:
    """In place of `get_fp32_state_dict_from_zero_checkpoint` in DeepSpeed's engine, which is `stock`.

    During a weights-only load of ours it reads nothing: `Weights.load_module` brings the weights.
    """
    weights = _loading.get()
    return stock(checkpoint_dir, *args, **more) if weights is None else weights.state["module"]
