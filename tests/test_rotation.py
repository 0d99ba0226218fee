"""Scripts that tidy up where checkpoints are saved, as users write them for stock DeepSpeed: nothing may get worse."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import World

SCRIPTS = [
    *("oldest_folders", "all_but_the_newest", "whole_directory", "contents", "directory_renamed"),
    *("hidden_below", "hidden_below_and_beside", "all_beside"),
]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_saves_go_on_and_the_last_one_loads_as_with_stock(
    two_ranks: World, tmp_path: Path, script: str, asynchronous: bool
) -> None:
    for ours, stock in two_ranks.call("rotation_cases:beside_stock", str(tmp_path), script, asynchronous):
        assert (stock.errors, stock.latest, stock.goes_on) == ([], "step4", True)
        assert (ours.errors, ours.latest, ours.loaded, ours.goes_on) == ([], stock.latest, stock.loaded, True)
        assert set(ours.left) >= set(stock.left)
        assert asynchronous or ours.left == stock.left
