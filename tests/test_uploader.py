"""The process that pushes what is owed: killed, offline, refused, it loses nothing and pushes nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import site
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_runs
import pytest
import runs
from hub_client import settings
from hub_runs import TOKEN, assert_there_once, landed
from roll_ckpt_hub_dev import Fault, LocalHub

from roll_ckpt.disk import locks
from roll_ckpt.errors import NotFound
from roll_ckpt.transaction import retention
from roll_ckpt.upload.destination import all_owing
from roll_ckpt.upload.hub import push_queue, worker
from roll_ckpt.upload.hub.push_queue import Repository
from roll_ckpt.upload.hub.uploader import Ended, Uploader

pytest.importorskip("huggingface_hub")

REPO = "dev/run"
NAMES = ["checkpoint-1", "checkpoint-2"]

KILLED_AT = """
import os, signal, sys
from roll_ckpt.disk import failpoints
from roll_ckpt.upload.hub import worker
point = sys.argv.pop(1)
failpoints.listener = lambda reached, where: os.kill(os.getpid(), signal.SIGKILL) if reached == point else None
worker.main()
"""

JOB = """
import sys, threading
from pathlib import Path
from roll_ckpt.upload.hub.uploader import Uploader
def background(work, name):
    threading.Thread(target=work, daemon=True).start()
def on_end(ended):
    print(ended.name, ended.state, flush=True)
made = Uploader(Path(sys.argv[1]), on_end=on_end, background=background)
made.notify(again=True)
threading.Event().wait(60)
"""

CRASHES = """
import sys, time
from pathlib import Path
from roll_ckpt.save import pending
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.uploader import Uploader
run, tries = Path(sys.argv[2]), int(sys.argv[1])
made = Uploader(run, on_end=lambda ended: None, background=lambda work, name: pending.in_background(work, name, 600.0))
made.notify()
while made._process is None or push_queue.list_entries(run)[0].attempts < tries:
    time.sleep(0.02)
raise RuntimeError("the loss is not a number")
"""

WAITS = """
import sys, threading
from pathlib import Path
from roll_ckpt.upload.hub.uploader import Uploader
made = Uploader(
    Path(sys.argv[1]), on_end=lambda ended: None, background=lambda work, name: threading.Thread(target=work).start()
)
made.notify()
print(made.wait("checkpoint-1", 60, print))
"""

TURNED_AROUND = """
import sys
from pathlib import Path
from roll_ckpt.disk import failpoints
from roll_ckpt.upload.hub import push_queue, worker
def turn(reached, where):
    if reached == "push.sent":
        push_queue.set_repository(Path(sys.argv[1]), push_queue.Repository("dev/other"))
failpoints.listener = turn
worker.main()
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("run") / "run"
    hub_runs.history(output_dir, [1, 2])
    push_queue.set_repository(output_dir, Repository(REPO))
    return output_dir


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub of this test's own; what it starts talks to that."""
    with LocalHub(tmp_path / "hub", write_token=TOKEN, part_bytes=1 << 20) as hub:
        speak_to(hub.url, tmp_path, monkeypatch)
        yield hub


def speak_to(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"HF_TOKEN": TOKEN, "ROLL_CKPT_HUB_TIMEOUT_S": "1", "PYTHONPATH": hub_runs.PYTHON_PATH}
    for name, value in {**settings(url, tmp_path / "home"), **more}.items():
        monkeypatch.setenv(name, value)


def start(run: Path, *more: str, code: str = "") -> subprocess.Popen[str]:
    how = ["-c", code] if code else ["-m", "roll_ckpt.upload.hub.worker"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *how, *more, str(run)], text=True, **pipes)


def upload(run: Path, *more: str) -> list[dict[str, Any]]:
    """Let the process push what is owed; what it told."""
    return finish(start(run, *more))


def finish(process: subprocess.Popen[str], code: int = 0) -> list[dict[str, Any]]:
    """Wait for its end, with its stdin open: it ends when that does."""
    assert process.stdout and process.stderr
    told, problems = process.stdout.read(), process.stderr.read()
    assert process.wait() == code and not problems, problems
    process.communicate()
    assert TOKEN not in told
    return [json.loads(line) for line in told.splitlines()]


def states(run: Path) -> dict[str, str]:
    return {entry.name: entry.state for entry in push_queue.list_entries(run)}


def assert_all_there(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    assert states(run) == dict.fromkeys(NAMES, "done") and push_queue.owed(run) == []
    for name in NAMES:
        assert_there_once(hub, REPO, run / name, tmp_path)
    for path in [*run.joinpath(".hub").rglob("*"), hub.log_path]:
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


# --- the queue ----------------------------------------------------------------------------------------------


def test_a_run_without_a_destination_owes_nothing(tmp_path: Path) -> None:
    hub_runs.history(tmp_path / "run", [1])
    assert push_queue.repository(tmp_path / "run") is None
    assert push_queue.owed(tmp_path / "run") == [] == push_queue.list_entries(tmp_path / "run")


def test_what_is_owed_is_derived(run: Path) -> None:
    assert push_queue.owed(run) == NAMES
    first, second = push_queue.list_entries(run)
    push_queue.record(run, replace(first, state="done", commit="c" * 40), Repository(REPO))
    push_queue.record(run, replace(second, state="failed", detail="no"), Repository(REPO))
    assert push_queue.owed(run) == ["checkpoint-2"] and states(run)["checkpoint-2"] == "failed"
    hub_runs.history(run, [1], salt="new")
    assert push_queue.owed(run) == ["checkpoint-2", "checkpoint-1"]  # another manifest: the newest epoch's
    push_queue.set_repository(run, Repository("dev/other"))
    assert push_queue.owed(run) == ["checkpoint-2", "checkpoint-1"]
    push_queue.set_repository(run, Repository(REPO))
    assert states(run)["checkpoint-2"] == "failed"


def test_a_damaged_record_counts_as_missing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, _ = push_queue.list_entries(run)
    push_queue.record(run, replace(first, state="done"), Repository(REPO))
    record = run / ".hub/records/checkpoint-1.json"
    record.write_bytes(record.read_bytes().replace(b"done", b"dome"))
    assert push_queue.owed(run) == NAMES and "checkpoint-1.json" in caplog.text


def test_retry_and_cancel(run: Path) -> None:
    first, second = push_queue.list_entries(run)
    push_queue.record(run, replace(first, state="failed", detail="no", attempts=3), Repository(REPO))
    assert push_queue.retry(run) == ["checkpoint-1"] and states(run)["checkpoint-1"] == "owed"
    push_queue.cancel(run, "checkpoint-2")
    assert push_queue.owed(run) == ["checkpoint-1"]
    assert push_queue.retry(run) == [] and push_queue.retry(run, "checkpoint-2") == ["checkpoint-2"]
    push_queue.record(run, replace(second, state="done"), Repository(REPO))
    push_queue.cancel(run, "checkpoint-2")
    assert states(run)["checkpoint-2"] == "done"
    with pytest.raises(NotFound, match=r"checkpoint-9.*checkpoint-1, checkpoint-2"):
        push_queue.cancel(run, "checkpoint-9")


def test_of_what_was_pushed_and_pruned_the_newest_is_remembered(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push_queue, "_PRUNED_KEPT", 2)
    first, second = push_queue.list_entries(run)
    for step in range(4):
        push_queue.record(run, replace(first, name=f"pruned-{step}", state="done"), Repository(REPO))
        os.utime(run / f".hub/records/pruned-{step}.json", ns=(step, step))
    push_queue.record(run, replace(second, state="done"), Repository(REPO))
    assert set(states(run)) == {*NAMES, "pruned-2", "pruned-3"}


# --- the process --------------------------------------------------------------------------------------------


def test_what_is_owed_is_pushed_the_oldest_first(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    told = upload(run)
    assert [event["name"] for event in told if event["event"] == "done"] == NAMES
    assert_all_there(hub, run, tmp_path)
    assert upload(run) == []


def test_killed_again_and_again_the_next_one_goes_on(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    large = run / "checkpoint-1/actor/large.bin"
    for point in ("uploader.started", "push.sent", "push.committed", "push.tagged"):
        finish(start(run, point, code=KILLED_AT), -signal.SIGKILL)
        assert push_queue.owed(run) == NAMES
        if point == "push.sent":
            # Nobody reads the file once more: a change that keeps its time is not seen, and not sent.
            kept, at = large.read_bytes(), large.stat().st_mtime_ns
            large.write_bytes(b"x" * len(kept))
            os.utime(large, ns=(at, at))
    upload(run)
    large.write_bytes(kept)
    assert_all_there(hub, run, tmp_path)
    assert not list((run / ".hub/hashes").glob("*"))


def test_killed_in_the_middle_of_a_request(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    for fault, before in ((Fault("lfs_part", stall_s=60), "lfs_batch"), (Fault("commit", stall_s=60, landed=True), "")):
        hub.faults.add(fault)
        process = start(run)
        hub_runs.wait_for(lambda before=before: not before or before in {line["route"] for line in hub.requests()})
        hub_runs.wait_for(lambda before=before: before or landed(hub, REPO, run / "checkpoint-1"))
        process.kill()
        process.communicate()
    upload(run)
    assert_all_there(hub, run, tmp_path)


def test_it_ends_with_the_job_and_the_next_job_goes_on(
    hub: LocalHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROLL_CKPT_HUB_TIMEOUT_S", "600")  # it has nothing to tell meanwhile
    hub.faults.add(Fault("commit", stall_s=600))
    job = start(run, code=JOB)
    hub_runs.wait_for(lambda: any(line["route"] == "validate_yaml" for line in hub.requests()))
    (child,) = children(job)
    assert os.getpgid(int(child)) == int(child) != os.getpgid(job.pid)  # an interrupt of the job is not its own
    assert os.getsid(int(child)) == os.getsid(job.pid)
    assert os.getpriority(os.PRIO_PROCESS, int(child)) == 19
    job.kill()
    job.wait()
    try:
        hub_runs.wait_for(lambda: not Path(f"/proc/{child}").exists())
    except AssertionError:
        os.kill(child, signal.SIGKILL)  # or else it holds the pipes of this test
        raise
    job.communicate()
    assert push_queue.owed(run) == NAMES
    hub.faults.clear()  # it may have been killed before it came to the commit
    again = start(run, code=JOB)
    assert again.stdout
    assert [again.stdout.readline().split() for _ in NAMES] == [[name, "done"] for name in NAMES]
    again.kill()
    again.communicate()
    assert_all_there(hub, run, tmp_path)


def children(job: subprocess.Popen[str]) -> list[str]:
    return [c for task in Path(f"/proc/{job.pid}/task").glob("*/children") for c in task.read_text().split()]


def test_offline_at_the_start_it_pushes_when_the_hub_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LocalHub(tmp_path / "hub") as hub:
        url, port = hub.url, int(hub.url.rpartition(":")[2])
    speak_to(url, tmp_path, monkeypatch)
    process = start(run)
    assert process.stdout
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [event["event"] for event in told] == ["begin", "waiting"] and url in told[1]["detail"]
    assert states(run) == dict.fromkeys(NAMES, "owed") and push_queue.list_entries(run)[0].attempts == 1
    with LocalHub(tmp_path / "hub", port=port, write_token=TOKEN) as hub:
        finish(process)
        assert_all_there(hub, run, tmp_path)


def test_without_a_network_it_says_so(run: Path, hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    process = start(run)
    assert process.stdout
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    process.kill()
    process.communicate()
    assert "HF_HUB_OFFLINE" in told[1]["detail"] and "HF_HUB_OFFLINE" in push_queue.list_entries(run)[0].detail


def test_it_waits_as_long_as_the_hub_asks_for(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", status=429, retry_after_s=3))
    told = upload(run)
    assert [event["pause_s"] for event in told if event["event"] == "waiting"] == [3]
    assert_all_there(hub, run, tmp_path)


@pytest.mark.long
def test_what_fails_is_named_and_the_next_goes_on(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", status=403))
    told = upload(run)
    assert [(event["event"], event["name"]) for event in told if event["event"] in ("done", "failed")] == [
        ("failed", "checkpoint-1"),
        ("done", "checkpoint-2"),
    ]
    failed = push_queue.list_entries(run)[0]
    assert failed.state == "failed" and "403" in failed.detail and REPO in failed.detail and failed.attempts == 1
    assert push_queue.owed(run) == ["checkpoint-1"] and not upload(run)
    finish(start(run, "push.tagged", "--again", code=KILLED_AT), -signal.SIGKILL)
    upload(run, "--again")
    assert_all_there(hub, run, tmp_path)
    (run / ".hub/records/checkpoint-1.json").unlink()
    upload(run)
    assert_all_there(hub, run, tmp_path)
    # It came late: the newest stays the one on the branch.
    repo = hub.store.repo(REPO)
    assert repo.branches.keys() == {"main"} and hub.store.resolve(repo, "main").title == "checkpoint-2"
    assert repo.tags["checkpoint-2"] == repo.branches["main"] != repo.tags["checkpoint-1"]


def newest_there(hub: LocalHub) -> str:
    return hub.store.resolve(hub.store.repo(REPO), "main").title


@pytest.mark.long
def test_what_comes_late_goes_beside_a_newer_one_that_is_here_no_more(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    push_queue.cancel(run, "checkpoint-1")
    upload(run)
    shutil.rmtree(run / "checkpoint-2")
    push_queue.retry(run, "checkpoint-1")
    upload(run)
    assert_there_once(hub, REPO, run / "checkpoint-1", tmp_path)
    assert newest_there(hub) == "checkpoint-2"
    hub_runs.history(run, [1], salt="new")  # by a run that went back is newer, though its step is not
    upload(run)
    assert_there_once(hub, REPO, run / "checkpoint-1", tmp_path)
    assert newest_there(hub) == "checkpoint-1"


@pytest.mark.long
def test_one_that_the_hub_does_not_take_lets_the_others_go_first(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", status=409, times=3))
    told = upload(run)
    assert [event["name"] for event in told if event["event"] == "waiting"] == ["checkpoint-1"] * 3
    assert [event["name"] for event in told if event["event"] == "done"] == ["checkpoint-2", "checkpoint-1"]
    assert_all_there(hub, run, tmp_path)
    assert newest_there(hub) == "checkpoint-2"


def test_a_push_is_recorded_for_where_it_went(hub: LocalHub, run: Path) -> None:
    finish(start(run, code=TURNED_AROUND))
    assert push_queue.repository(run) == Repository("dev/other") and push_queue.owed(run) == []
    assert [len(landed(hub, REPO, run / name)) for name in NAMES] == [1, 0]
    assert [len(landed(hub, "dev/other", run / name)) for name in NAMES] == [1, 1]


def test_what_became_of_it_meanwhile_stays(hub: LocalHub, run: Path) -> None:
    first, _ = push_queue.list_entries(run)
    to = push_queue.repository(run)
    assert to is not None
    push_queue.record(run, replace(first, state="done", commit="c" * 40), to)
    worker._record_unless_settled(run, replace(first, state="failed", detail="no"), to)
    assert states(run)["checkpoint-1"] == "done"


def test_a_job_that_crashes_does_not_wait_for_a_hub_that_is_away(hub: LocalHub, run: Path) -> None:
    hub.faults.add(Fault("repo_info", status=503, times=0))
    assert "is not a number" in crash(run, 2)
    assert push_queue.owed(run) == NAMES


def test_a_job_that_crashes_lets_a_push_that_moves_end(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", stall_s=0.5))
    assert "is not a number" in crash(run, 0)
    assert_all_there(hub, run, tmp_path)


def crash(run: Path, tries: int) -> str:
    """What a job says that crashes after so many tries of its uploader; it must end long before its 600 s."""
    job = start(run, str(tries), code=CRASHES)
    try:
        return job.communicate(timeout=hub_runs.LIMIT_S)[1]
    finally:
        job.kill()


def test_packages_do_not_come_before_the_standard_library(run: Path, tmp_path: Path) -> None:
    for name in NAMES:
        push_queue.cancel(run, name)
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = tmp_path.glob("venv/lib/python*/site-packages")
    shutil.copytree(Path(hub_runs.ROOT) / "roll_ckpt", packages / "roll_ckpt")
    (packages / "json.py").write_text("raise ImportError('this is not the one')")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = subprocess.run(
        [tmp_path / "venv/bin/python", "-c", WAITS, run], env=environment, capture_output=True, text=True, cwd="/"
    )
    assert "this is not the one" not in told.stderr and "state='cancelled'" in told.stdout, told.stderr


def test_a_cancelled_one_is_not_pushed(hub: LocalHub, run: Path) -> None:
    push_queue.cancel(run, "checkpoint-1")
    upload(run)
    assert not landed(hub, REPO, run / "checkpoint-1") and landed(hub, REPO, run / "checkpoint-2")


def test_of_two_at_once_one_waits(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    hub.faults.add(Fault("commit", stall_s=0.8))
    both = [start(run), start(run)]
    told = [event for process in both for event in finish(process)]
    assert sorted(event["name"] for event in told if event["event"] == "done") == NAMES
    assert any(event["event"] == "waiting" and event["name"] is None for event in told)
    assert_all_there(hub, run, tmp_path)


def test_nothing_owed_is_pruned(run: Path, hub: LocalHub, tmp_path: Path) -> None:
    epoch = runs.claim(run)
    assert retention.prune(run, epoch, 1, all_owing(run)) == []
    upload(run)
    assert retention.prune(run, epoch, 1, all_owing(run)) == ["checkpoint-1"]
    assert states(run) == dict.fromkeys(NAMES, "done")
    epoch.release()


# --- the parent's side --------------------------------------------------------------------------------------


class Parent:
    """An Uploader and what it was told."""

    def __init__(self, run: Path) -> None:
        self.ended: list[Ended] = []
        self.threads: list[threading.Thread] = []
        self.uploader = Uploader(run, on_end=self.ended.append, background=self.background)

    def background(self, work: Callable[[], None], name: str) -> None:
        self.threads.append(threading.Thread(target=work, name=name, daemon=True))
        self.threads[-1].start()


def test_the_parent_hears_what_became_of_each(hub: LocalHub, run: Path, tmp_path: Path) -> None:
    parent = Parent(run)
    parent.uploader.notify()
    shown: list[dict[str, Any]] = []
    assert parent.uploader.wait("checkpoint-2", 60, shown.append).state == "done"
    parent.threads[0].join()
    assert [(ended.name, ended.state) for ended in parent.ended] == [(name, "done") for name in NAMES]
    assert_all_there(hub, run, tmp_path)
    parent.uploader.notify("checkpoint-2")
    assert parent.uploader.wait("checkpoint-2", 60, shown.append).state == "done"


def test_a_dead_uploader_is_started_again(
    hub: LocalHub, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.faults.add(Fault("commit", stall_s=60))
    parent = Parent(run)
    parent.uploader.notify()
    hub_runs.wait_for(lambda: any(line["route"] == "validate_yaml" for line in hub.requests()))
    process = parent.uploader._process
    assert process is not None
    process.kill()
    assert parent.uploader.wait("checkpoint-2", 60, lambda _: None).state == "done"
    assert "signal 9" in caplog.text and "starting it again" in caplog.text
    parent.threads[0].join()
    assert_all_there(hub, run, tmp_path)


@pytest.mark.long
def test_waiting_sees_that_another_process_moves(hub: LocalHub, run: Path) -> None:
    (run / ".hub/uploader.lock").touch()
    lock = locks.try_lock(run / ".hub/uploader.lock", exclusive=True)
    assert lock is not None
    began, over = time.monotonic(), threading.Event()

    def another() -> None:
        while not over.wait(0.1):
            (run / ".hub/uploader.lock").touch()
            if time.monotonic() - began > 4:
                lock.release()

    other = threading.Thread(target=another)
    other.start()
    parent = Parent(run)
    parent.uploader.notify()
    ended = parent.uploader.wait("checkpoint-2", 1, lambda _: None)
    over.set()
    other.join()
    lock.release()
    assert ended.state == "done"
    parent.threads[0].join()


def test_who_serves_next_is_not_taken_for_nobody(hub: LocalHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        push_queue.cancel(run, name)
    parent = Parent(run)
    claim, handed_over = parent.uploader._claim_work, threading.Event()

    def claim_and_be_slow() -> bool | None:
        claimed = claim()
        if claimed is None and not handed_over.is_set():
            handed_over.set()
            for name in NAMES:
                push_queue.retry(run, name)
            parent.uploader.notify("checkpoint-2")
        return claimed

    monkeypatch.setattr(parent.uploader, "_claim_work", claim_and_be_slow)
    parent.uploader.notify()
    parent.threads[0].join()
    assert parent.uploader.wait("checkpoint-2", 60, lambda _: None).state == "done"
    parent.threads[1].join()


def test_one_that_always_dies_is_given_up(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    parent = Parent(run)
    parent.uploader.notify()
    ended = parent.uploader.wait("checkpoint-1", 60, lambda _: None)
    assert ended.state == "owed" and "died with exit code 1" in ended.detail
    parent.threads[0].join()


def test_waiting_ends_when_nothing_moves(hub: LocalHub, run: Path) -> None:
    hub.faults.add(Fault("commit", status=503, times=0))
    parent = Parent(run)
    parent.uploader.notify()
    hub_runs.wait_for(lambda: push_queue.list_entries(run)[0].attempts > 1)
    ended = parent.uploader.wait("checkpoint-2", 1, lambda _: None)
    assert ended.state == "owed" and "503" in ended.detail
    parent.uploader.stop()
    parent.threads[0].join()
    assert push_queue.owed(run) == NAMES
