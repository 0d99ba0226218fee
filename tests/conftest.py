from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from megatron_worlds import Worlds
from worlds import World

if TYPE_CHECKING:
    from pairs import Pair

LEFT_OUT = {
    "matrix": "every Megatron layout against every other, for minutes",
    "long": "what takes long and repeats in depth what a shorter test shows",
}
"""Run only when asked for by name: `pytest -m long`."""

CORE = (
    "core(part): what has to hold with every version of `part`, a column of the table in docs/support.md (make compat)"
)
"""Run in depth too: those that are long are run by `pytest -m core`."""


def pytest_configure(config: pytest.Config) -> None:
    for name, about in LEFT_OUT.items():
        config.addinivalue_line("markers", f"{name}: {about}; left out unless asked for (pytest -m {name})")
    config.addinivalue_line("markers", CORE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m")
    unasked = [name for name in LEFT_OUT if name not in asked]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unasked)]
    if "core" in asked:
        left_out = [item for item in left_out if not item.get_closest_marker("core")]
    for item in items:
        if core := item.get_closest_marker("core"):
            item.user_properties.append(("core", core.args[0]))
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A new directory, in memory where that can be: for thousands of small files."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as made:
        yield Path(made)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    """See `pairs.pair_in`."""
    from pairs import pair_in  # torch, which most tests do without

    return pair_in(tmp_path)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[World]:
    """A torchrun world of two ranks with DeepSpeed on CPU and gloo, shared by the whole session."""
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def megatron() -> Iterator[Worlds]:
    """Worlds of their own for Megatron: the patches of tests/megatron_cpu.py are for good."""
    worlds = Worlds()
    yield worlds
    worlds.close()
