"""What the tensors in Megatron's files hold of the model.

A `ShardedTensor` says itself which box of which tensor it is, and its key is the parameter's name, with a prefix for
the optimizer's state. Only `dp_reshardable` buffers do not: they are named after the buffer, and hold elements of the
parameters of one rank, one after another. See megatron/core/optimizer/distrib_optimizer.py,
`sharded_param_state_dp_reshardable`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from roll_ckpt.backends.megatron import version
from roll_ckpt.formats.tensor_index.meanings import (
    MASTER,
    OTHER,
    PARAMETER,
    InOrder,
    Region,
    Run,
    Runs,
    Told,
    cut,
    whole,
)

_CHAINED = r"(?:chained_(?P<chained>\d+)\.)?"
_STATE = re.compile(rf"{_CHAINED}optimizer\.state\.(?P<key>\w+?)\.(?P<name>.+)", re.DOTALL)
_BUFFER = re.compile(rf"{_CHAINED}(?P<buffer>optimizer\.distributed\..+)\.(?P<key>\w+)", re.DOTALL)
_MASTERS = frozenset(["param", "fp32_param", "master_param"])


@dataclass(frozen=True)
class Share:
    """Elements `first` to `last` of a parameter of this rank."""

    parameter: torch.Tensor
    first: int
    last: int


Slot = tuple[int, str, int]
"""Which of the chained optimizers, the key of a buffer, and an offset in it, in elements."""


@dataclass(frozen=True)
class Source:
    """What is known of the model and the optimizer that a state was made from."""

    slots: Mapping[Slot, Share] = field(default_factory=dict)
    """Where shares of this rank's parameters lie in the buffers of the distributed optimizer."""
    buffers: frozenset[int] | None = None
    """The ids of the model's buffers; None if the model is not known: then only what is a parameter of torch's is taken
    for one."""

    @classmethod
    def of(cls, model: Sequence[torch.nn.Module], optimizer: Any) -> Source:
        slots: dict[Slot, Share] = {}
        for number, part in enumerate(getattr(optimizer, "chained_optimizers", [optimizer])):
            if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer:
                slots |= {(number, buffer, offset): share for buffer, offset, share in _slots(part)}
        buffers = (buffer for chunk in model for buffer in torch.nn.Module.buffers(chunk))  # DDP has others, so called
        return cls(slots, frozenset(id(buffer) for buffer in buffers))


def _slots(part: Any) -> Iterator[tuple[str, int, Share]]:
    group = part.data_parallel_group
    for number, dtypes in enumerate(part.gbuf_ranges):
        for dtype, buckets in dtypes.items():
            for place, bucket in enumerate(buckets):
                share = part.buffers[number].buckets[place].grad_data.numel() // group.size()
                buffer = (
                    f"optimizer.distributed.dp_group_idx_{part.data_parallel_group_idx}.gbuf_idx_{number}"
                    f".dtype_{dtype}.bucket_idx_{place}"
                )
                for parameter, ranges in bucket["param_map"].items():
                    at = group.rank() * share + ranges["gbuf_local"].start
                    yield buffer, at, Share(parameter, ranges["param"].start, ranges["param"].end)


class StateIndex:
    """What the `ShardedTensor`s of a state are; for one plan.

    `parts` are all of the state, its factories built, before stock code has planned: that puts other tensors into them.
    """

    def __init__(self, parts: Sequence[Any], source: Source) -> None:
        self._source = source
        self._parameters: set[int] = set()
        """Ids of the parts that are parameters of the model."""
        self._runs: dict[int, list[Run]] = {}
        """What the state takes from each parameter of this rank, by its id."""
        for part in parts:
            if _is_of_model(part):
                self._look_at(part)

    def _look_at(self, part: Any) -> None:
        parameter = _parameter_in(part.data)
        known = self._source.buffers
        if parameter is not None if known is None else id(part.data) not in known:
            self._parameters.add(id(part))
        if parameter is not None:
            runs = self._runs.setdefault(id(parameter), [])
            if part.data.is_contiguous():  # else it is no run of elements, and what lies there is not told of
                at, region = part.data.storage_offset() - parameter.storage_offset(), _region(part, part.key)
                runs.append(Run(at, region, 0, region.numel, _repeats(part)))

    def in_order(self, parts: Sequence[Any]) -> InOrder:
        """What the tensors of a file are that holds `parts`."""
        return InOrder(tuple(self._told(part) for part in parts))

    def _told(self, part: Any) -> Told:
        state, buffer = _STATE.fullmatch(part.key), _BUFFER.fullmatch(part.key)
        if state is not None:
            box, elements = whole(_region(part, state["name"])), version.flattened(part)
            return _role(state["key"]), Runs.of(cut(box, elements.start, elements.stop, 0) if elements else box)
        if buffer is not None:
            slot = int(buffer["chained"] or 0), buffer["buffer"], part.global_offset[0]
            runs = self._runs_in(self._source.slots.get(slot))
            if runs:
                return _role(buffer["key"]), Runs.of(runs)
            return OTHER, Runs.of(whole(_region(part, part.key)))
        role = PARAMETER if id(part) in self._parameters else OTHER
        return role, Runs.of(whole(_region(part, part.key)))

    def _runs_in(self, share: Share | None) -> list[Run]:
        if share is None:
            return []
        runs = sorted(self._runs.get(id(share.parameter), ()), key=lambda run: run.at)
        found = cut(runs, share.first, share.last, 0)
        return found if sum(run.count for run in found) == share.last - share.first else []


def _role(key: str) -> str:
    return MASTER if key in _MASTERS else key


def _is_of_model(part: Any) -> bool:
    """Whether it is a tensor, and none of the optimizer's."""
    tensor = isinstance(part, ShardedTensor) and part.data is not None
    return tensor and not _STATE.fullmatch(part.key) and not _BUFFER.fullmatch(part.key)


def _parameter_in(data: torch.Tensor) -> torch.Tensor | None:
    """The parameter that a tensor is, or is a view of."""
    return next((found for found in (data, data._base) if isinstance(found, torch.nn.Parameter)), None)


def _region(part: Any, name: str) -> Region:
    lengths = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return Region.box(name, part.global_shape, part.global_offset, lengths)


def _repeats(part: Any) -> bool:
    """Whether another rank has the same of a parameter as its own; data parallel ranks are told apart by the buffer."""
    replica = part.replica_id
    return any(replica[:-1]) if isinstance(replica, tuple) else False
