"""Scripts that tidy up where checkpoints are saved, as users write them for stock DeepSpeed: nothing may get worse."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import World

SCRIPTS = [
    *("oldest_folders", "all_but_the_newest", "whole_directory", "contents", "directory_renamed"),
    *("hidden_below", "hidden_below_and_beside", "all_beside"),
]
QUICK = {
    *(("held", script) for script in ("oldest_folders", "all_beside")),
    *(("sync", script) for script in ("whole_directory", "hidden_below_and_beside")),
}
"""What `make test` tries."""

TRIED = [
    pytest.param(script, mode, marks=[] if (mode, script) in QUICK else [pytest.mark.long])
    for script in SCRIPTS
    for mode in ("sync", "held", "async")
]


@pytest.mark.parametrize(("script", "mode"), TRIED)
def test_saves_go_on_and_the_last_one_loads_as_with_stock(
    two_ranks: World, tmp_path: Path, script: str, mode: str
) -> None:
    for ours, stock in two_ranks.call("rotation_cases:beside_stock", str(tmp_path), script, mode):
        assert (stock.errors, stock.latest, stock.goes_on) == ([], "step4", True)
        assert (ours.errors, ours.latest, ours.loaded, ours.goes_on) == ([], stock.latest, stock.loaded, True)
        assert ours.left == stock.left if mode == "sync" else {"latest", "step4"} <= set(ours.left)
