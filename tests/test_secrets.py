"""No token and no password in any file, log, message or process title of ours, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import hub_runs
import pytest
from hub_client import settings
from hub_runs import TOKEN
from roll_ckpt_hub_dev import Fault, LocalHub

from roll_ckpt.config import HubUpload, PipelineConfig, Settings
from roll_ckpt.errors import ConfigError
from roll_ckpt.upload.hub import push_queue
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.push_queue import Repository

pytest.importorskip("huggingface_hub")

REPO = "dev/run"
PASSWORD = "open-sesame-5"
SECRETS = (TOKEN, PASSWORD)
PLACES: dict[str, Callable[[], object]] = {
    "an address with a user": lambda: Remote.parse(f"hf://bob:{TOKEN}@dev/run"),
    "an address with a host": lambda: Remote.parse(f"hf://bob:{PASSWORD}@hub.example/dev/run"),
    "a revision": lambda: Remote.parse(f"hf://dev/run@{TOKEN}/../x"),
    "a repository": lambda: HubUpload.parse({"type": "hub", "repo_id": f"{TOKEN}/x/y"}, where="x"),
    "the run's name": lambda: Settings.parse({"run_id": TOKEN}, where="checkpoint.roll_ckpt"),
    "a directory": lambda: PipelineConfig.parse({"output_dir": f"runs/{TOKEN}", "save_steps": 1, "max_steps": 2}, "x"),
    "a key of its own": lambda: Settings.parse({"hub_token": TOKEN}, where="checkpoint.roll_ckpt"),
    "a list": lambda: Settings.parse({"load": {"allow": [f"a.{TOKEN}"]}}, where="checkpoint.roll_ckpt"),
    "where to resume": lambda: PipelineConfig.parse(
        {
            "output_dir": "x",
            "save_steps": 1,
            "max_steps": 2,
            "resume_from_checkpoint": f"hf://bob:{PASSWORD}@x/dev/run",
        },
        "x",
    ),
}


@pytest.mark.parametrize("where", PLACES)
def test_a_secret_in_a_configuration_or_an_address_is_refused_and_not_repeated(where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        PLACES[where]()
    text = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(caught.value)
    code = "".join(line for line in text.splitlines(keepends=True) if "lambda" not in line)
    assert not [secret for secret in SECRETS if secret in code], code


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    with LocalHub(tmp_path / "hub", write_token=TOKEN, part_bytes=1 << 20) as hub:
        yield hub


def test_a_push_that_fails_dies_and_succeeds_leaves_no_secret_anywhere(hub: LocalHub, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hub_runs.history(run, [1, 2])
    push_queue.set_repository(run, Repository(REPO))
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        **settings(hub.url, tmp_path / "home"),
        **{"HF_TOKEN": TOKEN, "ROLL_CKPT_HUB_TIMEOUT_S": "1", "PYTHONPATH": hub_runs.PYTHON_PATH},
    }
    heard: list[str] = []

    def command(*arguments: str, **more: str) -> int:
        done = subprocess.run(
            [sys.executable, "-m", "roll_ckpt", *arguments], env={**environment, **more}, capture_output=True, text=True
        )
        heard.extend((done.stdout, done.stderr))
        return done.returncode

    host = hub.url.removeprefix("http://")
    hub.faults.add(Fault("repo_info", status=403, message=f"{TOKEN} of http://bob:{PASSWORD}@{host} may not"))
    assert command("push", str(run)) == 4
    for trouble in (
        {"HF_ENDPOINT": f"http://bob:{PASSWORD}@{host}"},
        {"HF_ENDPOINT": f"http://bob:{PASSWORD}@127.0.0.1:1"},
        {"HTTP_PROXY": f"http://bob:{PASSWORD}@127.0.0.1:1"},
        {"HTTP_PROXY": f"no proxy, but {PASSWORD}@"},
    ):
        assert command("push", str(run / "checkpoint-1"), REPO, **trouble) == 1
    assert command("push", str(run), "--json", HTTP_PROXY=f"http://bob:{PASSWORD}@127.0.0.1:1") == 4
    assert command("pull", f"hf://{REPO}", str(tmp_path / "pulled"), HF_ENDPOINT=f"http://b:{PASSWORD}@{host}") == 1
    assert command("queue", "ls", str(run)) == 4 and command("queue", "ls", str(run), "--json") == 4

    hub.faults.clear()
    hub.faults.add(Fault("lfs_upload", stall_s=60))
    uploader = subprocess.Popen(
        [sys.executable, "-m", "roll_ckpt.upload.hub.worker", str(run), "--again"],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    hub_runs.wait_for(lambda: any(line["route"] == "preupload" for line in hub.requests()))
    heard.append(Path(f"/proc/{uploader.pid}/cmdline").read_text())
    uploader.send_signal(signal.SIGKILL)
    heard.extend(uploader.communicate())
    hub.faults.clear()
    assert command("push", str(run)) == 0
    assert command("pull", f"hf://{REPO}", str(tmp_path / "pulled")) == 0

    assert "README.md" in hub_runs.contents(hub, REPO)
    found = [text for text in heard if any(secret in text for secret in SECRETS)]
    assert not found, found
    for path in tmp_path.rglob("*"):  # the run, what was pulled, the Hub with its log, and the client's home
        if path.is_file():
            assert not [secret for secret in SECRETS if secret.encode() in path.read_bytes()], path
