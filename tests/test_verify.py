from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
from corruption import plain_user

from roll_ckpt import names
from roll_ckpt.cli import survey
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged, Unreadable
from roll_ckpt.formats import manifests, records
from roll_ckpt.transaction import attempts, listing, settlement, verification
from roll_ckpt.transaction.verification import Problem


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, and a record of an attempt that was abandoned."""
    output_dir = tmp_path_factory.mktemp("verify") / "run"
    epoch = runs.claim(output_dir)
    for step in (10, 33):
        assert runs.save(epoch, step, f"salt{step}", alone=True).committed
    attempt = attempts.begin(epoch, "checkpoint-44", step=44, expected=runs.CLUSTERS)
    assert not settlement.settle(attempt, lead=True, timeout_s=0).committed
    epoch.release()
    assert verification.verify_run(output_dir) == []
    return output_dir


def files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and path.name != "helper.py")


def test_every_kind_of_file_is_there(run: Path) -> None:
    found = {str(path.relative_to(run)) for path in files(run)}
    assert {"latest", ".epochs/1", ".epochs/aborted.1.1.checkpoint-44"} <= found
    assert {f"checkpoint-10/{path}" for path in (names.MANIFEST, names.DECISION, names.EXPECTED)} <= found
    assert len(found) == 3 + 2 * (3 + 4 + 6)


def test_a_flipped_bit_in_any_file_is_found_and_named(run: Path) -> None:
    dice = random.Random(7)
    for path in files(run):
        sound = path.read_bytes()
        for _ in range(4 if sound else 0):
            at, bit = dice.randrange(len(sound)), dice.randrange(8)
            path.write_bytes(sound[:at] + bytes([sound[at] ^ 1 << bit]) + sound[at + 1 :])
            found = verification.verify_run(run)
            path.write_bytes(sound)
            assert str(path.relative_to(run)) in {p.path for p in found}, (path, at, bit, found)
    assert verification.verify_run(run) == []


@pytest.mark.parametrize("harm", ["missing", "truncated", "extended", "link", "empty"])
def test_harm_to_any_file_is_found_and_named(run: Path, tmp_path: Path, harm: str) -> None:
    for path in files(run):
        sound = path.read_bytes()
        if not sound and harm in ("truncated", "empty", "link"):
            continue
        if harm == "missing" and ".epochs" in path.parts:
            continue  # nothing that is committed depends on it
        if harm == "extended" and path.name == names.LATEST:
            continue  # an editor ends a line there
        (tmp_path / "elsewhere").write_bytes(sound[:-1])  # a link is no harm, but its bytes are others
        if harm in ("missing", "link"):
            path.unlink()
        if harm == "link":
            path.symlink_to(tmp_path / "elsewhere")
        elif harm != "missing":
            path.write_bytes({"truncated": sound[:-1], "extended": sound + b"\n", "empty": b""}[harm])
        found = verification.verify_run(run)
        path.unlink(missing_ok=True)
        path.write_bytes(sound)
        assert str(path.relative_to(run)) in {p.path for p in found}, (path, found)
    assert verification.verify_run(run) == []


@pytest.mark.parametrize("path", ["mp_rank_00_model_states.pt", "actor/__0_0.distcp"])
def test_an_extra_file_that_stock_code_would_load_is_damage(run: Path, path: str) -> None:
    extra = run / "checkpoint-10" / path
    extra.touch()
    assert verification.verify(run / "checkpoint-10") == [
        Problem(path, "extra", "no save wrote it, and stock code would load it")
    ]
    extra.unlink()


@pytest.mark.parametrize("path", ["tokenizer.json", "actor/notes.pt", "votes/x", "backup/a_states.pt", ".DS_Store"])
def test_a_file_of_others_is_no_damage_and_is_listed(run: Path, path: str) -> None:
    extra = run / "checkpoint-10" / path
    made = not extra.parent.exists()
    extra.parent.mkdir(exist_ok=True)
    extra.touch()
    assert verification.verify(run / "checkpoint-10") == []
    assert verification.not_ours(run / "checkpoint-10") == [path]
    extra.unlink()
    if made:
        extra.parent.rmdir()


def test_files_of_another_checkpoint_are_found(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-10", tmp_path / "c")
    for path in (names.DECISION, "votes/actor.0.json", names.EXPECTED):
        shutil.copy(run / "checkpoint-33" / path, tmp_path / "c" / path)
        assert path in {problem.path for problem in verification.verify(tmp_path / "c")}
        shutil.copy(run / "checkpoint-10" / path, tmp_path / "c" / path)
    assert verification.verify(tmp_path / "c") == []


def test_a_copy_under_another_name_is_not_a_second_checkpoint(run: Path) -> None:
    for name, told in (("checkpoint-77", ["checkpoint-77/manifest.json"]), ("best", [])):  # `best` is a user's own copy
        shutil.copytree(run / "checkpoint-10", run / name)
        assert [problem.path for problem in verification.verify_run(run)] == told
        assert [problem.path for problem in verification.verify(run / name)] == (
            ["manifest.json"] if name != "best" else []
        )
        shutil.rmtree(run / name)


def test_a_checkpoint_that_is_a_link_is_none_of_the_run(run: Path, tmp_path: Path) -> None:
    checkpoint_dir = run / "checkpoint-33"
    checkpoint_dir.rename(tmp_path / "moved")
    checkpoint_dir.symlink_to(tmp_path / "moved")
    told: list[Damaged | Unreadable] = []
    assert [found.step for found in listing.committed(run, told.append)] == [10]
    assert "checkpoint-33: a symbolic link" in str(told[0])
    assert [(p.path, p.kind) for p in verification.verify_run(run) if p.kind == "link"] == [("checkpoint-33", "link")]
    (run / "best").symlink_to("checkpoint-10")  # a name beside the name is none of ours
    assert len(told) == 1 and [found.step for found in listing.committed(run, told.append)] == [10] and len(told) == 2
    (run / "best").unlink()
    checkpoint_dir.unlink()
    (tmp_path / "moved").rename(checkpoint_dir)
    assert verification.verify_run(run) == []


def test_a_checkpoint_without_manifest_is_none_and_told_as_damaged(run: Path) -> None:
    path = run / "checkpoint-33" / names.MANIFEST
    record = path.read_bytes()
    path.unlink()
    told: list[Damaged | Unreadable] = []
    assert [found.step for found in listing.committed(run, told.append)] == [10]
    assert "checkpoint-33: its manifest.json is missing" in str(told[0])
    path.write_bytes(record)
    path.chmod(0)
    with plain_user():
        assert [found.step for found in listing.committed(run, told.append)] == [10]
        with pytest.raises(Unreadable, match=r"checkpoint-33/manifest\.json: .*It may be sound"):
            listing.newest_first(run)
    assert isinstance(told[1], Unreadable) and told[1].checkpoint_dir == run / "checkpoint-33"
    assert "checkpoint-33/manifest.json: it cannot be read: Permission denied" in str(told[1])
    path.chmod(0o644)


def test_a_directory_that_cannot_be_listed_is_told_like_its_files(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = run / "checkpoint-10" / "actor", os.scandir

    def scandir(path: Path) -> Any:
        if Path(path) == folder:
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(ReadRetries, "pauses_s", (0,))
    found = verification.verify(run / "checkpoint-10")
    assert [(problem.path, problem.kind) for problem in found] == [("actor", "unreadable")]


@pytest.mark.parametrize("call", ["stat", "open"])
def test_what_a_disk_refuses_once_is_there_and_what_it_refuses_still_is_not_left_out(
    run: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(ReadRetries, "pauses_s", (0, 0))
    real, refusals = getattr(os, call), [0]

    def refuse(path: Any, *more: Any, **how: Any) -> Any:
        if "checkpoint-33" in str(path) and refusals[0]:
            refusals[0] -= 1
            raise OSError(116, "Stale file handle", str(path))
        return real(path, *more, **how)

    monkeypatch.setattr(os, call, refuse)
    refusals[0] = 2
    assert [found.step for found in listing.newest_first(run)] == [33, 10] and refusals == [0]
    refusals[0] = 2
    assert verification.verify(run / "checkpoint-33") == []
    refusals[0] = 1000
    told: list[Damaged | Unreadable] = []
    assert [found.step for found in listing.committed(run, told.append)] == [10]
    assert isinstance(told[0], Unreadable) and "Stale file handle" in str(told[0])
    if call == "open":
        assert ("checkpoint-33/manifest.json", "unreadable") in {(p.path, p.kind) for p in verification.verify_run(run)}


def test_lost_and_found_is_no_checkpoint(run: Path) -> None:
    (run / names.LOST_AND_FOUND).mkdir(mode=0)
    with plain_user():
        assert [found.step for found in listing.newest_first(run)] == [33, 10]
        assert verification.verify_run(run) == []
        assert len(survey.survey(run).checkpoints) == 2
    (run / names.LOST_AND_FOUND).rmdir()


def test_the_parts_together_read_every_file_once(run: Path) -> None:
    told = manifests.read(run / "checkpoint-10")
    parts = [verification._share(told.files, part, 3) for part in range(3)]
    assert sorted(receipt for part in parts for receipt in part) == sorted(told.files)
    assert all(parts)
    path = run / "checkpoint-10/critic/rank_1.pt"
    sound = path.read_bytes()
    path.write_bytes(b"X" + sound[1:])
    found = [verification.verify(run / "checkpoint-10", part=part, parts=3) for part in range(3)]
    path.write_bytes(sound)
    assert sorted(len(problems) for problems in found) == [0, 0, 1]


@pytest.mark.parametrize("direct", [True, False])
def test_large_files_are_verified_by_the_native_reader(tmp_path: Path, direct: bool) -> None:
    data = bytes(range(256)) * 4096 * 3
    (tmp_path / "f").write_bytes(data)
    receipt = records.receipt_of_bytes("f", data, 1 << 20)
    assert verification._contents(tmp_path, receipt, ReadRetries(), direct=direct) == []
    (tmp_path / "f").write_bytes(data[:-1] + b"x")
    assert [problem.kind for problem in verification._contents(tmp_path, receipt, ReadRetries(), direct=direct)] == [
        "digest"
    ]


def test_a_folder_of_copies_needs_no_records_of_a_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "checkpoint-10", tmp_path / "copies" / "checkpoint-10")
    assert verification.verify_run(tmp_path / "copies") == []
    (tmp_path / "copies" / "latest").write_text("checkpoint-33")
    assert [(problem.path, problem.kind) for problem in verification.verify_run(tmp_path / "copies")] != []
