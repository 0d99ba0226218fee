"""The only importer of the compiled module `_native` (sources: csrc/); gives its classes and functions their names."""

from __future__ import annotations

try:
    from roll_ckpt.native import _native
    from roll_ckpt.native._native import Arena, Buffer, Digest, address_of, crc32
except ImportError as error:
    raise ImportError(
        f"the extension roll_ckpt.native._native cannot be loaded ({error}): build it with `pip install .`, "
        "or with `python setup.py build_ext --inplace` in a source checkout"
    ) from error

__all__ = [
    "Arena",
    "Buffer",
    "Digest",
    "_native",
    "address_of",
    "crc32",
    "cuda_compiled",
    "cuda_status",
]

cuda_compiled: bool = _native.cuda_compiled
"""Whether the extension was built with CUDA."""


def cuda_status() -> str:
    """Why no CUDA device can be used; "" if one can. Creates no CUDA context."""
    return _native.cuda_status()
