"""Values that are unusual and legal in a state, values that no file can hold, and whether two values are the same."""

from __future__ import annotations

import enum
import sys
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.testing._internal.two_tensor import TwoTensor


class Sub(torch.Tensor):
    pass


class Watching(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class SubParameter(torch.nn.Parameter):
    pass


Point = namedtuple("Point", "x y")


class Color(enum.Enum):
    RED = 1


@dataclass
class Best:
    step: int = 3
    loss: float = 0.5


def _with(tensor: torch.Tensor, **attributes: object) -> torch.Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def _complex() -> torch.Tensor:
    return torch.randn(3, 2, dtype=torch.complex64)


def _two_empties() -> list[torch.Tensor]:
    empty = torch.empty(0)
    return [empty, empty.view(torch.int32)]


BUFFERS: dict[str, Callable[[], Any]] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "coo not coalesced": lambda: torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2)),
    "coo without elements": lambda: torch.sparse_coo_tensor(size=(2, 3)),
    "coo hybrid": lambda: torch.sparse_coo_tensor([[0, 1]], torch.randn(2, 3), (4, 3)),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "bsc": lambda: torch.eye(4).to_sparse_bsc((2, 2)),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint8),
    "quantised 32": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 3, torch.qint32),
    "quantised per channel": lambda: torch.quantize_per_channel(
        torch.randn(2, 4), torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), 0, torch.quint8
    ),
    "subclass": lambda: torch.randn(3).as_subclass(Sub),
    "subclass with attributes": lambda: _with(torch.randn(3).as_subclass(Sub), scale=torch.ones(2)),
    "subclass with __torch_function__": lambda: torch.randn(3).as_subclass(Watching),
    "wrapper subclass": lambda: TwoTensor(torch.randn(3), torch.randn(3)),
    "parameter subclass": lambda: SubParameter(torch.randn(3), requires_grad=False),
    "parameter with attributes": lambda: _with(torch.nn.Parameter(torch.randn(3), requires_grad=False), scale=2),
    "tensor with attributes": lambda: _with(torch.randn(3), scale=torch.ones(2), note="w"),
    "buffer class": lambda: torch.nn.Buffer(torch.ones(3)),
    "conj": lambda: _complex().conj(),
    "conj transposed": lambda: _complex().mH,
    "neg": lambda: _complex().conj().imag,
    "expanded": lambda: torch.randn(1).expand(1000, 1000),
    "expanded in one dimension": lambda: torch.randn(3, 1).expand(3, 5),
    "scalar expanded": lambda: torch.tensor(2.5).expand(10**12),
    "as_strided": lambda: torch.as_strided(torch.randn(10), (4, 3), (2, 1)),
    "no elements": lambda: torch.empty(0, 3),
    "empty view": lambda: torch.randn(4)[4:],
    "complex": _complex,
    "complex32": lambda: _complex().to(torch.complex32),
    "bool": lambda: torch.tensor([True, False]),
    "float8": lambda: torch.randn(4).to(torch.float8_e4m3fn),
    "float8 e5m2": lambda: torch.randn(4).to(torch.float8_e5m2),
    "float8 e8m0": lambda: torch.ones(4).to(torch.float8_e8m0fnu),
    "float4": lambda: torch.arange(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "uint16": lambda: torch.ones(3, dtype=torch.uint16),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "from NumPy": lambda: torch.from_numpy(np.arange(3.0)),
    "made in inference mode": lambda: torch.inference_mode()(lambda: torch.ones(3))(),
}
"""What a module may have as a buffer."""

STATE: dict[str, Callable[[], Any]] = {
    **BUFFERS,
    "meta": lambda: torch.empty(3, device="meta"),
    "meta parameter": lambda: torch.nn.Parameter(torch.empty(3, device="meta")),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
    "not a leaf": lambda: torch.ones(3, requires_grad=True) * 2,
    "uninitialised parameter": torch.nn.parameter.UninitializedParameter,
    "empties of two dtypes": _two_empties,
    "storage": lambda: torch.arange(3).untyped_storage(),
    "typed storage": lambda: torch.arange(3).storage(),
    "generator": lambda: torch.Generator().manual_seed(5),
    "array": lambda: np.arange(6).reshape(2, 3),
    "array of objects": lambda: np.array([1, None], dtype=object),
    "NumPy scalar": lambda: np.float32(1.5),
    "path": lambda: Path("a/b"),
    "enum": lambda: Color.RED,
    "dataclass": Best,
    "namedtuple": lambda: Point(1, torch.ones(2)),
    "set": lambda: {1, "a"},
    "packed sequence": lambda: torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]),
    "tensor as a key": lambda: {torch.tensor(1): 2},
}
"""What any other part of a state may be."""


def _local_class() -> object:
    class Local:
        pass

    return Local()


IMPOSSIBLE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda: 0,
    "lock": threading.Lock,
    "open file": lambda: sys.__stdout__,
    "object of a local class": _local_class,
    "generator": lambda: (i for i in range(3)),
    "module": lambda: sys,
    "dtype without a storage": lambda: torch.empty(4, dtype=torch.uint4),
    "deep inside": lambda: {"a": [1, (2, {"lock": threading.Lock()})]},
}
"""What stock `torch.save` cannot save either."""


def same(a: Any, b: Any) -> bool:
    """Whether two values have one type, one structure, and the same bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, TwoTensor):
        return same(a.a, b.a) and same(a.b, b.b)
    if isinstance(a, torch.nn.parameter.UninitializedParameter):
        return True
    if isinstance(a, torch.Tensor):
        if a.layout is torch.jagged:
            return _same_tensors(a, b)
        return _same_tensors(a, b) and a.__dict__.keys() == b.__dict__.keys() and _same_parts(a.__dict__, b.__dict__)
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    if isinstance(a, torch.UntypedStorage | torch.storage.TypedStorage):
        return a.tolist() == b.tolist()
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
    return _same_parts(a, b)


def _same_parts(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        keys = [*map(str, a)] == [*map(str, b)]
        return keys and all(same(x, y) for x, y in zip(a.values(), b.values(), strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
    torch.jagged: ("values", "offsets"),
}


def _same_tensors(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.dtype, a.layout, a.device, a.requires_grad) != (b.dtype, b.layout, b.device, b.requires_grad):
        return False
    if a.layout in _PARTS:
        return all(same(getattr(a, part)().detach(), getattr(b, part)().detach()) for part in _PARTS[a.layout])
    if a.is_nested:
        return all(same(x, y) for x, y in zip(a.unbind(), b.unbind(), strict=True))
    if (a.shape, a.stride(), a.is_conj(), a.is_neg()) != (b.shape, b.stride(), b.is_conj(), b.is_neg()):
        return False
    if a.is_quantized:
        return (
            a.qscheme() == b.qscheme()
            and torch.equal(a.dequantize(), b.dequantize())
            and same(a.int_repr(), b.int_repr())
        )
    if a.is_meta or a.numel() == 0:
        return True
    return bytes(a.detach().untyped_storage()[_span(a)]) == bytes(b.detach().untyped_storage()[_span(b)])


def _span(tensor: torch.Tensor) -> slice:
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.storage_offset() * tensor.element_size()
    return slice(start, start + (last + 1) * tensor.element_size())


def allowed() -> list[str]:
    """The names for `load.allow` that loading `STATE` needs."""
    return [
        *(f"{__name__}.{name}" for name in ("Sub", "Watching", "Color", "Best", "Point")),
        *("torch.testing._internal.two_tensor.TwoTensor", "torch.nn.parameter.UninitializedParameter"),
        *("torch.nn.utils.rnn.PackedSequence",),
    ]


REFUSED = frozenset(
    ["generator", "array of objects", "array", "NumPy scalar", "path", "uninitialised parameter", "packed sequence"]
)
"""Of `STATE`, what a safe load refuses even so; `torch.load` without `weights_only` takes it."""


def ordered(kinds: dict[str, Callable[[], Any]]) -> OrderedDict[str, Any]:
    torch.manual_seed(7)
    return OrderedDict((name, make()) for name, make in kinds.items())
