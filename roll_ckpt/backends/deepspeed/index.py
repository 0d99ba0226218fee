"""What the tensors in DeepSpeed's files hold of the model, read off the live engine.

Files and their keys: runtime/engine.py (`_save_checkpoint`, `_save_moe_checkpoint`), runtime/pipe/module.py
(`save_state_dict`), and `state_dict` of the optimizers in runtime/. `param_slice_mappings`, which DeepSpeed saves for
the same purpose, is not used: with `round_robin_gradients` it names other parameters than lie there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import AFFINE_MAP, AUTOEP_PARAM_EP_RANK, DS_AUTOEP_UC_META, DS_AUTOTP_UC_META
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups

from roll_ckpt.formats.tensor_index.meanings import (
    MASTER,
    PARAMETER,
    UNKNOWN,
    ByName,
    FileTensors,
    Meanings,
    Region,
    Run,
    Runs,
    Stored,
    Told,
    cut,
    whole,
)

MODEL_ONLY_FILE = "pytorch_model.bin"

_EXPERT = ".deepspeed_moe.experts.deepspeed_experts."
_EXPERT_FILE = re.compile(r"layer_\d+_expert_\d+_mp_rank_\d+_model_states\.pt")

Named = dict[str, Told]
Shape = tuple[int, ...]


class EngineIndex:
    """What the tensors in the files of one engine are. What follows from the engine's structure is kept."""

    def __init__(self) -> None:
        self._modules: list[torch.nn.Module] = []
        self._structure: list[Any] = []
        self._parameters: dict[str, dict[str, Any]] = {}
        self._meanings: dict[str, Meanings] = {}
        self._told: dict[str, FileTensors] = {}

    def look(self, engine: Any) -> Mapping[str, Mapping[str, Any]]:
        """Take notice of the engine's model and optimizer before a save. Returns names, dtypes and shapes of its
        parameters, the same object as long as nothing changes."""
        now = _structure(engine, self._modules)
        if any(was != found for was, found in zip_longest(self._structure, now)):
            self._modules = list(engine.module.modules())
            self._structure = list(_structure(engine, self._modules))
            self._parameters = parameters_of(engine)
            self._meanings = _meanings(engine)
            self._told = {}
        return self._parameters

    def of_file(self, file: str, tensors: tuple[Stored, ...]) -> FileTensors:
        """What the tensors of `file` are, by its name alone."""
        told = self._told.get(file)
        if told is None or told.tensors is not tensors:
            told = self._told[file] = FileTensors(tensors, self._of(file))
        return told

    def _of(self, file: str) -> Meanings:
        if _EXPERT_FILE.fullmatch(file):
            return self._meanings.get("experts", UNKNOWN)
        return self._meanings.get(file, self._meanings.get("", UNKNOWN))


def parameters_of(engine: Any) -> dict[str, dict[str, Any]]:
    """Name, dtype and global shape of every parameter of the engine's module on this rank."""
    return {
        name: {"dtype": str(parameter.dtype).removeprefix("torch."), "shape": list(_shape(parameter))}
        for name, parameter in engine.module.named_parameters()
    }


def _structure(engine: Any, modules: Iterable[torch.nn.Module]) -> Iterator[Any]:
    """What everything here follows from; torch's own walk over names takes twice as long."""
    yield id(engine.module), id(engine.optimizer)
    for module in modules:
        yield [*map(id, module._modules.values())]
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield key, id(parameter), parameter.dtype, _shape(parameter)


def _shape(parameter: torch.Tensor) -> Sequence[int]:
    """Of all of it under ZeRO-3, too."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


# --- parameters ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """The parameters of a rank's module, and what they are of the whole model."""

    engine: Any
    experts: Mapping[str, str] = field(default_factory=dict)
    """Prefixes of names of this rank's experts -> of the same experts in the whole model."""
    untied: frozenset[int] = frozenset()
    """Ids of parameters of tied layers that are not tied themselves; another stage has others of the same name."""
    shapes: Mapping[int, Shape] = field(default_factory=dict)
    """By the id of a parameter, where it may have none of its own now: its weights are offloaded."""
    expert_rank: int = 0
    tensor_rank: int | None = 0
    """Of AutoTP; None if an `mpu` cuts tensors in a way that is not known."""

    def shape_of(self, parameter: torch.Tensor) -> Shape:
        known = self.shapes.get(id(parameter))
        return tuple(_shape(parameter)) if known is None else known

    def name_of(self, name: str) -> str:
        """The name in the whole model: experts are counted over all ranks."""
        prefix, expert, rest = name.partition(_EXPERT)
        if not expert:
            return name
        number, dot, key = rest.partition(".")
        return self.experts.get(f"{prefix}{expert}{number}", f"{prefix}{expert}{number}") + dot + key

    def runs(self, name: str, parameter: torch.Tensor) -> tuple[Run, ...]:
        """What a parameter is, as it was before ZeRO cut it; nothing if that is not known."""
        shape = self.shape_of(parameter)
        untied = id(parameter) in self.untied
        region = Region(f"{name}@stage{self.engine.module.stage_id}" if untied else self.name_of(name), shape)
        experts, meta = (getattr(parameter, kind, None) for kind in (DS_AUTOEP_UC_META, DS_AUTOTP_UC_META))
        if experts is not None:
            return tuple(_affine(region, experts[AFFINE_MAP], experts[AUTOEP_PARAM_EP_RANK]))
        if self.tensor_rank is None:
            return ()
        if meta is not None and not meta.get("replicated"):
            return tuple(_slices(region, meta, self.tensor_rank))
        expert = not getattr(parameter, "allreduce", True)
        tied = getattr(parameter, "ds_pipe_replicated", False) and not untied
        copied = tied or self.tensor_rank > 0
        return whole(region, bool(copied or (self.expert_rank > 0 and not expert)))

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of parameters as a state dict has them: a tied one under each of its names."""
        named: Iterable[tuple[str, torch.Tensor]] = self.engine.module.named_parameters(remove_duplicate=False)
        yield from named


def _slices(region: Region, meta: Mapping[str, Any], rank: int) -> Iterator[Run]:
    """What a rank's slice under AutoTP is of the whole parameter; nothing where it cannot be told by runs."""
    told = (meta.get("conversion") or {}).get("affine_map")
    if told is not None:
        yield from _affine(region, told, rank)
        return
    dim, sizes, logical = meta.get("partition_dim"), meta.get("partition_sizes"), meta.get("logical_shape")
    if dim is None or sizes is None or logical is None or meta.get("sub_param_shape") is not None:
        return
    offsets = [sum(sizes[:rank]) if axis == dim else 0 for axis in range(len(logical))]
    box = Region.box(region.name, logical, offsets, region.shape)
    yield Run(0, box, 0, box.numel)


def _affine(region: Region, told: Mapping[str, Any], rank: int) -> Iterator[Run]:
    """By deepspeed/checkpoint/affine.py: blocks of the whole tensor, each at its place in the slice."""
    logical = tuple(told["logical_shape"])
    runs = []
    for block in told["ranks"][rank]["pieces"]:
        shape, (source, steps), (at, own) = tuple(block["shape"]), block["source"], block["dest"]
        if tuple(steps) != _steps(logical) or tuple(own) != _steps(shape) or block.get("scale", 1.0) != 1.0:
            return
        offsets = [source // step % length for step, length in zip(steps, logical, strict=True)]
        box = Region.box(region.name, logical, offsets, shape)
        runs.append(Run(at, box, 0, box.numel, rank != min(block["locations"])))
    yield from sorted(runs, key=lambda run: run.at)


def _steps(shape: Sequence[int]) -> Shape:
    """The strides of a tensor that lies row by row."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


# --- the engine's files ----------------------------------------------------------------------------------------------


def _meanings(engine: Any) -> dict[str, Meanings]:
    """By the name of a file; "experts" for the files of single experts, "" for all that are not named."""
    model = _model(engine)
    named, states = _optimizer(engine, model)
    plain: Named = {}
    for name, parameter in model.named():
        runs = model.runs(name, parameter)
        plain[model.name_of(name)] = PARAMETER, Runs.of(runs)
        if hasattr(parameter, DS_AUTOEP_UC_META):
            plain |= _single_experts(runs)
        named[f"module.{name}"] = named[f"frozen_param_fragments.{name}"] = plain[model.name_of(name)]
        if hasattr(parameter, "ds_tensor"):  # ZeRO-3: what is gathered there is in the shares of the ranks, too
            named[f"module.{name}"] = PARAMETER, Runs.of(replace(run, replica=True) for run in runs)
            named[f"frozen_param_fragments.{name}"] = PARAMETER, _share(runs, parameter)
    found: dict[str, Meanings] = {"": ByName(named, states), "experts": ByName(plain), MODEL_ONLY_FILE: ByName(plain)}
    if isinstance(engine.module, PipelineModule):
        found |= {file: ByName(layer) for file, layer in _layers(engine.module, model)}
    return found


def _single_experts(runs: Iterable[Run]) -> Iterator[tuple[str, Told]]:
    """AutoEP keeps a rank's experts in one tensor, and saves each in a file of its own under its number."""
    for run in runs:
        _, *inner = run.region.shape
        first, *_ = run.region.offsets or (0,)
        for expert in range(first, first + run.region.extent[0]):
            box = Region.box(run.region.name, run.region.shape, (expert, *(0 for _ in inner)), (1, *inner))
            yield f"{box.name}.{expert}", (PARAMETER, Runs.of(whole(box, run.replica)))


def _model(engine: Any) -> _Model:
    experts = {}
    for prefix, module in engine.module.named_modules():
        if isinstance(module, MoE):
            first = groups._get_expert_parallel_rank(module.expert_group_name) * module.num_local_experts
            for local in range(module.num_local_experts):
                experts[f"{prefix}{_EXPERT}{local}"] = f"{prefix}{_EXPERT}{first + local}"
    optimizer = engine.optimizer
    groups_of, likes_of = (getattr(optimizer, f"round_robin_bit16_{kind}", ()) for kind in ("groups", "meta"))
    pairs = (zip(group, likes, strict=True) for group, likes in zip(groups_of, likes_of, strict=True))
    shapes = {id(parameter): tuple(like.shape) for pair in pairs for parameter, like in pair}
    expert_rank = groups._get_expert_parallel_rank(groups._get_max_expert_size_name()) if engine.has_moe_layers else 0
    tensor_rank: int | None = 0
    if engine.autotp_size() > 1:
        tensor_rank = groups.get_tensor_model_parallel_rank()
    elif _model_parallel_size(engine) > 1:
        tensor_rank = None
    told = experts, _untied(engine.module), shapes
    return _Model(engine, *told, 0 if engine.zero_optimization() else expert_rank, tensor_rank)


def _untied(module: torch.nn.Module) -> frozenset[int]:
    """What DeepSpeed calls replicated and does not keep alike: a tied layer shares only the weights that it names."""
    found = set()
    for tied in getattr(module, "tied_comms", {}).values():
        shared = [tied["weight_attr"]] if isinstance(tied["weight_attr"], str) else tied["weight_attr"]
        for name, parameter in tied["module"].named_parameters():
            if getattr(parameter, "ds_pipe_replicated", False) and name not in shared:
                found.add(id(parameter))
    return frozenset(found)


def _model_parallel_size(engine: Any) -> int:
    """Over how many ranks an `mpu` of the user's cuts tensors; stages of a pipeline are no such ranks."""
    if isinstance(engine.module, PipelineModule):
        size: int = engine.module.mpu().get_slice_parallel_world_size()
        return size
    return int(engine.mp_world_size)


def _layers(module: PipelineModule, model: _Model) -> Iterator[tuple[str, Named]]:
    """The file of each layer of a pipeline's stage, whose keys are those of the layer by itself."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for place, layer in enumerate(module.forward_funcs):
        if isinstance(layer, torch.nn.Module):
            named = {
                key: (PARAMETER, Runs.of(model.runs(names[id(parameter)], parameter)))
                for key, parameter in layer.named_parameters(remove_duplicate=False)
            }
            yield Path(module.ckpt_layer_path("", place)).name, named


def _share(runs: Iterable[Run], parameter: Any) -> Runs:
    """What this rank has of a parameter under ZeRO-3: an equal share, the last ones padded."""
    numel, rank = parameter.ds_tensor.ds_numel, dist.get_rank(parameter.ds_process_group)
    return Runs.of(cut(runs, rank * numel, min(parameter.ds_numel, (rank + 1) * numel), 0))


# --- optimizers ------------------------------------------------------------------------------------------------------

_States = dict[str, Runs]


def _optimizer(engine: Any, model: _Model) -> tuple[Named, _States]:
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


def _in_a_row(parameters: Iterable[torch.Tensor], model: _Model) -> Iterator[tuple[torch.Tensor, int, int]]:
    at = 0
    for parameter in parameters:
        numel = math.prod(model.shape_of(parameter))
        yield parameter, at, numel
        at += numel


_BASE = "optimizer_state_dict.base_optimizer_state"


def _zero_1_and_2(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    named: Named = {}
    states: _States = {}
    for group, parameters in enumerate(optimizer.round_robin_bit16_groups):
        likes, offsets = optimizer.round_robin_bit16_meta[group], optimizer.round_robin_bit16_offsets[group]
        parts = [(p, at, like.numel()) for p, at, like in zip(parameters, offsets, likes, strict=True)]
        size = optimizer.partition_size[group]
        first = dist.get_rank(optimizer.real_dp_process_group[group]) * size
        runs = _flat(parts, first, first + size, of_parameter)
        named[f"optimizer_state_dict.single_partition_of_fp32_groups.{group}"] = MASTER, runs
        states |= {f"{_BASE}.state.{group}": runs, f"{_BASE}.{group}": runs}  # the second with elastic_checkpoint
    return named, states


def _bf16(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    named: Named = {}
    states: _States = {}
    for group, parameters in enumerate(optimizer.bf16_groups):
        own = optimizer.real_dp_process_group[group]
        size = optimizer.bf16_groups_flat[group].numel() // dist.get_world_size(own)
        first = dist.get_rank(own) * size
        runs = _flat(_in_a_row(parameters, model), first, first + size, of_parameter)
        named[f"optimizer_state_dict.single_partition_of_fp32_groups.{group}"] = MASTER, runs
        states[f"{_BASE}.state.{group}"] = runs
    return named, states


def _zero_3(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    """Each parameter is cut by itself: its share is padded, but on the last ranks."""
    named: Named = {}
    states: _States = {}
    place_of = {sub_group: place for place, sub_group in enumerate(_as_stepped(optimizer))}
    for sub_group, parameters in enumerate(optimizer.fp16_groups):
        rank, at, found = dist.get_rank(optimizer.sub_group_process_groups[sub_group]), 0, []
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


def _fused_16_bit(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    named: Named = {}
    states: _States = {}
    for group, parameters in enumerate(optimizer.fp16_groups):
        parts = list(_in_a_row(parameters, model))
        runs = _flat(parts, 0, sum(numel for _, _, numel in parts), of_parameter)
        named[f"optimizer.fp32_groups_flat.{group}"] = MASTER, runs
        states[f"optimizer.optimizer_state_dict.state.{group}"] = runs
    return named, states


def _unfused_16_bit(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    named: Named = {}
    states: _States = {}
    for group, parameters in enumerate(optimizer.fp16_groups):
        for place, parameter in enumerate(parameters):
            runs = Runs.of(of_parameter.get(id(parameter), ()))
            named[f"optimizer.fp32_groups.{group}.{place}"] = MASTER, runs
            states[f"optimizer.optimizer_state_dict.state.{len(states)}"] = runs
    return named, states


def _plain(optimizer: Any, model: _Model, of_parameter: _OfParameter) -> tuple[Named, _States]:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return {}, {
        f"optimizer.state.{place}": Runs.of(of_parameter.get(id(parameter), ()))
        for place, parameter in enumerate(parameters)
    }


_Describe = Callable[[Any, _Model, _OfParameter], tuple[Named, _States]]
_OPTIMIZERS: tuple[tuple[str, _Describe], ...] = (
    ("fp32_partitioned_groups_flat", _zero_3),
    ("round_robin_bit16_groups", _zero_1_and_2),
    ("fp32_groups_flat_partition", _bf16),
    ("fp32_groups_flat", _fused_16_bit),
    ("fp32_groups", _unfused_16_bit),
    ("param_groups", _plain),
)
"""Told apart by what they have; an optimizer of another kind has no meaning that is known."""
