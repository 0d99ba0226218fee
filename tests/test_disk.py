from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
from pathlib import Path

import pytest
import runs

from roll_ckpt.disk import failpoints, locks, reads, tree, writes
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged
from roll_ckpt.native import files


def test_a_durable_write_is_synced_before_its_name_and_its_name_before_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations: list[str] = []
    monkeypatch.setattr(failpoints, "observer", lambda operation, paths: operations.append(operation))
    writes.write_durable(tmp_path / "f", b"data")
    assert operations == ["create", "write", "fsync", "rename", "fsync_dir"]
    assert (tmp_path / "f").read_bytes() == b"data" and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("failing", ["write", "fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    (tmp_path / "f").write_bytes(b"old")

    def fail(operation: str, paths: tuple[str, ...]) -> None:
        if operation == failing:
            raise OSError(errno.ENOSPC, "No space left on device", paths[0])

    monkeypatch.setattr(failpoints, "observer", fail)
    with pytest.raises(OSError, match="No space left"):
        writes.write_durable(tmp_path / "f", b"new")
    assert os.listdir(tmp_path) == ["f"] and (tmp_path / "f").read_bytes() == b"old"


def test_the_first_link_wins(tmp_path: Path) -> None:
    assert writes.link_durable(tmp_path / "f", b"first")
    assert not writes.link_durable(tmp_path / "f", b"second")
    assert (tmp_path / "f").read_bytes() == b"first" and os.listdir(tmp_path) == ["f"]


def test_exchange_swaps_two_directories(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    writes.exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"] and os.listdir(tmp_path / "b") == ["a"]
    with pytest.raises(FileNotFoundError):
        writes.exchange(tmp_path / "a", tmp_path / "c")


def test_a_late_writer_does_not_bring_an_abandoned_attempt_back(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="abandoned"):
        writes.make_dirs(tmp_path / ".checkpoint-1.1.1.tmp" / "checkpoint-1" / "actor")
    assert os.listdir(tmp_path) == []


def test_a_rename_that_was_sent_twice_has_succeeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def twice(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", twice)
    writes.write_durable(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new" and os.listdir(tmp_path) == ["f"]

    def lost(source: Path, target: Path) -> None:
        os.unlink(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", lost)
    with pytest.raises(FileNotFoundError):
        writes.write_durable(tmp_path / "f", b"newer")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_links_and_special_files_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "link").symlink_to("f")
    os.mkfifo(tmp_path / "pipe")
    assert dict(tree.walk_all(tmp_path)) == {"f": True, "link": False, "pipe": False}
    assert reads.read_bytes(tmp_path / "link") == b""  # a download may leave links into a cache
    with pytest.raises(Damaged, match="pipe"):
        reads.read_bytes(tmp_path / "pipe")
    with pytest.raises(Damaged, match="link"):
        list(tree.walk(tmp_path))


def test_a_lock_is_seen_by_others_survives_reading_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "f"
    ready, go = os.pipe(), os.pipe()

    def hold() -> None:
        lock = locks.lock_new(path, lambda locked: b"locked" if locked else b"")
        assert reads.read_bytes(path) == b"locked" and reads.mtime_ns(path) and locks.is_locked(path)
        assert locks.try_lock(path, exclusive=True) is None
        assert lock.exclusive
        os.write(ready[1], b"1")
        os.read(go[0], 1)

    holder = runs.forked(hold)
    os.read(ready[0], 1)
    assert locks.is_locked(path) and locks.try_lock(path, exclusive=False) is None
    os.write(go[1], b"1")
    assert runs.ended(holder) == 0
    assert not locks.is_locked(path)
    lock = locks.try_lock(path, exclusive=False)
    assert lock is not None and locks.try_lock(path, exclusive=False) is lock
    child = runs.forked(lambda: (reads.read_bytes(path), lock.release()))  # a child's close is not ours
    assert runs.ended(child) == 0
    assert runs.ended(runs.forked(lambda: _expect(locks.is_locked(path)))) == 0
    lock.release()
    lock.release()
    assert runs.ended(runs.forked(lambda: _expect(not locks.is_locked(path)))) == 0


def _expect(true: bool) -> None:
    assert true


def test_new_directories_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(failpoints, "observer", lambda operation, paths: seen.append((operation, Path(paths[0]).name)))
    writes.make_dirs(tmp_path / "a" / "b")
    assert seen == [("mkdir", "a"), ("fsync_dir", tmp_path.name), ("mkdir", "b"), ("fsync_dir", "a")]
    assert stat.S_ISDIR((tmp_path / "a/b").stat().st_mode)


def test_a_file_system_that_cannot_sync_directories_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    assert writes.fsync_dir(tmp_path) is False


def test_a_tree_goes_although_somebody_still_puts_files_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "below").mkdir(parents=True)
    late = iter(["one", "two", "three"])

    def arrive(operation: str, paths: tuple[str, ...]) -> None:
        if operation == "rmdir" and (name := next(late, None)):
            Path(paths[0], name).touch()

    monkeypatch.setattr(failpoints, "observer", arrive)
    writes.remove_tree(tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_a_tree_that_is_a_link_goes_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "f").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    writes.remove_tree(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "there" / "f").exists()


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.EACCES])
def test_what_cannot_be_looked_at_is_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    looks = (tree.exists, tree.is_dir, tree.is_real_dir, tree.is_link, tree.is_file)
    (tmp_path / "f").touch()
    (tmp_path / "loop").symlink_to("loop")
    for path in ("none", "f/below", "x" * 300):
        assert not any(look(tmp_path / path) for look in looks)
    assert tree.is_link(tmp_path / "loop") and not tree.is_dir(tmp_path / "loop")

    def refuse(path: Path, **how: object) -> os.stat_result:
        raise OSError(code, os.strerror(code), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", refuse)
        patched.setattr(os, "lstat", refuse)
        for look in looks:
            with pytest.raises(OSError, match=os.strerror(code)):
                look(tmp_path / "f")


def test_patience_ends_and_is_not_wasted_on_what_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadRetries, "pauses_s", (0, 0, 0))
    told: list[int] = []

    def read(*codes: int) -> str:
        told.append(codes[len(told)] if len(told) < len(codes) else 0)
        if told[-1]:
            raise OSError(told[-1], os.strerror(told[-1]))
        return "read"

    assert ReadRetries().run(lambda: read(errno.EIO, errno.ESTALE, errno.EMFILE)) == "read"
    told.clear()
    with pytest.raises(OSError, match="error"):
        ReadRetries().run(lambda: read(*[errno.EIO] * 9))
    assert told == [errno.EIO] * 4
    told.clear()
    with pytest.raises(PermissionError):
        ReadRetries().run(lambda: read(errno.EACCES))
    assert len(told) == 1


def test_a_file_under_a_write_lease_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"data")
    for read in (lambda: reads.read_bytes(path), lambda: files.digest_file(str(path), 4096).nbytes):
        ready = os.pipe()

        def hold(ready: tuple[int, int] = ready) -> None:
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                os.write(ready[1], b"1")
            except OSError:
                os.write(ready[1], b"0")
            signal.pause()  # whoever opens the file ends this process, by SIGIO, and with it the lease

        holder = runs.forked(hold)
        if os.read(ready[0], 1) == b"0":
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            pytest.skip("no leases on this file system")
        assert read() in (b"data", 4)
        os.waitpid(holder, 0)
