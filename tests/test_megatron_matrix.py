"""Every Megatron layout against every other, on two and four ranks: `make matrix`, many minutes on 2 cores.

Each checkpoint is made once and loaded by stock code and by us in each layout. tests/test_megatron.py is the short
form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from megatron_worlds import FORMS, LAYOUTS, MISSING, Saved, Worlds, sizes

pytestmark = [pytest.mark.skipif(bool(MISSING), reason=MISSING), pytest.mark.matrix]

Save = Callable[..., Saved]


@pytest.fixture(scope="module")
def save(megatron: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Save]:
    """`Worlds.save`, once for the same arguments."""
    made: dict[tuple[str, ...], Saved] = {}

    def once(*told: str) -> Saved:
        if told not in made:
            made[told] = megatron.save(tmp_path_factory.mktemp("_".join(told).replace(" ", "_")) / "iter_2", *told)
        return made[told]

    yield once


def same_model_parallel(one: str, other: str) -> bool:
    """Whether they differ in data parallelism at most."""
    return {**sizes(one), "dp": 0} == {**sizes(other), "dp": 0}


PAIRS = [(saved, loaded) for saved in LAYOUTS for loaded in LAYOUTS]
WITHIN = [pair for pair in PAIRS if same_model_parallel(*pair)]
ACROSS = [pair for pair in PAIRS if not same_model_parallel(*pair)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("saved_in", "loaded_in"), PAIRS)
def test_what_we_saved_is_loaded_in_every_layout_by_stock_and_by_us(
    megatron: Worlds, save: Save, saved_in: str, loaded_in: str, precision: str
) -> None:
    saved = save(saved_in, precision)
    megatron.check_load(saved, loaded_in, "ours")
    megatron.check_load(saved, loaded_in, "stock")


@pytest.mark.parametrize(("saved_in", "loaded_in"), PAIRS)
def test_what_stock_saved_is_loaded_in_every_layout_by_us(
    megatron: Worlds, save: Save, saved_in: str, loaded_in: str
) -> None:
    megatron.check_load(save(saved_in, "fp32", "stock"), loaded_in, "ours")


@pytest.mark.parametrize("who", ["ours", "stock"])
@pytest.mark.parametrize(("saved_in", "loaded_in"), WITHIN)
def test_dp_reshardable_is_loaded_with_any_data_parallel_size(
    megatron: Worlds, save: Save, saved_in: str, loaded_in: str, who: str
) -> None:
    saved = save(saved_in, "fp32", who, "dp_reshardable")
    megatron.check_load(saved, loaded_in, "ours")
    megatron.check_load(saved, loaded_in, "stock")


@pytest.mark.parametrize(("saved_in", "loaded_in"), ACROSS)
def test_dp_reshardable_is_refused_by_name_in_another_layout(
    megatron: Worlds, save: Save, saved_in: str, loaded_in: str
) -> None:
    saved = save(saved_in, "fp32", "ours", "dp_reshardable")
    for told, untouched in megatron.call(loaded_in, "refusal_of_load", str(saved.directory)):
        assert told.startswith("UnsupportedError") and "dp_reshardable" in told
        assert untouched


@pytest.mark.parametrize(("saved_in", "loaded_in"), ACROSS)
def test_dp_reshardable_of_stock_is_not_loaded_in_another_layout(
    megatron: Worlds, save: Save, saved_in: str, loaded_in: str
) -> None:
    saved = save(saved_in, "fp32", "stock", "dp_reshardable")
    for told, untouched in megatron.call(loaded_in, "refusal_of_load", str(saved.directory)):
        assert told.startswith("ModelMismatch") and "dp_reshardable" in told
        assert untouched


@pytest.mark.parametrize("sharding_type", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_states_make_the_difference_under_dropout(
    megatron: Worlds, tmp_path: Path, layout: str, sharding_type: str
) -> None:
    for told in megatron.call(layout, "resume_with_dropout", str(tmp_path / "iter_2"), sharding_type):
        assert told["resumed"] == told["unbroken"]
        assert told["without random states"] != told["unbroken"]
        assert told["without tracker"] != told["unbroken"]
