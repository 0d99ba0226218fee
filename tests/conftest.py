from __future__ import annotations

from collections.abc import Iterator

import pytest
from megatron_worlds import Worlds
from worlds import World

MATRIX = "matrix: every Megatron layout against every other, for minutes; left out unless asked for (pytest -m matrix)"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MATRIX)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "matrix" in config.getoption("-m"):
        return
    left_out = [item for item in items if item.get_closest_marker("matrix")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
