"""The commands that speak with the Hub, as a user starts them, against the local Hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hub_runs
import pytest
from roll_ckpt_hub_dev import Fault, LocalHub

from roll_ckpt import names
from roll_ckpt.cli import main, printing
from roll_ckpt.transaction import verification
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.push_queue import Repository

pytest.importorskip("huggingface_hub")

HERE = Path(__file__).parent
TOKEN = "hf_writeswriteswrites"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub") / "root", write_token=TOKEN) as hub:
        yield hub


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved steps 1 and 2 and has ended."""
    out = tmp_path_factory.mktemp("runs") / "run"
    script = "import sys, runs; from pathlib import Path; runs.history(Path(sys.argv[1]), [1, 2])"
    environment = {**os.environ, "PYTHONPATH": hub_runs.PYTHON_PATH}
    subprocess.run([sys.executable, "-c", script, out], cwd=HERE, env=environment, check=True)
    return out


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


class Shell:
    """roll-ckpt with the environment that it needs; what it prints never holds the token."""

    def __init__(self, hub: LocalHub, home: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        self.environment = {
            **kept,
            **{"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"},
            **{"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": hub_runs.PYTHON_PATH},
        }

    def start(self, *arguments: object, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "roll_ckpt", *map(str, arguments)],
            env={**self.environment, **more},
            cwd=HERE.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, code: int = 0, **more: str) -> tuple[str, str]:
        process = self.start(*arguments, **more)
        out, err = process.communicate()
        assert process.returncode == code, (out, err)
        assert TOKEN not in out + err and "Traceback" not in err
        return out, err

    def json(self, *arguments: object, code: int = 0, **more: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self(*arguments, "--json", code=code, **more)[0])
        return document


@pytest.fixture
def shell(hub: LocalHub, tmp_path: Path) -> Iterator[Shell]:
    yield Shell(hub, tmp_path / "home")
    hub.faults.clear()


def files(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def test_what_one_pushes_another_pulls(shell: Shell, run: Path, tmp_path: Path) -> None:
    checkpoint_dir = run / "checkpoint-1"
    pushed = shell.json("push", checkpoint_dir, "dev/one")
    assert pushed == {**pushed, "path": str(checkpoint_dir), "name": "checkpoint-1", "uri": "hf://dev/one@checkpoint-1"}
    assert shell.json("push", checkpoint_dir, "dev/one")["commit"] == pushed["commit"]
    to = tmp_path / "new"
    out, err = shell("pull", "hf://dev/one@checkpoint-1", to)
    assert out.startswith(f"{to / 'checkpoint-1'}: complete and verified (") and err == ""
    assert files(to / "checkpoint-1") == files(checkpoint_dir) and os.listdir(to) == ["checkpoint-1"]
    assert shell.json("verify", to / "checkpoint-1")["sound"]
    again = shell.json("pull", "hf://dev/one", to)
    told = {"uri": "hf://dev/one@main", "path": str(to / "checkpoint-1"), "name": "checkpoint-1", "step": 1}
    assert again == {**told, "bytes": again["bytes"], "was_there": True}
    assert not (run / names.HUB).exists()


def test_a_runs_queue_from_owed_to_done(hub: LocalHub, shell: Shell, run: Path) -> None:
    hub.faults.add(Fault("commit", call=2, status=403))
    out, err = shell("push", run, "dev/queue", code=printing.OWED)
    assert "pushed checkpoint-1, commit" in out and "checkpoint-2" in err and "403" in err
    listed = shell.json("queue", "ls", run, code=printing.OWED)
    assert listed == {**listed, "path": str(run), "uri": "hf://dev/queue@main", "private": True}
    assert [entry["state"] for entry in listed["entries"]] == ["done", "failed"]
    assert listed["owed"] == ["checkpoint-2"]
    out, _ = shell("queue", "ls", run, code=printing.OWED)
    assert out.splitlines()[1].split() == ["NAME", "STATE", "SIZE", "TRIES", "COMMIT"]
    assert out.splitlines()[3].split()[:2] == ["checkpoint-2", "failed"] and "the Hub says 403" in out
    assert shell("queue", "retry", run)[0] == "owed again: checkpoint-2\n"
    assert shell("queue", "retry", run)[0] == "nothing to retry\n"
    assert "pushed checkpoint-2, commit" in shell("push", run)[0]
    assert [entry["state"] for entry in shell.json("queue", "ls", run)["entries"]] == ["done", "done"]
    assert verification.verify_run(run) == []


def test_offline_everything_stays_owed_and_the_exit_code_says_so(shell: Shell, run: Path) -> None:
    _, err = shell("push", run, "dev/offline", code=printing.OWED, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in err
    found = shell.json("queue", "ls", run, code=printing.OWED)["entries"]
    assert [entry["state"] for entry in found] == ["owed", "owed"] and "HF_HUB_OFFLINE" in found[0]["detail"]
    _, err = shell("push", run / "checkpoint-1", code=printing.ERROR, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in err


def test_one_push_of_a_run_that_pushes_there_is_recorded(shell: Shell, run: Path) -> None:
    push_queue.set_repository(run, Repository("dev/recorded"))
    pushed = shell.json("push", run / "checkpoint-2")
    assert pushed["uri"] == "hf://dev/recorded@checkpoint-2"
    [owed, done] = shell.json("queue", "ls", run, code=printing.OWED)["entries"]
    assert (owed["state"], done["state"], done["commit"]) == ("owed", "done", pushed["commit"])


def test_an_older_one_leaves_the_newest_on_the_branch_and_waits_for_the_uploader(
    hub: LocalHub, shell: Shell, run: Path
) -> None:
    repo = "dev/late"
    push_queue.set_repository(run, Repository(repo))
    push_queue.cancel(run, "checkpoint-1")
    hub.faults.add(Fault("commit", stall_s=5.0))
    running = shell.start("push", run)
    deadline = time.monotonic() + 60
    while not any(f.get("seen", 0) for f in hub.faults.pending()) and time.monotonic() < deadline:
        if any(repo in line["path"] and line["route"] == "preupload" for line in hub.requests()):
            break
        time.sleep(0.02)
    pushed = json.loads((told := shell("push", run / "checkpoint-1", "--json"))[0])
    assert "another process pushes" in told[1]
    running.communicate()
    found = hub.store.repo(repo)
    assert hub.store.resolve(found, "main").title == "checkpoint-2" and found.branches.keys() == {"main"}
    assert found.tags["checkpoint-1"] == pushed["commit"] != found.branches["main"]
    assert [entry["state"] for entry in shell.json("queue", "ls", run)["entries"]] == ["done", "done"]


def test_one_that_the_hub_does_not_take_holds_up_no_other(hub: LocalHub, shell: Shell, run: Path) -> None:
    hub.faults.add(Fault("commit", status=409))
    out, err = shell("push", run, "dev/busy", code=printing.OWED)
    assert "409" in err and "pushed checkpoint-2" in out
    assert "pushed checkpoint-1" in shell("push", run)[0]


def test_private_is_what_a_push_is_unless_public_is_given(hub: LocalHub, shell: Shell, run: Path) -> None:
    shell("push", run / "checkpoint-1", "dev/private")
    assert hub.store.repo("dev/private").private
    shell("push", run / "checkpoint-1", "dev/public", "--public")
    assert not hub.store.repo("dev/public").private
    _, err = shell("push", run / "checkpoint-2", "dev/public", code=printing.ERROR)
    assert "the repository is public" in err


@pytest.mark.long
def test_ctrl_c_ends_a_pull_which_then_goes_on(hub: LocalHub, shell: Shell, run: Path, tmp_path: Path) -> None:
    shell("push", run / "checkpoint-1", "dev/interrupted")
    hub.faults.add(Fault("download", call=4, times=0, stall_s=5.0))
    since = len(hub.requests())
    process = shell.start("pull", "hf://dev/interrupted", tmp_path / "to", ROLL_CKPT_HUB_TIMEOUT_S="3")
    deadline = time.monotonic() + 60
    while not any(f.get("seen", 0) >= 4 for f in hub.faults.pending()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    hub.faults.clear()
    asked = [line["path"] for line in hub.requests()[since:] if line["route"] == "download"]
    assert len(asked) == len(set(asked)), "none was tried again after the interrupt"
    shell("pull", "hf://dev/interrupted", tmp_path / "to")
    assert verification.verify(tmp_path / "to/checkpoint-1") == [] and os.listdir(tmp_path / "to") == ["checkpoint-1"]


def test_a_checkpoint_that_is_damaged_there_or_here_ends_with_3(shell: Shell, run: Path, tmp_path: Path) -> None:
    shell("push", run / "checkpoint-1", "dev/damaged")
    (run / "checkpoint-2/actor/rank_0.pt").write_bytes(b"other bytes\n")
    _, err = shell("push", run / "checkpoint-2", "dev/damaged", code=printing.DAMAGED)
    assert "actor/rank_0.pt" in err and "not as it was committed" in err
    target = shutil.copytree(run / "checkpoint-2", tmp_path / "up")
    upload = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(); "
        "api.upload_file(path_or_fileobj=sys.argv[1], path_in_repo='actor/rank_0.pt', repo_id='dev/damaged')"
    )
    subprocess.run([sys.executable, "-c", upload, target / "actor/rank_0.pt"], env=shell.environment, check=True)
    _, err = shell("pull", "hf://dev/damaged", tmp_path / "to", code=printing.DAMAGED)
    assert "actor/rank_0.pt" in err and "dev/damaged@main" in err and os.listdir(tmp_path / "to") == []


def test_a_repository_that_is_not_there_is_told(shell: Shell, tmp_path: Path) -> None:
    _, err = shell("pull", "hf://dev/nowhere", tmp_path / "to", code=printing.ERROR)
    assert "check the name" in err and not (tmp_path / "to").exists()


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """A command that does not come to speak with the Hub, in this process: its exit code and what it prints."""
    try:
        code = main.main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    return (code, *capsys.readouterr())


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        ("pull dev/nowhere {to}", printing.ERROR, "hf://namespace/name"),
        ("pull hf://dev/nowhere", 2, "DIR"),
        ("push {run}", printing.ERROR, "name a REPO"),
        ("push {run} --public", printing.ERROR, "go with a REPO"),
        ("push {run} no/good/repo", printing.ERROR, "namespace/name"),
        ("push {to} dev/x", printing.ERROR, "does not exist"),
        ("queue ls {run}", printing.ERROR, "its run pushes nowhere"),
        ("queue ls {run}/checkpoint-1", printing.ERROR, "queue works on a whole directory"),
        ("queue cancel {run}", 2, "NAME"),
        ("queue", 2, "VERB"),
    ],
)
def test_what_cannot_be_meant_is_told(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, code: int, told: str
) -> None:
    before = files(run)
    found, _, err = here(capsys, *command.format(run=run, to=tmp_path / "to").split())
    assert found == code and told in err
    assert files(run) == before and not (tmp_path / "to").exists()


def test_a_run_that_pushes_elsewhere_is_not_turned_around(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_queue.set_repository(run, Repository("dev/there"))
    before = files(run)
    for more in (["dev/here"], ["dev/there", "--public"], ["dev/there", "--revision", "other"]):
        code, _, err = here(capsys, "push", run, *more)
        assert code == printing.ERROR and "its run pushes to hf://dev/there@main (private)" in err
    assert files(run) == before


def test_what_is_owed_is_not_pruned_until_it_is_given_up(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push_queue.set_repository(run, Repository("dev/none"))
    prune = ["prune", run, "--keep", 1, "--json"]
    assert json.loads(here(capsys, *prune)[1])["removed"] == []
    assert here(capsys, "queue", "cancel", run, "checkpoint-1") == (0, "checkpoint-1: cancelled\n", "")
    assert json.loads(here(capsys, *prune)[1])["removed"] == ["checkpoint-1"]
    code, out, _ = here(capsys, "queue", "ls", run, "--json")
    assert code == printing.OWED and json.loads(out)["owed"] == ["checkpoint-2"]
    code, _, err = here(capsys, "queue", "cancel", run, "checkpoint-7")
    assert code == printing.ERROR and "known are checkpoint-1, checkpoint-2" in err


@pytest.mark.parametrize("command", ["push", "pull", "queue", "queue ls", "queue retry", "queue cancel"])
def test_help_explains_and_gives_an_example(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = here(capsys, *command.split(), "--help")
    assert code == 0 and f"  roll-ckpt {command} " in out
    assert "Exit codes: 0 fine, 1 error, 2 wrong usage, 3 damaged, 4 uploads still owed." in out
