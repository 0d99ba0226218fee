"""The optimizers of DeepSpeed: which elements of which parameter the tensors in their files hold.

The flat buffers are those of `state_dict` of the optimizers in runtime/zero/ and runtime/*_optimizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.model_index import Model
from roll_ckpt.formats.tensor_index.meanings import MASTER, Run, Runs, Told, cut

Named = dict[str, Told]
States = dict[str, Runs]


def optimizer_meanings(engine: Any, model: Model) -> tuple[Named, States]:
    """What the tensors of the optimizer's own file or part of a file are."""
    optimizer = engine.optimizer
    of_parameter = {id(parameter): model.runs(name, parameter) for name, parameter in engine.module.named_parameters()}
    describe = next((make for attribute, make in _OPTIMIZERS if hasattr(optimizer, attribute)), None)
    return ({}, {}) if describe is None else describe(optimizer, model, of_parameter)


_OfParameter = Mapping[int, tuple[Run, ...]]
"""By the id of a parameter."""


def _flat(parts: Iterable[tuple[Any, int, int]], first: int, last: int, of_parameter: _OfParameter) -> Runs:
    """Elements `first` to `last` of a buffer of parameters, each given with its place in it and its elements."""
    found: list[Run] = []
    for parameter, at, numel in parts:
        low, high = max(first, at), min(last, at + numel)
        if low < high:
            found += cut(of_parameter.get(id(parameter), ()), low - at, high - at, low - first)
    return Runs.of(found)


def _in_a_row(parameters: Iterable[torch.Tensor], model: Model) -> Iterator[tuple[torch.Tensor, int, int]]:
    at = 0
    for parameter in parameters:
        numel = math.prod(model.shape_of(parameter))
        yield parameter, at, numel
        at += numel


_BASE = "optimizer_state_dict.base_optimizer_state"


def _zero_1_and_2(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    named: Named = {}
    states: States = {}
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        likes, offsets = optimizer.round_robin_bit16_meta[group], version.flat_offsets(optimizer, group)
        parts = [(p, at, like.numel()) for p, at, like in zip(parameters, offsets, likes, strict=True)]
        size = int(optimizer.partition_size[group])  # a float up to DeepSpeed 0.17
        first = dist.get_rank(optimizer.real_dp_process_group[group]) * size
        runs = _flat(parts, first, first + size, of_parameter)
        named[f"optimizer_state_dict.single_partition_of_fp32_groups.{group}"] = MASTER, runs
        states |= {f"{_BASE}.state.{group}": runs, f"{_BASE}.{group}": runs}  # the second with elastic_checkpoint
    return named, states


def _bf16(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    named: Named = {}
    states: States = {}
    for group, parameters in enumerate(optimizer.bf16_groups):
        own = optimizer.real_dp_process_group[group]
        size = optimizer.bf16_groups_flat[group].numel() // dist.get_world_size(own)
        first = dist.get_rank(own) * size
        runs = _flat(_in_a_row(parameters, model), first, first + size, of_parameter)
        named[f"optimizer_state_dict.single_partition_of_fp32_groups.{group}"] = MASTER, runs
        states[f"{_BASE}.state.{group}"] = runs
    return named, states


def _zero_3(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    """Each parameter is cut by itself: its share is padded, but on the last ranks."""
    named: Named = {}
    states: States = {}
    place_of = {sub_group: place for place, sub_group in enumerate(_as_stepped(optimizer))}
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        rank, at, found = dist.get_rank(version.sub_group_process_group(optimizer, sub_group)), 0, []
        for parameter in parameters:
            numel = parameter.partition_numel()
            last = min(parameter.ds_numel, (rank + 1) * numel)
            found += cut(of_parameter.get(id(parameter), ()), rank * numel, last, at)
            at += numel
        runs = Runs.of(found)
        named[f"optimizer_state_dict.fp32_flat_groups.{sub_group}"] = MASTER, runs
        states[f"optimizer_state_dict.optimizer_state_dict.state.{place_of[sub_group]}"] = runs
    return named, states


def _as_stepped(optimizer: Any) -> list[int]:
    """The sub-groups of ZeRO-3 in the order in which the base optimizer has them: by its groups."""
    return sorted(range(len(optimizer.fp16_groups)), key=lambda sub_group: optimizer.sub_group_to_group_id[sub_group])


def _fused_16_bit(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    named: Named = {}
    states: States = {}
    for group, parameters in enumerate(optimizer.fp16_groups):
        parts = list(_in_a_row(parameters, model))
        runs = _flat(parts, 0, sum(numel for _, _, numel in parts), of_parameter)
        named[f"optimizer.fp32_groups_flat.{group}"] = MASTER, runs
        states[f"optimizer.optimizer_state_dict.state.{group}"] = runs
    return named, states


def _unfused_16_bit(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    named: Named = {}
    states: States = {}
    for group, parameters in enumerate(optimizer.fp16_groups):
        for place, parameter in enumerate(parameters):
            runs = Runs.of(of_parameter.get(id(parameter), ()))
            named[f"optimizer.fp32_groups.{group}.{place}"] = MASTER, runs
            states[f"optimizer.optimizer_state_dict.state.{len(states)}"] = runs
    return named, states


def _plain(optimizer: Any, model: Model, of_parameter: _OfParameter) -> tuple[Named, States]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {}, {
        f"optimizer.state.{place}": Runs.of(of_parameter.get(id(parameter), ()))
        for place, parameter in enumerate(parameters)
    }


_Describe = Callable[[Any, Model, _OfParameter], tuple[Named, States]]
_OPTIMIZERS: tuple[tuple[str, _Describe], ...] = (
    ("fp32_partitioned_groups_flat", _zero_3),
    ("round_robin_bit16_groups", _zero_1_and_2),
    ("fp32_groups_flat_partition", _bf16),
    ("fp32_groups_flat", _fused_16_bit),
    ("fp32_groups", _unfused_16_bit),
    ("param_groups", _plain),
)
"""Told apart by what they have; an optimizer of another kind has no meaning that is known."""
