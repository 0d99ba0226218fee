"""The parameters of a DeepSpeed module: where a rank's tensors lie in the whole model.

AutoTP, AutoEP, MoE layers and pipelines cut parameters; their marks are those of deepspeed/checkpoint/constants.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups

from roll_ckpt.backends.deepspeed import version
from roll_ckpt.backends.deepspeed.version import (
    AFFINE_MAP,
    AUTOEP_PARAM_EP_RANK,
    DS_AUTOEP_UC_META,
    DS_AUTOTP_UC_META,
)
from roll_ckpt.formats.tensor_index.meanings import Region, Run, whole

_EXPERT = ".deepspeed_moe.experts.deepspeed_experts."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
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
        return tuple(shape_of(parameter)) if known is None else known

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


def model_of(engine: Any) -> Model:
    """The parameters of the engine's module on this rank, and what it takes to place them in the whole model."""
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
    if version.autotp_size(engine) > 1:
        tensor_rank = groups.get_tensor_model_parallel_rank()
    elif _model_parallel_size(engine) > 1:
        tensor_rank = None
    told = experts, _untied(engine.module), shapes
    return Model(engine, *told, 0 if engine.zero_optimization() else expert_rank, tensor_rank)


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


def shape_of(parameter: torch.Tensor) -> Sequence[int]:
    """The shape of the whole parameter, also under ZeRO-3, which keeps a share of it."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape
