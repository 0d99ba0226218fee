"""Unusual and legal state is saved as stock torch saves it; what cannot be saved is told at the first save, by key."""

from __future__ import annotations

import collections
import datetime
import io
import json
import logging
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import unusual
from megatron_worlds import MISSING, Worlds
from worlds import World

from roll_ckpt import WorkerState, process
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, SaveFailed
from roll_ckpt.formats.torch_zip import layout, sources, unsavable
from roll_ckpt.state import StateSaver

CASES = "unusual_cases"


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    with process.installed(process.Process()):
        yield


def saver() -> StateSaver:
    values = {"staging": {"arena_bytes": 16 << 20}, "load": {"allow": unusual.allowed()}}
    return StateSaver(Settings.parse(values, "the test"))


# ---- legal


def test_a_saver_saves_every_kind_as_stock_torch_does_and_again_by_the_same_layout(tmp_path: Path) -> None:
    ours, state = saver(), dict(unusual.ordered(unusual.STATE))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    stock = torch.load(file, weights_only=False)
    for step in (1, 2):
        ours.save(state, tmp_path / f"step_{step}", step=step)
        found = torch.load(tmp_path / f"step_{step}" / "state_rank_0.pt", weights_only=False)
        assert [name for name in stock if not unusual.same(found[name], stock[name])] == []
    safe = {name: value for name, value in state.items() if name not in unusual.REFUSED}
    ours.save(safe, tmp_path / "safe")
    loaded = ours.load(tmp_path / "safe")
    assert [name for name in safe if not unusual.same(loaded[name], stock[name])] == []


def test_each_kind_is_estimated_by_the_bytes_that_it_takes() -> None:
    for name, make in unusual.STATE.items():
        value = make()
        nbytes = layout.lay_out({"value": value}, "s").nbytes
        if isinstance(value, torch.Tensor):
            assert 0 <= sources.bytes_of([value]) <= nbytes, name
    sparse, mkldnn = torch.eye(100).to_sparse(), torch.ones(2, 2).to_mkldnn()
    assert sources.bytes_of([sparse]) == 100 * (2 * 8 + 4)
    assert sources.bytes_of([mkldnn, torch.ones(8)[::2], torch.ones(2)]) == 7 * 4 + 2 * 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_saves_every_kind_of_buffer_and_client_state(two_ranks: World, tmp_path: Path, stage: int) -> None:
    told = two_ranks.call(f"{CASES}:save_all_kinds", str(tmp_path / "run"), stage)
    for found in told:
        assert found["differing"] == [] and found["problems"] == []
        assert found["files"] == (4 if stage == 3 else 2)
    assert sum(found["index"] for found in told) > len(unusual.BUFFERS) / 2


def test_a_pipeline_saves_every_kind_in_components_and_client_state(two_ranks: World, tmp_path: Path) -> None:
    assert two_ranks.call(f"{CASES}:pipeline_of_all_kinds", str(tmp_path / "run")) == [[], []]


# ---- impossible


@pytest.mark.parametrize("name", unusual.IMPOSSIBLE)
def test_what_cannot_be_saved_is_named_by_its_key_and_stock_cannot_save_it_either(tmp_path: Path, name: str) -> None:
    state = {"fine": torch.ones(2), "foo": unusual.IMPOSSIBLE[name]()}
    with pytest.raises(Exception):  # noqa: B017
        torch.save(state, io.BytesIO())
    with pytest.raises(SaveFailed, match=r"state\['foo'\].*cannot be saved"):
        saver().save(state, tmp_path / "run" / "one")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SaveFailed, match=r"^client_state\['foo'\].*cannot be saved"):
        unsavable.check(state, "client_state")


def test_a_check_takes_what_can_be_saved() -> None:
    for name, make in unusual.STATE.items():
        unsavable.check({name: make()}, "client_state")


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"a": {"b": [1, (threading.Lock(),)]}}, "['a']['b'][1][0]: "),
        ({"a": {3: threading.Lock()}}, "['a'][3]: "),
        ({"a": {(1, threading.Lock): unusual.IMPOSSIBLE["lambda"]()}}, "['a'][(1, "),
        ({"a": {unusual.IMPOSSIBLE["lambda"](): 1}}, "['a'] key "),
        (threading.Lock(), ": cannot"),
    ],
)
def test_the_path_leads_to_the_guilty_entry(state: Any, path: str) -> None:
    with pytest.raises(SaveFailed) as told:
        unsavable.check(state, "root")
    assert str(told.value).startswith("root" + path)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_impossible_client_state_is_raised_on_every_rank_before_anything_is_written(
    two_ranks: World, tmp_path: Path, rank: int
) -> None:
    first, second = two_ranks.call(f"{CASES}:impossible_client_state", str(tmp_path), rank)
    assert first == second
    for name, found in first.items():
        key = "now" if name == "later" else "foo"
        assert found["told"].startswith("SaveFailed: ") and not found["left"], name
        assert f"rank {rank}: client_state['{key}']" in found["told"] and "cannot be saved" in found["told"], name


def test_who_does_not_save_the_client_state_may_have_any(two_ranks: World, tmp_path: Path) -> None:
    told = two_ranks.call(f"{CASES}:client_state_of_who_does_not_save_it", str(tmp_path))
    assert told == [["nothing was raised"]] * 2


@pytest.mark.parametrize("stage", [1, 3])
def test_a_module_that_cannot_be_saved_is_told_on_every_rank_at_the_first_save(
    two_ranks: World, tmp_path: Path, stage: int
) -> None:
    for found in two_ranks.call(f"{CASES}:impossible_module", str(tmp_path / "run"), stage):
        for told in (found["first"], found["again"]):
            assert (
                told.startswith("SaveFailed: ") and "rank 0" in told and "states.pt ['module']['hook']: cannot" in told
            )
        assert found["left"] == [] and found["good"] and found["kept"] == ["good", "latest"]
        assert found["later"] == "nothing was raised" and found["collectives"] == 2


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_a_pipeline_cannot_save_is_told_on_every_rank_at_the_first_save(
    two_ranks: World, tmp_path: Path, asynchronous: bool
) -> None:
    for found in two_ranks.call(f"{CASES}:impossible_in_a_pipeline", str(tmp_path / "run"), asynchronous):
        for what, key in (("component", "loader['queue'][0]"), ("client state", "client_state['hook']")):
            told, left = found[what]
            assert told.startswith("SaveFailed: the save was not begun: rank 1") and key in told and not left
        told, left = found["module"]
        assert told.startswith("SaveFailed: ") and "rank 1" in told and "['module']['hook']" in told and not left
        assert found["kept"] == ["checkpoint-1", "latest"]


def test_a_saver_tells_every_rank_at_the_first_save_and_at_a_later_one(two_ranks: World, tmp_path: Path) -> None:
    first, second = two_ranks.call(f"{CASES}:saver_of_what_changes", str(tmp_path / "run"))
    assert first == second
    for told in (first[0], first[2]):
        assert told.startswith("SaveFailed: ") and "rank 1: state['deep']['lock']: cannot be saved" in told
    assert first[1] == "nothing was raised" and first[3:] == ["latest", "step_1"]


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_megatrons_common_state_may_hold_every_kind(megatron: Worlds, tmp_path: Path) -> None:
    told = megatron.at("DP2").call("unusual_megatron_cases:common_of_all_kinds", str(tmp_path / "run"))
    assert told == [[], []]


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_what_megatron_cannot_save_is_told_on_every_rank_before_a_save_begins(megatron: Worlds, tmp_path: Path) -> None:
    for found in megatron.at("DP2").call("unusual_megatron_cases:impossible_parts", str(tmp_path / "run")):
        for what, (told, left) in found.items():
            assert told.startswith("SaveFailed: the save was not begun: rank ") and "cannot be saved" in told, what
            where = "the common state ['common']['foo']" if what.startswith("common") else "mine"
            assert where in told and "['foo']" in told and not left, what


# ---- the state of a pipeline

SELF: list[Any] = []
SELF += [SELF, SELF]
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError("not today")


class Broken(collections.abc.Mapping[str, int]):
    def __getitem__(self, key: str) -> int:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        raise OSError("not today")

    def __len__(self) -> int:
        return 1


EQUAL: dict[str, Any] = {
    "infinity": -math.inf,
    "tuple": (1, (2, "a"), [3]),
    "set": {1, "a", (3, 4), frozenset([5])},
    "other keys": {1: "a", (1, 2): 3, None: 4, 2.5: {5: 6}},
    "our own key": {"__roll_ckpt__": "tuple", "value": [1]},
    "bytes": [b"\0\xff", bytearray(b"x")],
    "complex": 1 + 2j,
    "path": Path("a/b"),
    "dates": [datetime.date(2020, 1, 2), datetime.time(3, 4), datetime.timedelta(-1, 5, 7)],
    "datetimes": [datetime.datetime(2020, 1, 2, 3, 4, 5, 6), datetime.datetime.now(datetime.timezone.utc)],
    "deque": collections.deque([1, 2], maxlen=3),
    "huge number": 10**5000,
    "lone surrogate": "\ud800",
    "long list": list(range(1000)),
    "array": np.arange(6).reshape(2, 3),
    "array of 16 bits": np.array([[1.5, -0.0]], np.float16),
    "array of the other byte order": np.arange(3, dtype=">i4"),
    "complex array": np.array([1 + 2j, 3]),
    "empty array": np.zeros((0, 3)),
    "bools": np.array([True, False]),
    "tensor": torch.randn(2, 3),
    "tensor in bf16": torch.randn(3).bfloat16(),
    "tensor in float8": torch.randn(3).to(torch.float8_e4m3fn),
    "complex tensor": torch.randn(3, dtype=torch.complex64).conj(),
    "integers": torch.tensor([[2**62 + 1]]),
    "expanded": torch.tensor(1.5).expand(3, 2),
    "no elements": torch.empty(0, 3),
}
TEXT: dict[str, Any] = {
    "enum": unusual.Color.RED,
    "dataclass": unusual.Best(),
    "object": object(),
    "unshowable": Unshowable(),
    "broken mapping": Broken(),
    "holds itself": SELF,
    "deep": DEEP,
    "lock": threading.Lock(),
    "lambda": unusual.IMPOSSIBLE["lambda"](),
    "sparse": torch.eye(4).to_sparse(),
    "quantised": unusual.STATE["quantised"](),
    "meta": torch.empty(3, device="meta"),
    "wrapper subclass": unusual.STATE["wrapper subclass"](),
    "huge expanded": torch.tensor(1.0).expand(10**12),
    "objects": np.array([None, 1], dtype=object),
    "words": np.array(["a", "b"]),
    "long text": [object()] and type("Long", (), {"__repr__": lambda self: "x" * 10**6})(),
}


def there_and_back(state: WorkerState) -> WorkerState:
    data = state.to_json()
    assert set(json.loads(data)) == {"step", "log_history", "kv"}
    return WorkerState.from_json(data, "the file")


@pytest.mark.parametrize("name", EQUAL)
def test_what_has_an_equal_comes_back_equal_and_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    value = EQUAL[name]
    back = there_and_back(WorkerState(3, [], {"a": value, "b": [value]}))
    for found in (back.kv["a"], back.kv["b"][0]):
        if isinstance(value, torch.Tensor):
            assert found.dtype is value.dtype and found.shape == value.shape and found.tolist() == value.tolist()
        elif isinstance(value, np.ndarray):
            assert found.dtype == value.dtype.newbyteorder("=") and np.array_equal(found, value)
        else:
            assert type(found) is type(value) and found == value
    assert not caplog.records


@pytest.mark.parametrize("name", TEXT)
def test_anything_else_becomes_short_text_and_is_told_once_for_each_key(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, warned = WorkerState(3, [{"loss": 1, "odd": TEXT[name]}], {"odd": TEXT[name], "step": 2}), set[str]()
    with caplog.at_level(logging.WARNING):
        data = state.to_json(warned)
        assert state.to_json(warned) == data and len(data) < 10_000
    assert sorted(record.args[0] for record in caplog.records) == ["kv['odd']", "log_history: 'odd'"]  # type: ignore[index]
    back = WorkerState.from_json(data, "the file")
    assert back.kv["step"] == 2 and back.log_history[0]["loss"] == 1
    assert isinstance(back.kv["odd"], str | list) and isinstance(back.log_history[0]["odd"], str | list)


def test_scalars_are_numbers_and_nan_stays_nan() -> None:
    kv = {"np": np.float32(1.5), "torch": torch.tensor(2), "bool": np.bool_(True), "nan": [math.nan, np.float64("nan")]}
    back = there_and_back(WorkerState(np.int64(3), [], kv))  # type: ignore[arg-type]
    assert (back.step, back.kv["np"], back.kv["torch"], back.kv["bool"]) == (3, 1.5, 2, True)
    assert all(map(math.isnan, back.kv["nan"]))


def test_the_log_is_for_reading() -> None:
    row = {
        "loss": torch.tensor(0.5), "rewards": torch.ones(2, 2), "array": np.arange(3), "size": (1, {2}), 5: Path("x"),
        "nan": math.nan, "pair": {(1, 2): 3}, "many": torch.zeros(20_000), "complex": torch.ones(1).to(torch.complex64),
    }  # fmt: skip
    back = there_and_back(WorkerState(3, [row, 7, {}], {})).log_history  # type: ignore[list-item]
    assert math.isnan(back[0].pop("nan")) and back[0].pop("many").startswith("tensor([0., 0.")
    assert back == [
        {
            **{"loss": 0.5, "rewards": [[1.0, 1.0], [1.0, 1.0]], "array": [0, 1, 2], "size": [1, [2]], "5": "x"},
            **{"pair": {"(1, 2)": 3}, "complex": [[1.0, 0.0]]},
        },
        {"value": 7},
        {},
    ]


def test_a_state_of_an_older_version_loads_and_the_new_one_is_read_by_plain_json() -> None:
    old = json.dumps({"step": 7, "log_history": [{"loss": 0.5}], "kv": {"a": {"b": [1, None]}}}, indent=1).encode()
    assert WorkerState.from_json(old, "old") == WorkerState(7, [{"loss": 0.5}], {"a": {"b": [1, None]}})
    assert json.loads(WorkerState(7, [{"a": 1}], {"b": (1,)}).to_json()) == {
        "step": 7, "log_history": [{"a": 1}], "kv": {"b": {"__roll_ckpt__": "tuple", "value": [1]}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        *(("unknown", 1), (["list"], 1), ("tuple", 5), ("set", [[1]]), ("dict", [1]), ("int", "zz"), ("bytes", "?")),
        *(("deque", [[1], -5]), ("complex", [1, 2, 3]), ("path", ["x"]), ("datetime", "soon"), ("timedelta", [10**20])),
        *(
            ("ndarray", {"dtype": "O", "shape": [1], "value": [1]}),
            ("ndarray", {"dtype": "f4", "shape": [9**9], "value": []}),
        ),
        *(
            ("tensor", {"dtype": "object", "shape": [], "value": [1]}),
            ("tensor", {"dtype": "int8", "shape": [1], "value": ["x"]}),
        ),
        ("set", [n * (2**61 - 1) for n in range(10_000)]),
        ("dict", [[n * (2**61 - 1), 0] for n in range(10_000)]),
    ],
)
def test_what_was_never_written_is_damage(kind: Any, value: Any) -> None:
    data = json.dumps({"step": 1, "log_history": [], "kv": {"a": {"__roll_ckpt__": kind, "value": value}}}).encode()
    with pytest.raises(Damaged, match="the file"):
        WorkerState.from_json(data, "the file")
