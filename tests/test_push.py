"""A checkpoint on the Hub, exactly once, whatever the Hub does: the real client against the local Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_runs
import pytest
from hub_client import Client, Refused
from hub_runs import LARGE, TOKEN, assert_there_once, contents, landed
from roll_ckpt_hub_dev import Fault, LocalHub, routes, server

from roll_ckpt.formats import manifests
from roll_ckpt.upload.hub.push import MARKER

pytest.importorskip("huggingface_hub")

STEPS = (1, 2)

PUSH = """
from pathlib import Path
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.push import push
told = []
def progress(*step):
    told.append(step)
commit = push(Path(checkpoint_dir), Remote(repo, revision), private=private, progress=progress)
{"commit": commit, "told": told}
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub") / "root"
    with LocalHub(root, write_token=TOKEN, read_token="hf_reads", part_bytes=1 << 20) as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    home = tmp_path_factory.mktemp("home")
    client = Client(hub.url, home, HF_TOKEN=TOKEN, ROLL_CKPT_HUB_TIMEOUT_S="1", PYTHONPATH=hub_runs.PYTHON_PATH)
    yield client
    client.close()


@pytest.fixture
def client(hub: LocalHub, shared_client: Client) -> Iterator[Client]:
    yield shared_client
    hub.faults.clear()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints, each with a file that goes by itself."""
    output_dir = tmp_path_factory.mktemp("run") / "run"
    hub_runs.history(output_dir, list(STEPS))
    return output_dir


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own, which is not there yet."""
    return "dev/r" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]


def push(client: Client, checkpoint_dir: Path, repo: str, *, revision: str = "main", private: bool = True) -> str:
    return str(client(PUSH, checkpoint_dir=checkpoint_dir, repo=repo, revision=revision, private=private)["commit"])


def refused(client: Client, checkpoint_dir: Path, repo: str, **more: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        push(client, checkpoint_dir, repo, **more)
    assert TOKEN not in caught.value.text
    return caught.value


# --- what a push makes --------------------------------------------------------------------------------------


@pytest.mark.core("huggingface_hub")
def test_a_push_is_one_commit_with_every_file_and_a_tag(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path
) -> None:
    told = client(PUSH, checkpoint_dir=run / "checkpoint-1", repo=repo, revision="main", private=True)
    assert assert_there_once(hub, repo, run / "checkpoint-1", tmp_path) == told["commit"]
    assert hub.store.repo(repo).private
    card = contents(hub, repo)["README.md"].decode()
    assert MARKER in card and "checkpoint-1" in card and repo in card
    sent = [step for step in told["told"] if step[0] == "sending"]
    assert [done for _, done, _ in sent] == sorted(done for _, done, _ in sent) and sent[-1][1] == sent[-1][2]


def test_a_second_push_changes_nothing(hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path) -> None:
    first = push(client, run / "checkpoint-1", repo)
    since = len(hub.requests())
    assert push(client, run / "checkpoint-1", repo) == first
    assert {line["method"] for line in hub.requests()[since:]} == {"GET"}
    assert_there_once(hub, repo, run / "checkpoint-1", tmp_path)


def test_files_of_the_checkpoint_before_go_and_those_of_others_stay(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path
) -> None:
    (checkpoint_dir, other) = (run / "checkpoint-1", run / "checkpoint-2")
    push(client, checkpoint_dir, repo)
    client(
        "ops = [Add(p, b'mine') for p in ('NOTES.md', 'README.md', 'actor/mine.txt')]\n"
        "api.create_commit(repo, [*ops, Delete('actor/also_1.txt')], commit_message='mine')",
        repo=repo,
    )
    only_old = {r.path for r in manifests.read(checkpoint_dir).files} - {r.path for r in manifests.read(other).files}
    assert only_old
    push(client, other, repo)
    there = contents(hub, repo)
    assert not only_old & there.keys()
    assert {p: there[p] for p in ("NOTES.md", "README.md", "actor/mine.txt")} == dict.fromkeys(
        ("NOTES.md", "README.md", "actor/mine.txt"), b"mine"
    )
    for each in (checkpoint_dir, other):
        assert_there_once(hub, repo, each, tmp_path)


def test_a_step_that_was_saved_again_takes_the_tag(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path
) -> None:
    first = push(client, run / "checkpoint-2", repo)
    shutil.copytree(run / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    hub_runs.history(run, [2], salt="new")
    second = push(client, run / "checkpoint-2", repo)
    assert second != first and assert_there_once(hub, repo, run / "checkpoint-2", tmp_path) == second
    assert push(client, tmp_path / "old" / "checkpoint-2", repo) == first  # it is there: the tag stays at the newer
    assert hub.store.repo(repo).tags["checkpoint-2"] == second


def test_a_push_to_another_branch(hub: LocalHub, client: Client, run: Path, repo: str) -> None:
    assert "create the branch" in refused_branch(hub, client, run, repo)
    client("api.create_branch(repo, branch='runs/one')", repo=repo)
    push(client, run / "checkpoint-1", repo, revision="runs/one")
    assert len(landed(hub, repo, run / "checkpoint-1", "runs/one")) == 1
    assert not landed(hub, repo, run / "checkpoint-1", "main")
    error = refused(client, run / "checkpoint-1", repo, revision="checkpoint-1")
    assert error.kind == "HubRefused" and "no branch" in error.text


def test_a_tag_of_another_branch_is_no_push_to_this_one(hub: LocalHub, client: Client, run: Path, repo: str) -> None:
    client("api.create_repo(repo, private=True); api.create_branch(repo, branch='experiment')", repo=repo)
    push(client, run / "checkpoint-1", repo)
    push(client, run / "checkpoint-1", repo, revision="experiment")
    for branch in ("main", "experiment"):
        assert len(landed(hub, repo, run / "checkpoint-1", branch)) == 1
        assert "manifest.json" in contents(hub, repo, branch)
    aside = PUSH.replace("progress=progress", "on_side_branch=True")
    push(client, run / "checkpoint-2", repo)
    client("api.create_branch(repo, branch='third', revision='main')", repo=repo)
    hub_runs.history(run, [3])
    made = {
        branch: [
            client(aside, checkpoint_dir=run / "checkpoint-3", repo=repo, revision=branch, private=True)["commit"]
            for _ in range(2)
        ]
        for branch in ("main", "experiment")
    }
    assert made["main"][0] == made["main"][1] != made["experiment"][0] == made["experiment"][1]
    assert hub.store.repo(repo).branches.keys() == {"main", "experiment", "third"}


def refused_branch(hub: LocalHub, client: Client, run: Path, repo: str) -> str:
    hub.store.create(repo, private=True)
    error = refused(client, run / "checkpoint-1", repo, revision="runs/one")
    assert error.kind == "HubRefused" and len(list(hub.store.history(hub.store.repo(repo), "main"))) == 1
    return error.text


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for(
    hub: LocalHub, client: Client, run: Path, repo: str
) -> None:
    hub.store.create(repo, private=False)
    error = refused(client, run / "checkpoint-1", repo)
    assert error.kind == "HubRefused" and "public" in error.text and repo in error.text
    assert contents(hub, repo).keys() == {".gitattributes"}
    push(client, run / "checkpoint-1", repo, private=False)


def test_a_damaged_checkpoint_is_not_pushed(hub: LocalHub, client: Client, run: Path, repo: str) -> None:
    checkpoint_dir = run / "checkpoint-1"
    for path in ("actor/rank_0.pt", "actor/large.bin", "votes/actor.0.json", "decision", "votes/expected.json"):
        kept = (checkpoint_dir / path).read_bytes()
        data = bytearray(kept)
        data[len(data) // 2] ^= 1
        (checkpoint_dir / path).write_bytes(data)
        error = refused(client, checkpoint_dir, repo)
        assert error.kind == "Damaged" and path in error.text
        (checkpoint_dir / path).write_bytes(kept)
    assert contents(hub, repo).keys() == {".gitattributes"}


@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "aB3" * 12, "my_hf_" + "aB3" * 12, "api_org_" + "aB3" * 12])
def test_a_token_in_a_file_is_refused_and_told_nowhere(
    hub: LocalHub, client: Client, tmp_path: Path, repo: str, secret: str
) -> None:
    hub_runs.history(tmp_path / "run", [1], extra={"actor/args.json": json.dumps({"hub_token": secret}).encode()})
    error = refused(client, tmp_path / "run" / "checkpoint-1", repo)
    assert error.kind == "HubRefused" and "actor/args.json" in error.text and secret not in error.text
    assert contents(hub, repo).keys() == {".gitattributes"}


def test_a_gitignore_that_keeps_files_out_is_refused(
    hub: LocalHub, client: Client, run: Path, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignoring(call: routes.Call) -> routes.Reply:
        reply = preupload.answer(call)
        for file in reply.json["files"]:
            file["shouldIgnore"] = file["path"].endswith(".bin")
        return reply

    (preupload,) = [route for route in routes.ROUTES if route.name == "preupload"]
    others = [route for route in routes.ROUTES if route is not preupload]
    monkeypatch.setattr(server, "ROUTES", [replace(preupload, answer=ignoring), *others])
    error = refused(client, run / "checkpoint-1", repo)
    assert error.kind == "HubRefused" and ".gitignore" in error.text and "actor/large.bin" in error.text
    assert contents(hub, repo).keys() == {".gitattributes"}


def test_a_file_that_changes_while_it_is_sent_is_not_committed(
    hub: LocalHub, client: Client, run: Path, repo: str
) -> None:
    checkpoint_dir = run / "checkpoint-1"
    hub.faults.add(Fault("lfs_batch", stall_s=0.7))
    client.start(PUSH, checkpoint_dir=checkpoint_dir, repo=repo, revision="main", private=True)
    hub_runs.wait_for(lambda: any(line["route"] == "preupload" for line in hub.requests() if repo in line["path"]))
    (checkpoint_dir / "actor/large.bin").write_bytes(LARGE)
    with pytest.raises(Refused) as caught:
        client.finish()
    assert caught.value.kind == "Damaged" and contents(hub, repo).keys() == {".gitattributes"}


# --- what the Hub does wrong --------------------------------------------------------------------------------

UNAVAILABLE = [
    Fault("commit", status=500),
    Fault("commit", status=503),
    Fault("commit", status=429, retry_after_s=7),
    Fault("commit", status=409),
    Fault("commit", cut_at=0),
    Fault("commit", stall_s=5),
    Fault("repo_info", status=503),
    Fault("repo_info", stall_s=5),
    Fault("refs", cut_at=5),
    Fault("validate_yaml", status=502),
]


@pytest.mark.parametrize("fault", UNAVAILABLE, ids=lambda fault: f"{fault.route} {fault.status or fault.stall_s}")
def test_a_push_that_the_hub_could_not_take_is_made_by_the_next(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path, fault: Fault
) -> None:
    hub.store.create(repo, private=True)
    hub.faults.add(fault)
    error = refused(client, run / "checkpoint-1", repo)
    assert error.kind == "HubUnavailable" and repo in error.text
    assert "ConnectionError" in error.bases
    push(client, run / "checkpoint-1", repo)
    assert_there_once(hub, repo, run / "checkpoint-1", tmp_path)


def test_a_commit_that_lands_late_is_no_second_one(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path
) -> None:
    hub.store.create(repo, private=True)
    hub.faults.add(Fault("commit", stall_s=2))
    assert refused(client, run / "checkpoint-1", repo).kind == "HubUnavailable"
    push(client, run / "checkpoint-1", repo)

    def answers() -> list[int]:
        return [line["status"] for line in hub.requests() if line["route"] == "commit" and repo in line["path"]]

    hub_runs.wait_for(lambda: len(answers()) == 2)
    assert answers() == [200, 412]
    assert_there_once(hub, repo, run / "checkpoint-1", tmp_path)


LANDED = [
    Fault("commit", status=500, landed=True),
    Fault("commit", status=412, landed=True),
    Fault("commit", cut_at=0, landed=True),
    Fault("commit", cut_at=5, landed=True),
    Fault("commit", stall_s=5, landed=True),
    Fault("commit", status=412),
    Fault("create_tag", status=500),
    Fault("create_tag", status=409, landed=True),
    Fault("create_tag", cut_at=0, landed=True),
    Fault("lfs_batch", status=503),
    Fault("lfs_part", cut_at=0),
]


@pytest.mark.parametrize("fault", LANDED, ids=lambda fault: f"{fault.route} {fault.status or fault.stall_s}")
def test_a_push_whose_answer_was_lost_is_there_once(
    hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path, fault: Fault
) -> None:
    hub.store.create(repo, private=True)
    hub.faults.add(fault)
    for path in (run / "checkpoint-1").rglob("large.bin"):
        assert path.stat().st_size > 1 << 20
    push(client, run / "checkpoint-1", repo)
    assert_there_once(hub, repo, run / "checkpoint-1", tmp_path)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("repo_info", status=401), "HF_TOKEN"),
        (Fault("commit", status=403), "may write"),
        (Fault("preupload", status=404), "HF_ENDPOINT"),
        (Fault("commit", status=400, message="files contain valid Hugging Face secrets"), "secrets"),
        (Fault("commit", status=413), "larger"),
    ],
)
def test_a_no_is_told_with_what_to_do(
    hub: LocalHub, client: Client, run: Path, repo: str, fault: Fault, says: str
) -> None:
    hub.store.create(repo, private=True)
    hub.faults.add(fault)
    error = refused(client, run / "checkpoint-1", repo)
    assert error.kind == "HubRefused" and says in error.text and repo in error.text and str(fault.status) in error.text
    assert contents(hub, repo).keys() == {".gitattributes"}


def test_who_may_only_read_is_refused(hub: LocalHub, run: Path, repo: str, tmp_path: Path) -> None:
    hub.store.create(repo, private=True)
    for token, status in (("hf_reads", "403"), ("hf_wrongwrongwrong", "401"), ("", "401")):
        client = Client(hub.url, tmp_path / "home", HF_TOKEN=token, PYTHONPATH=hub_runs.PYTHON_PATH)
        error = refused(client, run / "checkpoint-1", repo)
        assert error.kind == "HubRefused" and status in error.text and (not token or token not in error.text)
        client.close()


def test_no_secret_is_told(hub: LocalHub, run: Path, repo: str, tmp_path: Path) -> None:
    hub.store.create(repo, private=True)
    token = "sesame-open-sesame"
    hub.faults.add(Fault("repo_info", status=403, message=f"{token} and org_api_org_aB3aB3aB3 may not"))
    host = hub.url.removeprefix("http://")
    for endpoint in (hub.url, f"http://bob:s@cret@{host}", "http://bob:s@cret@127.0.0.1:1"):
        client = Client(endpoint, tmp_path / "home", HF_TOKEN=token, PYTHONPATH=hub_runs.PYTHON_PATH)
        with pytest.raises(Refused) as caught:
            push(client, run / "checkpoint-1", repo)
        told = caught.value.text
        assert not [secret for secret in (token, "aB3", "bob", "cret") if secret in told], told
        client.close()


def test_somebody_else_commits_meanwhile(hub: LocalHub, client: Client, run: Path, repo: str, tmp_path: Path) -> None:
    hub.store.create(repo, private=True)
    hub.faults.add(Fault("commit", stall_s=0.6))
    client.start(PUSH, checkpoint_dir=run / "checkpoint-1", repo=repo, revision="main", private=True)
    hub_runs.wait_for(lambda: any(line["route"] == "validate_yaml" for line in hub.requests()[-3:]))
    hub.store.commit(repo, "main", [], parent=None, title="another's", message="")
    client.finish()
    assert_there_once(hub, repo, run / "checkpoint-1", tmp_path)
    assert [c.title for c in hub.store.history(hub.store.repo(repo), "main")][1] == "another's"


def test_the_requests_log_holds_no_token(hub: LocalHub) -> None:
    assert b"hf_" not in hub.log_path.read_bytes()
    assert os.environ.get("HF_TOKEN") != TOKEN  # so it can only have come from the clients' environment
