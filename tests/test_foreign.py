"""Files of others in a checkpoint: no damage, and kept by a save that replaces it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import runs

from roll_ckpt.disk import failpoints, writes
from roll_ckpt.transaction import attempts, settlement, verification

THEIRS = {
    "tokenizer.json": "{}",
    ".DS_Store": "x",
    "notes/a.txt": "a",
    "notes/deep/b.txt": "b",
    ".cache/huggingface/x.lock": "",
    "actor/readme.md": "in a folder of ours",
    "metric.json": "1",
}


def put(checkpoint_dir: Path) -> None:
    for path, text in THEIRS.items():
        (checkpoint_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint_dir / path).write_text(text)
    os.symlink("tokenizer.json", checkpoint_dir / "link.json")


def kept(checkpoint_dir: Path) -> bool:
    found = {path: (checkpoint_dir / path).read_text() for path in THEIRS if (checkpoint_dir / path).is_file()}
    return found == THEIRS and os.readlink(checkpoint_dir / "link.json") == "tokenizer.json"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("host", [True, False])
def test_a_save_of_the_same_name_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: bool, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(writes, "_RENAME_EXCHANGE", 1 << 20)  # as on a file system that cannot
    out = tmp_path / "run"
    epoch = runs.claim(out, host=host)
    assert runs.save(epoch, 1, "x", alone=True).committed
    put(out / "checkpoint-1")
    assert verification.verify(out / "checkpoint-1") == []
    for salt in ("y", "z"):
        assert runs.save(epoch, 1, salt, alone=True).committed
        assert runs.assert_sound(out) == {"checkpoint-1": salt} and kept(out / "checkpoint-1")
    assert sorted(verification.not_ours(out / "checkpoint-1")) == sorted([*THEIRS, "link.json"])


def test_what_appears_while_a_save_is_pending_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    epoch = runs.claim(out, host=True)
    attempt = attempts.begin(epoch, "checkpoint-1", step=1, expected=runs.CLUSTERS)
    put(out / "checkpoint-1")  # a host that writes beside the weights as soon as its call has returned
    for cluster, rank in runs.RANKS:
        runs.vote(attempt, "x", cluster, rank)
    put_inside = attempt.checkpoint_dir / ".nfs0001"
    put_inside.touch()
    assert settlement.settle(attempt, lead=True, timeout_s=9).committed
    assert runs.assert_sound(out) == {"checkpoint-1": "x"} and kept(out / "checkpoint-1")


def test_a_directory_of_stock_files_is_replaced_and_the_rest_of_it_kept(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "checkpoint-1/mp_rank_00_model_states.pt").write_text("stock")
    put(out / "checkpoint-1")
    assert runs.save(runs.claim(out, host=True), 1, "x", alone=True).committed
    assert runs.assert_sound(out) == {"checkpoint-1": "x"} and kept(out / "checkpoint-1")
    assert not (out / "checkpoint-1/mp_rank_00_model_states.pt").exists()


def test_a_file_that_both_have_is_kept_under_another_name(tmp_path: Path) -> None:
    out = tmp_path / "run"
    epoch = runs.claim(out)
    assert runs.save(epoch, 1, "x", alone=True).committed
    (out / "checkpoint-1/metric.json").write_text("old")
    attempt = attempts.begin(epoch, "checkpoint-1", step=1, expected=runs.CLUSTERS)
    for cluster, rank in runs.RANKS:
        runs.vote(attempt, "y", cluster, rank)
    (attempt.checkpoint_dir / "metric.json").write_text("new")
    assert settlement.settle(attempt, lead=True, timeout_s=9).committed
    texts = {path.name: path.read_text() for path in (out / "checkpoint-1").glob("metric*")}
    assert texts == {"metric.json": "new", "metric.json.before-1.2": "old"}


def test_a_link_in_the_place_of_a_checkpoint_is_replaced_and_not_followed(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    epoch = runs.claim(out)
    elsewhere.mkdir()
    put(elsewhere)
    (out / "checkpoint-1").symlink_to(elsewhere)
    assert runs.save(epoch, 1, "x", alone=True).committed
    assert runs.assert_sound(out) == {"checkpoint-1": "x"} and kept(elsewhere)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_operation_of_the_replacement_loses_none(tmp_path: Path, exchange: bool) -> None:
    count, killed = 0, True
    while killed:
        out = tmp_path / f"run{count}"

        def work(out: Path = out, limit: int = count) -> None:
            if not exchange:
                writes._RENAME_EXCHANGE = 1 << 20
            epoch = runs.claim(out)
            assert runs.save(epoch, 1, "x", alone=True).committed
            put(out / "checkpoint-1")
            failpoints.observer = Limit(limit)
            runs.save(epoch, 1, "y", alone=True)

        done = runs.ended(runs.forked(work))
        assert done in (0, -signal.SIGKILL)
        killed, count = done != 0, count + 6
        runs.claim(out).release()
        assert runs.assert_sound(out)["checkpoint-1"] in ("x", "y") and kept(out / "checkpoint-1"), count
        shutil.rmtree(out)
    assert count > 60


class Limit:
    """Kills the process before its n-th operation."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __call__(self, operation: str, paths: tuple[str, ...]) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_behind_an_exchange_starts_again_though_its_checkpoint_was_removed(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def work() -> None:
        epoch = runs.claim(out)
        assert runs.save(epoch, 1, "x", alone=True).committed
        failpoints.observer = kill_behind_the_exchange
        runs.save(epoch, 1, "y", alone=True)

    assert runs.ended(runs.forked(work)) == -signal.SIGKILL
    shutil.rmtree(out / "checkpoint-1")
    epoch = runs.claim(out)
    assert runs.salts(out) in ({}, {"checkpoint-1": "x"})
    assert runs.save(epoch, 2, "z", alone=True).committed


exchanged = False


def kill_behind_the_exchange(operation: str, paths: tuple[str, ...]) -> None:
    global exchanged
    if exchanged:
        os.kill(os.getpid(), signal.SIGKILL)
    exchanged = operation == "exchange"
