"""What is saved is loaded: values of Python, its library and NumPy without a setting, others by the names we tell."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_values
import torch
from saved_values import Plain, WithState, plain_values, same, values_for_allow
from worlds import World

from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, UnsupportedError
from roll_ckpt.formats.torch_zip import safe_pickle
from roll_ckpt.formats.torch_zip.read import parse
from roll_ckpt.load import trust
from roll_ckpt.load.reader import Reader

HERE = "some/file.pt"


def saved(state: object, protocol: int = 2) -> bytearray:
    file = io.BytesIO()
    torch.save(state, file, pickle_protocol=protocol)
    return bytearray(file.getvalue())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("key", plain_values())
def test_a_plain_value_loads_without_a_setting(key: str, protocol: int) -> None:
    value = plain_values()[key]
    assert same(parse(saved({key: value}, protocol), HERE)[key], value)
    assert safe_pickle.unsafe_parts({key: value}) == {}


def test_arrays_that_are_one_are_one_again_and_can_be_written() -> None:
    array = np.arange(3)
    found = parse(saved({"a": array, "b": [array], "dtype": array.dtype, "c": np.zeros(2, array.dtype)}), HERE)
    assert found["a"] is found["b"][0] and found["a"].flags.owndata
    found["a"][0] = 7
    turned = np.arange(3, dtype=">i4")  # stock NumPy loads it in the order of this machine
    assert same(parse(saved(turned), HERE), turned)


def allow(names: list[str]) -> list[Any]:
    return trust.allowed(Settings.parse({"load": {"allow": names}}, "the test"))


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.nn.Module):
        return all(map(torch.equal, a.parameters(), b.parameters()))
    if isinstance(a, BaseException):
        return type(a) is type(b) and a.args == b.args
    if hasattr(a, "random_raw"):
        return same(a.state, b.state)
    if isinstance(a, np.ndarray):
        return type(a) is type(b) and repr(a) == repr(b)
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("key", values_for_allow())
def test_the_names_that_the_save_and_the_refusal_tell_are_all_that_a_load_needs(key: str) -> None:
    state = {"plain": 1, key: values_for_allow()[key], "after": [2]}
    found = safe_pickle.unsafe_parts(state)
    assert list(found) == [key] and found[key].names and not found[key].reasons
    names = found[key].names
    with pytest.raises(UnsupportedError) as caught:
        parse(saved(state), HERE)
    assert f"load.allow: [{', '.join(names)}]" in str(caught.value) and f"its entry {key!r}" in str(caught.value)
    assert is_equal(parse(saved(state), HERE, allow=allow(names))[key], state[key])
    assert safe_pickle.unsafe_parts(state, allow(names)) == {}
    for left_out in names:
        with pytest.raises(UnsupportedError, match=left_out):
            parse(saved(state), HERE, allow=allow([name for name in names if name != left_out]))


def test_neither_the_check_at_a_save_nor_a_refused_load_runs_code_of_the_user() -> None:
    state = {"a": WithState(1)}
    WithState.calls.clear()
    assert safe_pickle.unsafe_parts(state, [WithState]) == {}
    with pytest.raises(UnsupportedError):
        parse(saved(state), HERE)
    assert WithState.calls == []
    parse(saved(state), HERE, allow=[WithState])
    assert WithState.calls == ["setstate"]


def test_what_no_setting_allows_is_told_at_the_save_and_by_the_load() -> None:
    state = {"records": np.zeros(2, [("a", "f4"), ("b", "i8")]), "fine": 1}
    assert "structured" in str(safe_pickle.unsafe_parts(state)["records"])
    with pytest.raises(UnsupportedError, match=r"'records'.*structured.*no setting") as caught:
        parse(saved(state), HERE)
    assert "load.allow" not in str(caught.value)


def test_a_class_that_this_process_has_not_imported_is_not_imported_but_named(tmp_path: Path) -> None:
    (tmp_path / "s.pt").write_bytes(saved({"a": Plain("x")}))
    code = (
        "import sys; from roll_ckpt.formats.torch_zip.read import parse\n"
        f"try: parse(bytearray(open({str(tmp_path / 's.pt')!r}, 'rb').read()), 'it')\n"
        "except NotImplementedError as problem: print(problem)\n"
        "print('saved_values' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "load.allow: [saved_values.Plain]" in done.stdout and done.stdout.endswith("False\n")


def test_a_stock_file_is_read_by_the_same_rules_also_behind_a_link(tmp_path: Path) -> None:
    state = plain_values()
    torch.save(state, tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to("real.pt")
    reader = Reader(tmp_path, Settings(), ())
    for name in ("real.pt", "link.pt"):
        assert same(reader.load(tmp_path / name, "cpu"), state)
    torch.save({"a": torch.arange(3), "b": 1}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert same(reader.load(tmp_path / "old.pt", "cpu"), {"a": torch.arange(3), "b": 1})
    torch.save({"a": saved_values.Loose(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"old\.pt.*Loose"):
        reader.load(tmp_path / "old.pt", "cpu")
    (tmp_path / "old.pt").write_bytes(b"garbage" * 99)
    with pytest.raises(Damaged, match=r"old\.pt"):
        reader.load(tmp_path / "old.pt", "cpu")


CASES = "saved_values_cases"


def test_client_states_load_as_stock_loads_them_and_nothing_older_is_taken_for_one_that_is_refused(
    two_ranks: World, tmp_path: Path
) -> None:
    for told in two_ranks.call(f"{CASES}:client_states", str(tmp_path / "run")):
        refused = told.pop("newest")
        assert "'pair'" in refused and "load.allow: [saved_values.Pair]" in refused
        assert told == dict.fromkeys(told, True) and len(told) == 5
    warned = [line for line in two_ranks.log().splitlines() if str(tmp_path) in line and "safe load refuses" in line]
    assert warned and all("'pair'" in line and "load.allow: [saved_values.Pair]" in line for line in warned)


def test_a_component_that_one_rank_cannot_load_is_refused_on_all_before_anything_changes(
    two_ranks: World, tmp_path: Path
) -> None:
    for told in two_ranks.call(f"{CASES}:components", str(tmp_path / "run")):
        assert told["plain"] is True and told["untouched"] is True
        assert "rank_1" in told["pair"] or "mine" in told["pair"]
        assert "load.allow: [saved_values.Pair]" in told["pair"]
