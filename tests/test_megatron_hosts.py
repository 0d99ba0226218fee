"""How verl and ms-swift call Megatron-core: their own modules, unchanged, after `import roll_ckpt.megatron`.

`make megatron-lm` puts both packages, without what they depend on, into a folder of their own, for this test only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from worlds import ROOT, World

HOSTS = Path(os.environ.get("MEGATRON_HOSTS", ROOT / ".venv" / "megatron_hosts"))

pytestmark = pytest.mark.skipif(
    not HOSTS.is_dir(), reason=f"{HOSTS} holds no verl and ms-swift; `make megatron-lm` installs them"
)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with mock.patch.dict(os.environ, TORCHDYNAMO_DISABLE="1"):
        world = World(2)  # of its own: what is installed there stays
    yield world
    world.close()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_verl_saves_and_loads_through_us(world: World, tmp_path: Path, is_async: bool) -> None:
    for told in world.call("megatron_hosts_cases:save_as_verl", str(HOSTS), str(tmp_path), is_async):
        assert len(told) > 2 and all(told.values()), told


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_swift_saves_and_loads_through_us_and_its_tracker_never_runs_ahead(
    world: World, tmp_path: Path, is_async: bool
) -> None:
    for told in world.call("megatron_hosts_cases:save_as_swift", str(HOSTS), str(tmp_path), is_async):
        assert told.pop("tracker") == "2" and not told.pop("premature"), told
        assert len(told) > 2 and all(told.values()), told
