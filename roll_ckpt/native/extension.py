"""The compiled half of roll_ckpt, imported here alone: its classes and functions under their own names."""

from __future__ import annotations

try:
    from roll_ckpt.native import _native
    from roll_ckpt.native._native import Arena, Buffer, Digest, address_of, crc32, crc32_combine
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
    "crc32_combine",
    "cuda_compiled",
    "cuda_status",
]

cuda_compiled: bool = _native.cuda_compiled
"""Whether this build has its CUDA part."""


def cuda_status() -> str:
    """The reason why no CUDA device can be used, "" if one can. Makes no CUDA context."""
    return _native.cuda_status()
