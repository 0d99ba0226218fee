"""However many saves a run makes, it holds no more for it: no descriptor, thread, memory, file or entry of a table."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from megatron_worlds import MISSING, Worlds

HERE = Path(__file__).parent
WARM = 0.25  # of the samples: until then, caches and bounded tables fill


def samples(how: str, output_dir: Path, saves: int) -> list[dict[str, Any]]:
    command = [sys.executable, str(HERE / "long_runs.py"), how, str(output_dir), str(saves)]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_flat(found: list[dict[str, Any]], scattered: int = 2 << 20) -> None:
    """Nothing has become more since the warm-up, but memory by what an allocator scatters, in bytes."""
    before, after = found[: int(len(found) * WARM)], found[int(len(found) * WARM) :]
    saves = after[-1]["saves"] - before[-1]["saves"]
    for key in ("descriptors", "threads"):
        # A thread of a save may be on its way out in any sample; what leaks is in all of them.
        assert min(one[key] for one in after[-5:]) <= max(one[key] for one in before), (
            key,
            [one[key] for one in found],
        )
    assert max(len(one["left"]) for one in after) <= max(len(one["left"]) for one in before), after[-1]["left"]
    for key, size in after[-1]["tables"].items():
        assert size <= max(one["tables"].get(key, 0) for one in before), (key, size)
    assert {one.get("used_bytes", 0) for one in found} == {0} and {one.get("running", 0) for one in found} == {0}
    # Not one Python object for every twentieth save.
    blocks = [one["blocks"] for one in after]
    assert statistics.median(blocks[-5:]) - statistics.median(blocks[:5]) < 200 + saves / 20, blocks
    memory = [one["rss"] for one in after]
    assert statistics.median(memory[-5:]) - statistics.median(memory[:5]) < scattered + 50 * saves, memory


@pytest.mark.parametrize(
    ("how", "saves"),
    [
        ("transaction", 300),
        ("corridor", 200),
        pytest.param("transaction", 10_000, marks=pytest.mark.long),
        pytest.param("corridor", 5_000, marks=pytest.mark.long),
    ],
)
def test_many_saves_leave_no_more_behind_than_a_few(folder: Path, how: str, saves: int) -> None:
    found = samples(how, folder / "run", saves)
    assert found[-1]["saves"] == saves
    assert_flat(found)
    first, last = found[: len(found) // 10], found[-(len(found) // 10) :]
    for name, part in (("first", first), ("last", last)):
        each_s = statistics.median(one["seconds"] for one in part)
        print(f"{how}: {1e3 * each_s:.1f} ms of processors a save, the {name} tenth")


@pytest.mark.long
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_pipeline_that_saves_often_leaves_no_more_behind(folder: Path) -> None:
    worlds = Worlds()
    try:
        for found in worlds.at("DP2").call("mixed_cases:many_saves", str(folder / "run"), 120):
            assert_flat(found, 16 << 20)  # two frameworks train
    finally:
        worlds.close()
