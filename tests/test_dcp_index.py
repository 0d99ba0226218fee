"""The index and the pickled objects of a torch_dist directory: read without running what a stranger put there."""

from __future__ import annotations

import collections
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, MetadataIndex

from roll_ckpt.errors import Damaged, NotFound, UnsupportedError
from roll_ckpt.formats.dcp import index as dcp_index


class Evil:
    """Unpickled without restriction, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """What stock torch.distributed.checkpoint writes: a tensor in bf16, and an object."""
    directory = tmp_path / "saved"
    state = {"weight": torch.arange(12).reshape(3, 4).bfloat16(), "step": {"at": 7, "rate": 0.5}}
    dcp.save(state, checkpoint_id=str(directory))
    return directory


def rewrite(directory: Path, change: Callable[[Metadata], object]) -> None:
    index = pickle.loads((directory / ".metadata").read_bytes())
    changed = change(index)
    (directory / ".metadata").write_bytes(pickle.dumps(index if changed is None else changed))


def put_object(directory: Path, data: bytes) -> None:
    """Let the object `step.at` be these bytes, at the end of its file."""

    def change(index: Metadata) -> None:
        place = index.storage_data[MetadataIndex("step.at")]
        end = (directory / place.relative_path).stat().st_size
        with (directory / place.relative_path).open("ab") as file:
            file.write(data)
        index.storage_data[MetadataIndex("step.at")] = _StorageInfo(place.relative_path, end, len(data))

    rewrite(directory, change)


def test_what_stock_wrote_is_read_whole(saved: Path) -> None:
    index = dcp_index.read(saved)
    assert index == pickle.loads((saved / ".metadata").read_bytes())
    assert index.state_dict_metadata["weight"].properties.dtype is torch.bfloat16  # type: ignore[union-attr]
    dcp_index.check_objects(saved, index)


def test_code_in_the_index_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    rewrite(saved, lambda index: setattr(index, "planner_data", Evil(mark)))
    with pytest.raises(UnsupportedError, match=r"posix\.mkdir.*load\.allow"):
        dcp_index.read(saved)
    assert not mark.exists()
    pickle.loads((saved / ".metadata").read_bytes())
    assert mark.exists(), "read without restriction, it would have run"


BUILDS = {
    "torch.distributed.checkpoint.metadata\nMetadataIndex": MetadataIndex,
    "torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING": _MEM_FORMAT_ENCODING,
    "pathlib\nPosixPath": Path,
    "torch.serialization\n_get_layout": torch.serialization._get_layout,
}


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("slots", [True, False])
def test_an_index_cannot_rewrite_classes_and_functions(saved: Path, name: str, slots: bool) -> None:
    mark = "__doc__" if slots else "__name__"
    before = getattr(BUILDS[name], mark)
    state = {mark: "changed"}
    told = pickle.dumps((None, state) if slots else state, protocol=2)[2:-1]
    (saved / ".metadata").write_bytes(b"\x80\x02c" + name.encode() + b"\n" + told + b"b.")
    with pytest.raises(Damaged, match="it sets attributes"):
        dcp_index.read(saved)
    assert getattr(BUILDS[name], mark) == before


def test_an_index_whose_tables_are_none_is_damaged(saved: Path) -> None:
    rewrite(saved, lambda index: setattr(index, "state_dict_metadata", [1]))
    with pytest.raises(Damaged, match="no index"):
        dcp_index.read(saved)


def test_torchs_environment_does_not_loosen_the_check(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    mark = tmp_path / "ran"
    torch.save({"common": Evil(mark)}, saved / "common.pt")
    with pytest.raises(UnsupportedError, match=r"common\.pt.*load\.allow"):
        dcp_index.read_file(saved / "common.pt")
    assert not mark.exists()
    torch.load(saved / "common.pt")
    assert mark.exists(), "stock code would have run it"


def test_code_in_an_object_is_refused_and_not_run(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    stream = io.BytesIO()
    torch.save(Evil(mark), stream)
    put_object(saved, stream.getvalue())
    index = dcp_index.read(saved)
    with pytest.raises(UnsupportedError, match=r"step\.at.*load\.allow"):
        dcp_index.check_objects(saved, index)
    assert not mark.exists()
    dcp.load({"weight": torch.zeros(3, 4), "step": {"at": 0, "rate": 0.0}}, checkpoint_id=str(saved))
    assert mark.exists(), "stock code would have run it"


def test_each_object_is_checked_by_one_of_the_ranks(saved: Path, tmp_path: Path) -> None:
    put_object(saved, b"no archive")
    index = dcp_index.read(saved)
    refused = []
    for part in range(2):
        try:
            dcp_index.check_objects(saved, index, part=part, parts=2)
        except Damaged:
            refused.append(part)
    assert len(refused) == 1


def test_a_class_that_the_user_allows_may_be_in_the_index(saved: Path) -> None:
    rewrite(saved, lambda index: setattr(index, "planner_data", collections.Counter("aab")))
    with pytest.raises(UnsupportedError, match="Counter"):
        dcp_index.read(saved)
    assert dcp_index.read(saved, [collections.Counter]).planner_data == {"a": 2, "b": 1}


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/b", "", "nowhere.distcp", ".", 7])
def test_places_outside_of_the_directory_are_refused(saved: Path, name: Any) -> None:
    (saved.parent / "outside").write_bytes(b"x" * 100_000)

    def change(index: Metadata) -> None:
        index.storage_data[MetadataIndex("step.at")] = _StorageInfo(name, 0, 1)

    rewrite(saved, change)
    with pytest.raises(Damaged, match=r"\.metadata: step\.at"):
        dcp_index.read(saved)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**9), (10**9, 1), (-1, 1), (5, -2)])
def test_places_beyond_the_end_of_a_file_are_refused(saved: Path, offset: int, length: int) -> None:
    def change(index: Metadata) -> None:
        key = MetadataIndex("step.at")
        index.storage_data[key] = _StorageInfo(index.storage_data[key].relative_path, offset, length)

    rewrite(saved, change)
    with pytest.raises(Damaged, match="cut off"):
        dcp_index.read(saved)


def test_a_link_to_a_file_is_read_and_a_link_to_none_is_refused(saved: Path) -> None:
    file = next(saved.glob("*.distcp"))
    file.rename(saved.parent / "elsewhere")
    file.symlink_to(saved.parent / "elsewhere")
    dcp_index.read(saved)  # a download may leave links into a cache
    (saved.parent / "elsewhere").unlink()
    with pytest.raises(Damaged, match="no regular file"):
        dcp_index.read(saved)


def test_a_truncated_index_and_what_is_none_are_damaged(saved: Path) -> None:
    data = (saved / ".metadata").read_bytes()
    for cut in range(0, len(data), 37):
        (saved / ".metadata").write_bytes(data[:cut])
        with pytest.raises(Damaged, match=r"\.metadata"):
            dcp_index.read(saved)
    (saved / ".metadata").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(Damaged, match="list"):
        dcp_index.read(saved)
    (saved / ".metadata").unlink()
    with pytest.raises(NotFound, match=r"\.metadata"):
        dcp_index.read(saved)


def test_any_flipped_byte_of_the_index_is_read_or_damaged_but_runs_nothing(saved: Path) -> None:
    data = (saved / ".metadata").read_bytes()
    for at in range(0, len(data), 5):
        broken = bytearray(data)
        broken[at] ^= 0x41
        (saved / ".metadata").write_bytes(broken)
        try:
            dcp_index.read(saved)
        except (Damaged, UnsupportedError):  # a name that is on no list
            continue


class ByName:
    """Pickled as some versions of Python pickle the member of an enumeration: by `getattr`."""

    def __init__(self, kind: Any, name: str) -> None:
        self.found = kind, name

    def __reduce__(self) -> Any:
        return getattr, self.found


def test_getattr_finds_members_of_enumerations_and_nothing_else(saved: Path) -> None:
    rewrite(saved, lambda index: setattr(index, "planner_data", ByName(_MEM_FORMAT_ENCODING, "TORCH_CHANNELS_LAST")))
    assert dcp_index.read(saved).planner_data is _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    for kind, name in ((Metadata, "__init__"), (_MEM_FORMAT_ENCODING, "__class__"), (_MEM_FORMAT_ENCODING, "mro")):
        rewrite_raw(saved, ByName(kind, name))
        with pytest.raises(Damaged, match=r"\.metadata"):
            dcp_index.read(saved)


def rewrite_raw(directory: Path, planner_data: object) -> None:
    index = Metadata({}, planner_data, {})
    (directory / ".metadata").write_bytes(pickle.dumps(index))
