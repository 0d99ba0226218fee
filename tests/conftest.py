from __future__ import annotations

from collections.abc import Iterator

import pytest
from worlds import World


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[World]:
    """A torchrun world of two ranks with DeepSpeed on CPU and gloo, shared by the whole session."""
    world = World(2)
    yield world
    world.close()
