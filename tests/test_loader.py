"""Loading: every byte is checked against the manifest, and another model is refused before anything changes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from corruption import plain_user
from pairs import Pair

# The fixtures and the one-process save of the saver's tests; a loader has nothing to load without one.
from test_saver import SETTINGS, SMALL, begin, out, own_process, save_now, seal, stage  # noqa: F401

from roll_ckpt.config import Settings
from roll_ckpt.disk import reads
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import ConfigError, Damaged, ModelMismatch, Unreadable, UnsupportedError
from roll_ckpt.formats import sealed_json
from roll_ckpt.load import together, trust
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.compare import compare_models
from roll_ckpt.load.reader import open_reader
from roll_ckpt.load.together import open_together
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save import claims
from roll_ckpt.transaction import listing, retention


@pytest.fixture
def checkpoint_dir(out: Path) -> Path:  # noqa: F811
    """A committed checkpoint of two files of one size."""
    save = begin(out)
    cluster_save = (
        stage(save, {"w": torch.arange(1000.0)}, file="a/x.pt")
        if (save.attempt.checkpoint_dir / "a").mkdir() is None
        else None
    )
    assert cluster_save is not None
    cluster_save.parameters = {"w": {"dtype": "float32", "shape": [1000]}}
    stage(save, {"w": torch.arange(1000.0) + 1}, file="x.pt")
    seal(save)
    save.wait(20)
    return out / "t1"


def read(path: Path, settings: Settings = SETTINGS, allow: tuple[Any, ...] = ()) -> Any:
    with open_reader(path.parent, settings, allow) as reader:
        return reader.load(path, "cpu")


def test_a_file_of_a_checkpoint_is_read_back(checkpoint_dir: Path) -> None:
    assert torch.equal(read(checkpoint_dir / "x.pt")["w"], torch.arange(1000.0) + 1)
    assert torch.equal(read(checkpoint_dir / "a" / "x.pt")["w"], torch.arange(1000.0))


def test_names_and_shapes_of_the_model_are_kept(checkpoint_dir: Path) -> None:
    assert OpenedCheckpoint(checkpoint_dir).parameters("model", 0) == {"w": {"dtype": "float32", "shape": [1000]}}
    assert OpenedCheckpoint(checkpoint_dir).parameters("model", 5) == OpenedCheckpoint(checkpoint_dir).parameters(
        "model", 0
    )
    assert OpenedCheckpoint(checkpoint_dir).parameters("critic", 0) == {}


def test_a_record_that_is_gone_is_damage(checkpoint_dir: Path) -> None:
    opened = OpenedCheckpoint(checkpoint_dir)
    (checkpoint_dir / "tensors" / "model.0.index").unlink()
    with pytest.raises(Damaged, match=r"tensors/model\.0\.index: it was committed and is not there"):
        opened.parameters("model", 0)


def test_what_a_disk_refuses_once_is_read_again(checkpoint_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, path = OpenedCheckpoint(checkpoint_dir), checkpoint_dir / "x.pt"
    target = memoryview(bytearray(opened.blocks(path).length(0)))
    refusals = [OSError(116, "Stale file handle", str(path))]
    real = reads.read_into

    def read_into(*asked: Any) -> int:
        if refusals:
            raise refusals.pop()
        return real(*asked)

    monkeypatch.setattr(reads, "read_into", read_into)
    opened.blocks(path).read(0, target)
    assert not refusals and any(target)


def test_a_flipped_byte_anywhere_is_refused_by_the_name_of_its_file(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "x.pt"
    data = path.read_bytes()
    for at in range(0, len(data), len(data) // 23):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        with pytest.raises(Damaged, match=r"t1/x\.pt"):
            read(path)
    path.write_bytes(data)
    read(path)


@pytest.mark.parametrize("change", [-1, 1, -100_000])
def test_a_file_of_another_size_is_refused(checkpoint_dir: Path, change: int) -> None:
    path = checkpoint_dir / "x.pt"
    os.truncate(path, max(0, path.stat().st_size + change))
    with pytest.raises(Damaged, match=r"t1/x\.pt"):
        read(path)


def test_two_files_that_changed_places_are_refused(checkpoint_dir: Path) -> None:
    one, two = checkpoint_dir / "x.pt", checkpoint_dir / "a" / "x.pt"
    assert one.stat().st_size == two.stat().st_size and one.read_bytes() != two.read_bytes()
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    for path in (one, two):
        with pytest.raises(Damaged, match=r"x\.pt"):
            read(path)


def test_digests_that_changed_places_are_refused_although_they_fit_the_bytes(checkpoint_dir: Path) -> None:
    one, two = checkpoint_dir / "x.pt", checkpoint_dir / "a" / "x.pt"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    digests = checkpoint_dir / "digests" / "model.0.json"
    record = json.loads(digests.read_bytes())
    record["x.pt"], record["a/x.pt"] = record["a/x.pt"], record["x.pt"]
    digests.write_bytes(sealed_json.canonical(record))
    with pytest.raises(Damaged, match=r"digests/model\.0\.json"):
        read(one)


def test_digests_are_bound_to_the_manifest_by_their_root(checkpoint_dir: Path) -> None:
    opened = OpenedCheckpoint(checkpoint_dir)
    digests = opened._json("digests/model.0.json")
    digests["x.pt"], digests["a/x.pt"] = digests["a/x.pt"], digests["x.pt"]
    opened._digests = digests
    with pytest.raises(Damaged, match=r"x\.pt: its digests do not match the manifest"):
        opened.read(checkpoint_dir / "x.pt", SETTINGS)


def test_a_file_that_the_manifest_does_not_list_is_refused(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "stranger.pt").write_bytes((checkpoint_dir / "x.pt").read_bytes())
    with pytest.raises(Damaged, match=r"stranger\.pt: not listed in .*manifest\.json as"):
        read(checkpoint_dir / "stranger.pt")


def test_a_listed_file_that_is_gone_is_told_as_such(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "x.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        read(checkpoint_dir / "x.pt")


def test_a_damaged_manifest_is_refused(checkpoint_dir: Path) -> None:
    path = checkpoint_dir / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 1', b'"step": 2'))
    with pytest.raises(Damaged, match=r"manifest\.json"):
        read(checkpoint_dir / "x.pt")


def test_a_checkpoint_that_has_lost_its_manifest_is_refused_until_it_is_none_of_ours(
    checkpoint_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (checkpoint_dir / "manifest.json").unlink()
    for path in (checkpoint_dir / "x.pt", checkpoint_dir / "a" / "x.pt"):
        with pytest.raises(Damaged, match=r"t1: its manifest\.json is missing"):
            read(path)
    (checkpoint_dir / "decision").unlink()
    shutil.rmtree(checkpoint_dir / "votes")
    assert read(checkpoint_dir / "x.pt")["w"].shape == (1000,)
    assert "cannot be verified" in caplog.text


def test_a_checkpoint_whose_manifest_cannot_be_read_is_told_as_such(checkpoint_dir: Path) -> None:
    (checkpoint_dir / "manifest.json").chmod(0)
    with (
        plain_user(),
        pytest.raises(Unreadable, match=r"t1/manifest\.json: it cannot be read: Permission denied"),
    ):
        read(checkpoint_dir / "x.pt")


def test_the_state_is_checked_again_when_it_is_loaded_again(checkpoint_dir: Path) -> None:
    read(checkpoint_dir / "x.pt")
    os.truncate(checkpoint_dir / "x.pt", 100)
    with pytest.raises(Damaged):
        read(checkpoint_dir / "x.pt")


def test_the_bytes_of_a_file_serve_two_loads_and_no_more(checkpoint_dir: Path) -> None:
    with open_reader(checkpoint_dir, SETTINGS) as reader:
        first, second = (reader.load(checkpoint_dir / "x.pt", "cpu")["w"] for _ in range(2))
        assert first.data_ptr() == second.data_ptr()
        first.zero_()
        assert torch.equal(reader.load(checkpoint_dir / "x.pt", "cpu")["w"], torch.arange(1000.0) + 1)


def test_nobody_prunes_what_is_being_loaded(checkpoint_dir: Path, out: Path) -> None:  # noqa: F811
    save_now(out, {"w": torch.ones(2)}, "t2")
    with open_reader(checkpoint_dir, SETTINGS) as reader:
        assert retention.prune(out, claims.epoch_of(out), keep=1) == []
        assert reader.load(checkpoint_dir / "x.pt", "cpu")["w"].shape == (1000,)
    assert retention.prune(out, claims.epoch_of(out), keep=1) == ["t1"]
    assert [manifest.name for manifest in listing.committed(out)] == ["t2"]


# ---- ranks that see different things


def views(checkpoint_dir: Path) -> list[Path]:
    """Where rank 0 and rank 1 have the checkpoint."""
    other = checkpoint_dir.parent / "other" / "t1"
    shutil.copytree(checkpoint_dir, other)
    return [checkpoint_dir, other]


def opened(places: list[Path]) -> Callable[[RankGroup], str]:
    def work(ranks: RankGroup) -> str:
        with open_together(ranks, places[ranks.rank], SETTINGS) as reader:
            return "nothing" if reader.checkpoint is None else reader.checkpoint.manifest.name

    return work


def test_what_one_rank_cannot_take_no_rank_takes(checkpoint_dir: Path, pair: Pair) -> None:
    places = views(checkpoint_dir)
    assert pair(opened(places)) == ["t1", "t1"]
    path = places[1] / "manifest.json"
    sound = path.read_bytes()
    path.write_bytes(sound.replace(b'"step": 1', b'"step": 2'))
    for answer in pair(opened(places)):
        assert answer[0] == "Damaged" and str(path) in answer[1]
    path.unlink()
    path.mkdir()
    for answer in pair(opened(places)):
        assert answer[0] == "Damaged" and str(path) in answer[1]
    path.rmdir()
    path.write_bytes(sound)
    ReadRetries.pauses_s, pauses = (), ReadRetries.pauses_s
    real = reads.read_bytes

    def refuse(asked: Path, *more: int) -> bytes:
        if asked == path:
            raise OSError(5, "Input/output error", str(asked))
        return real(asked, *more)

    with mock.patch.object(reads, "read_bytes", refuse):
        for answer in pair(opened(places)):
            assert (
                answer[0] == "Unreadable" and f"{path}: it cannot be read: Input/output error. It may be" in answer[1]
            )
    ReadRetries.pauses_s = pauses


def test_ranks_that_see_two_checkpoints_of_one_name_load_none(
    checkpoint_dir: Path,
    pair: Pair,
) -> None:
    other = checkpoint_dir.parent / "elsewhere"
    save_now(other, {"w": torch.ones(2)}, "t1")
    for answer in pair(opened([checkpoint_dir, other / "t1"])):
        assert answer[0] == "RanksDisagree" and "rank 1 and rank 0 see different manifests" in answer[1]
        assert all(
            sealed_json.sha256((at / "manifest.json").read_bytes()) in answer[1]
            for at in (checkpoint_dir, other / "t1")
        )


@pytest.mark.parametrize("missing", ["t1", "t1/manifest.json", "t1/votes/expected.json t1/manifest.json t1/decision"])
def test_a_name_that_one_rank_does_not_see_yet_is_looked_for_again(
    checkpoint_dir: Path,
    pair: Pair,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    places = views(checkpoint_dir)
    home, away = places[1].parent, checkpoint_dir.parent / "away"

    def move(source: Path, target: Path) -> None:
        for name in missing.split():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).rename(target / name)

    move(home, away)
    monkeypatch.setattr(together, "_LOOK_AGAIN_S", (0.01,))
    for answer in pair(opened(places)):
        assert answer[0] == "RanksDisagree" and "rank 1: none" in answer[1]
    sleep = time.sleep

    def come(pause: float) -> None:
        if (away / missing.split()[0]).exists():
            with contextlib.suppress(FileNotFoundError):  # the other rank was faster
                move(away, home)
        sleep(pause)

    monkeypatch.setattr(together, "_LOOK_AGAIN_S", (0.2, 0.2))
    monkeypatch.setattr(together.time, "sleep", come)
    assert pair(opened(places)) == ["t1", "t1"]


def test_what_no_rank_sees_is_told_at_once(checkpoint_dir: Path, tmp_path: Path, pair: Pair) -> None:
    for answer in pair(opened([tmp_path / "none"] * 2)):
        assert answer == "nothing"
    places = views(checkpoint_dir)
    for place in places:
        (place / "manifest.json").unlink()
    for answer in pair(opened(places)):
        assert answer[0] == "Damaged" and "its manifest.json is missing" in answer[1]


# ---- files without a manifest


def test_a_stock_file_is_loaded_and_the_log_says_that_nothing_was_verified(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    with caplog.at_level(logging.WARNING, "roll_ckpt"):
        assert torch.equal(read(tmp_path / "x.pt")["w"], torch.ones(3))
    assert f"{tmp_path} has no manifest.json of ours" in caplog.text and "cannot be verified" in caplog.text


class Loose:
    """A class that no safe load knows."""


def test_a_stock_file_with_a_forbidden_name_is_refused(tmp_path: Path) -> None:
    torch.save({"x": Loose()}, tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match=r"x\.pt.*Loose.*load\.allow: \["):
        read(tmp_path / "x.pt")
    assert isinstance(read(tmp_path / "x.pt", allow=(Loose,))["x"], Loose)


def test_a_stock_file_that_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("left", [0, 10, 300])
def test_a_truncated_stock_file_is_refused_as_damaged(tmp_path: Path, left: int) -> None:
    torch.save({"w": torch.ones(300)}, tmp_path / "x.pt")
    os.truncate(tmp_path / "x.pt", left)
    with pytest.raises(Damaged, match=r"x\.pt"):
        read(tmp_path / "x.pt")


# ---- load.allow


def allowing(*names: str) -> Settings:
    return Settings.parse({**SMALL, "load": {"allow": names}}, "the test")


def test_a_name_in_load_allow_is_imported_and_may_be_loaded(out: Path) -> None:  # noqa: F811
    save_now(out, {"x": Loose()})
    with pytest.raises(UnsupportedError, match=r"'x'.*Loose.*load\.allow: \["):
        read(out / "t1" / "model.pt")
    state = read(out / "t1" / "model.pt", allowing(f"{__name__}.Loose"))
    assert isinstance(state["x"], Loose)
    assert trust.allowed(allowing("collections.OrderedDict")) == [OrderedDict]


@pytest.mark.parametrize("name", ["no_such_module.Name", "collections.NoSuchName", "noname", "", ".x"])
def test_an_unknown_name_in_load_allow_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trust.allowed(allowing(name))
    assert f"load.allow: cannot import {name!r}" in str(caught.value)


# ---- another model


def model(n: int, **changed: list[int]) -> dict[str, Any]:
    return {f"p{i}": {"shape": changed.get(f"p{i}", [i, 2]), "dtype": "float32"} for i in range(n)}


def test_the_same_model_is_taken_whatever_its_dtypes() -> None:
    live = {name: {"shape": tuple(parameter["shape"]), "dtype": "bfloat16"} for name, parameter in model(5).items()}
    compare_models(model(5), live, "here")
    compare_models({}, live, "a checkpoint that recorded nothing")


def test_another_model_is_refused_with_its_first_ten_differences() -> None:
    live = model(30, **{f"p{i}": [7] for i in range(14)})
    with pytest.raises(ModelMismatch) as caught:
        compare_models(model(30), live, "run/t1")
    message = str(caught.value)
    assert message.startswith("run/t1 holds another model; nothing was loaded")
    assert message.count("in the checkpoint, [7] here") == 10 and "... and 4 more" in message
    assert "p0: shape [0, 2] in the checkpoint, [7] here" in message and "p10" not in message


def test_parameters_that_only_one_side_has_are_named() -> None:
    with pytest.raises(ModelMismatch, match="p2: not in the checkpoint"):
        compare_models(model(2), model(3), "here")
    with pytest.raises(ModelMismatch, match="p2: not in this model") as caught:
        compare_models(model(3), model(2), "here")
    assert "more" not in str(caught.value)


def test_without_strict_names_may_be_missing_but_shapes_may_not_differ() -> None:
    compare_models(model(2), model(3), "here", strict=False)
    compare_models(model(3), model(2), "here", strict=False)
    with pytest.raises(ModelMismatch, match="p1: shape"):
        compare_models(model(3), model(2, p1=[9]), "here", strict=False)
