"""The local Hub, as the real huggingface_hub client meets it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hub_client import Client, Refused
from roll_ckpt_hub_dev import Fault, LocalHub, routes, server
from roll_ckpt_hub_dev.store import Edit, Refusal, Store

from roll_ckpt.disk import failpoints, reads, tree
from roll_ckpt.errors import ConfigError
from roll_ckpt.upload.hub import version

pytest.importorskip("huggingface_hub")

LARGE = random.Random(3).randbytes(300_000)
PART_BYTES = 200_000
FILES = {"README.md": b"# card\n", "weights/model.safetensors": LARGE, "weights/small.bin": b"\0\1", "a/b/c.txt": b"c"}

PUSH = """
ops = [Add(path, folder + "/" + path) for path in paths]
api.preupload_lfs_files(repo, ops)
done = api.create_commit(repo, ops, commit_message="step 7", parent_commit=parent)
done.oid
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub") / "root"
    with LocalHub(root, write_token="hf_writes", read_token="hf_reads", part_bytes=PART_BYTES) as hub:
        yield hub


@pytest.fixture(scope="module")
def shared_client(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(hub.url, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def client(hub: LocalHub, shared_client: Client) -> Iterator[Client]:
    yield shared_client
    hub.faults.clear()


@pytest.fixture
def repo(client: Client, request: pytest.FixtureRequest) -> str:
    """A private repository of this test's own."""
    repo = "dev/r" + hashlib.sha1(request.node.name.encode()).hexdigest()[:12]
    client("api.create_repo(repo, private=True)", repo=repo)
    return repo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, data in FILES.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)
    return tmp_path / "up"


def push(client: Client, repo: str, folder: Path, parent: str | None = None) -> str:
    return str(client(PUSH, repo=repo, folder=folder, paths=list(FILES), parent=parent))


def head(client: Client, repo: str) -> str:
    return str(client("api.repo_info(repo).sha", repo=repo))


def titles(client: Client, repo: str) -> list[str]:
    return list(client("[c.title for c in api.list_repo_commits(repo)]", repo=repo))


def refused(client: Client, code: str, **names: object) -> Refused:
    with pytest.raises(Refused) as caught:
        client(code, **names)
    return caught.value


def calls(hub: LocalHub, route: str, since: int = 0) -> list[dict[str, Any]]:
    return [line for line in hub.requests()[since:] if line["route"] == route]


# --- every route --------------------------------------------------------------------------------------------


def test_who_am_i(client: Client) -> None:
    assert client("api.whoami()['name'], api.whoami()['auth']['accessToken']['role']") == ["dev", "write"]
    assert client("api.whoami(token='hf_reads')['auth']['accessToken']['role']") == "read"
    assert refused(client, "api.whoami(token='hf_other')").status == 401


def test_a_repository_is_made_once(client: Client, repo: str) -> None:
    assert client("api.repo_info(repo).private", repo=repo)
    assert client("api.create_repo(repo, private=True, exist_ok=True)", repo=repo).endswith(f"/{repo}")
    assert refused(client, "api.create_repo(repo)", repo=repo).status == 409
    assert client("api.create_repo('unnamed').repo_id") == "dev/unnamed"
    assert client("api.repo_exists(repo), api.repo_exists('dev/none')", repo=repo) == [True, False]


def test_a_repository_is_deleted(client: Client, repo: str) -> None:
    client("api.delete_repo(repo)", repo=repo)
    assert not client("api.repo_exists(repo)", repo=repo)
    assert refused(client, "api.delete_repo(repo)", repo=repo).kind == "RepositoryNotFoundError"
    client("api.delete_repo(repo, missing_ok=True)\napi.create_repo(repo)", repo=repo)
    assert titles(client, repo) == ["initial commit"]


def test_a_push_comes_back_byte_for_byte(
    hub: LocalHub, client: Client, repo: str, folder: Path, tmp_path: Path
) -> None:
    files = {**FILES, "weights/model.safetensors": LARGE + b"mine", "weights/small.bin": b"\0mine"}
    for path, data in files.items():
        (folder / path).write_bytes(data)
    since = len(hub.requests())
    oid = push(client, repo, folder)
    assert calls(hub, "lfs_upload", since) and len(calls(hub, "lfs_part", since)) == 2
    assert len(calls(hub, "lfs_verify", since)) == 2 and len(calls(hub, "commit", since)) == 1
    assert head(client, repo) == oid
    path = client("api.snapshot_download(repo, local_dir=to)", repo=repo, to=tmp_path / "down")
    assert {name: (Path(path) / name).read_bytes() for name in files} == files
    if client("hasattr(api, 'verify_repo_checksums')"):
        assert client("api.verify_repo_checksums(repo, local_dir=to).mismatches", repo=repo, to=path) == []
    since = len(hub.requests())
    push(client, repo, folder)
    assert not calls(hub, "lfs_upload", since) and not calls(hub, "lfs_part", since)


def test_upload_folder(client: Client, repo: str, folder: Path) -> None:
    client("api.upload_folder(repo_id=repo, folder_path=folder, path_in_repo='checkpoint-7')", repo=repo, folder=folder)
    assert client("sorted(api.list_repo_files(repo))", repo=repo) == [
        ".gitattributes",
        *sorted(f"checkpoint-7/{path}" for path in FILES),
    ]


def test_files_are_listed_page_by_page(
    client: Client, repo: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(client, repo, folder)
    monkeypatch.setattr(routes, "PAGE", 2)
    tree = "[(type(e).__name__, e.path) for e in api.list_repo_tree(repo, **how)]"
    top = [["RepoFile", ".gitattributes"], ["RepoFile", "README.md"], ["RepoFolder", "a"], ["RepoFolder", "weights"]]
    assert client(tree, repo=repo, how={}) == top
    assert len(client(tree, repo=repo, how={"recursive": True})) == 8
    assert client(tree, repo=repo, how={"path_in_repo": "a/b"}) == [["RepoFile", "a/b/c.txt"]]
    assert "EntryNotFoundError" in refused(client, tree, repo=repo, how={"path_in_repo": "none"}).bases
    told = client("f = api.get_paths_info(repo, ['weights/small.bin', 'a', 'none'])\n[vars(e) for e in f]", repo=repo)
    assert [entry["path"] for entry in told] == ["weights/small.bin", "a"]
    assert told[0]["lfs"]["sha256"] == hashlib.sha256(b"\0\1").hexdigest()
    assert len(client("[c.title for c in api.list_repo_commits(repo)]", repo=repo)) == 2
    blobs = client("{s.rfilename: s.size for s in api.repo_info(repo, files_metadata=True).siblings}", repo=repo)
    assert {path: blobs[path] for path in FILES} == {path: len(data) for path, data in FILES.items()}


def test_files_and_folders_are_deleted_by_a_commit(client: Client, repo: str, folder: Path) -> None:
    push(client, repo, folder)
    client("api.delete_folder('weights', repo)\napi.delete_file('a/b/c.txt', repo)", repo=repo)
    assert client("sorted(api.list_repo_files(repo))", repo=repo) == [".gitattributes", "README.md"]
    assert "EntryNotFoundError" in refused(client, "api.delete_file('none', repo)", repo=repo).bases


def test_tags_stay_where_they_were_put(client: Client, repo: str, folder: Path) -> None:
    oid = push(client, repo, folder)
    client("api.create_tag(repo, tag='checkpoint-7', tag_message='step 7')", repo=repo)
    client("api.upload_file(path_or_fileobj=b'later', path_in_repo='README.md', repo_id=repo)", repo=repo)
    assert client("[(t.name, t.target_commit) for t in api.list_repo_refs(repo).tags]", repo=repo) == [
        ["checkpoint-7", oid]
    ]
    assert client("api.repo_info(repo, revision='checkpoint-7').sha", repo=repo) == oid
    old = client("open(api.hf_hub_download(repo, 'README.md', revision='checkpoint-7')).read()", repo=repo)
    assert old == "# card\n"
    assert refused(client, "api.create_tag(repo, tag='checkpoint-7')", repo=repo).status == 409
    client("api.create_tag(repo, tag='checkpoint-7', exist_ok=True)", repo=repo)
    assert refused(client, "api.create_tag(repo, tag='t', revision='none')", repo=repo).kind == "RevisionNotFoundError"
    client("api.delete_tag(repo, tag='checkpoint-7')", repo=repo)
    assert refused(client, "api.delete_tag(repo, tag='checkpoint-7')", repo=repo).kind == "RevisionNotFoundError"


def test_branches_move_alone(client: Client, repo: str) -> None:
    before = head(client, repo)
    client("api.create_branch(repo, branch='runs/one')", repo=repo)
    assert refused(client, "api.create_branch(repo, branch='runs/one')", repo=repo).status == 409
    client("api.create_branch(repo, branch='runs/one', exist_ok=True)", repo=repo)
    upload = "api.upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id=repo, revision='runs/one')"
    client(upload, repo=repo)
    assert head(client, repo) == before
    assert client("sorted(b.name for b in api.list_repo_refs(repo).branches)", repo=repo) == ["main", "runs/one"]
    assert client("api.file_exists(repo, 'x', revision='runs/one'), api.file_exists(repo, 'x')", repo=repo) == [
        True,
        False,
    ]
    client("api.delete_branch(repo, branch='runs/one')", repo=repo)
    assert refused(client, upload, repo=repo).kind == "RevisionNotFoundError"
    assert refused(client, "api.delete_branch(repo, branch='main')", repo=repo).status == 403


def test_a_download_goes_on_where_it_was_cut(
    hub: LocalHub, client: Client, repo: str, folder: Path, tmp_path: Path
) -> None:
    push(client, repo, folder)
    since = len(hub.requests())
    hub.faults.add(Fault("download", cut_at=100_000))
    small_chunks = "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 50_000\n"
    download = "api.hf_hub_download(repo, 'weights/model.safetensors', local_dir=to)"
    with suppress(Refused):  # an older client goes on only when it is asked again
        client(small_chunks + download, repo=repo, to=tmp_path / "d")
    path = client(download, repo=repo, to=tmp_path / "d")
    assert Path(path).read_bytes() == LARGE
    assert [line["status"] for line in calls(hub, "download", since)] == [200, 206]
    assert calls(hub, "download", since)[1]["answered"] < len(LARGE)


@pytest.mark.parametrize(
    ("asked", "status", "data"),
    [
        ("bytes=0-9", 206, LARGE[:10]),
        ("bytes=299990-", 206, LARGE[-10:]),
        ("bytes=299990-999999", 206, LARGE[-10:]),
        ("bytes=-5", 206, LARGE[-5:]),
        ("bytes=300000-", 416, None),
        ("lines=1", 200, LARGE),
    ],
)
def test_ranges(hub: LocalHub, asked: str, status: int, data: bytes | None) -> None:
    sha256 = hashlib.sha256(LARGE).hexdigest()
    hub.store.put_lfs(sha256, [LARGE])
    with_it = Edit("m.bin", hub.store.lfs_file(sha256, len(LARGE)))
    repo = f"dev/range{hashlib.sha1(asked.encode()).hexdigest()[:8]}"
    hub.store.create(repo, private=False)
    made = hub.store.commit(repo, "main", [with_it], parent=None, title="", message="")
    request = urllib.request.Request(f"{hub.url}/{repo}/resolve/main/m.bin", headers={"Range": asked})
    try:
        answer = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert answer.status == status
        if data is not None:
            assert answer.read() == data
            assert answer.headers["ETag"] == f'"{sha256}"' == answer.headers["X-Linked-ETag"]
            assert answer.headers["X-Repo-Commit"] == made.id


# --- who may do what ----------------------------------------------------------------------------------------


def test_without_a_token_only_what_is_public_is_seen(client: Client, repo: str) -> None:
    assert refused(client, "api.repo_info(repo, token=False)", repo=repo).kind == "RepositoryNotFoundError"
    assert refused(client, "api.repo_info('dev/none', token=False)").status == 401
    client("api.create_repo('dev/public', exist_ok=True)")
    assert client("api.repo_info('dev/public', token=False).private") is False
    assert refused(client, "api.create_repo('dev/mine', token=False)").status == 401


def test_a_token_that_reads_may_not_write(client: Client, repo: str) -> None:
    assert client("api.repo_info(repo, token='hf_reads').id", repo=repo) == repo
    client("api.auth_check(repo, token='hf_reads')", repo=repo)
    if client("import inspect\n'write' in inspect.signature(api.auth_check).parameters"):
        client("api.auth_check(repo, write=True)", repo=repo)
        assert refused(client, "api.auth_check(repo, write=True, token='hf_reads')", repo=repo).status == 403
    upload = "api.upload_file(path_or_fileobj=b'x', path_in_repo='x', repo_id=repo, token='hf_reads')"
    error = refused(client, upload, repo=repo)
    assert error.status == 403 and "may only read" in error.text
    # With exist_ok the client is content if it can see the repository.
    client("api.create_repo(repo, exist_ok=True, token='hf_reads')", repo=repo)


def test_a_wrong_token_is_told_as_such(client: Client, repo: str) -> None:
    error = refused(client, "api.repo_info(repo, token='hf_other')", repo=repo)
    assert error.status == 401 and error.kind == "HfHubHTTPError" and "Invalid credentials" in error.text


def test_tokens_are_not_in_the_log(hub: LocalHub, client: Client, repo: str) -> None:
    refused(client, "api.repo_info(repo, token='hf_other')", repo=repo)
    assert b"hf_" not in hub.log_path.read_bytes()
    assert {line["token"] for line in hub.requests()} >= {"write", "wrong"}
    with urllib.request.urlopen(f"{hub.url}{server.REQUESTS_PATH}") as answer:
        assert json.load(answer) == hub.requests()


# --- what a commit refuses ----------------------------------------------------------------------------------


def test_a_stale_parent_is_refused(client: Client, repo: str, folder: Path) -> None:
    old = head(client, repo)
    new = push(client, repo, folder, parent=old)
    (folder / "README.md").write_bytes(b"# another card\n")  # or else there is nothing to commit
    with pytest.raises(Refused) as caught:
        push(client, repo, folder, parent=old)
    assert caught.value.status == 412 and head(client, repo) == new


def test_of_two_pushes_with_one_parent_one_wins(hub: LocalHub, client: Client, repo: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
def one(n):
    try:
        api.create_commit(repo, [Add(f"{n}", b"x")], commit_message=str(n), parent_commit=parent)
        return 200
    except Exception as error:
        return error.response.status_code
with ThreadPoolExecutor(4) as pool:
    answers = list(pool.map(one, range(4)))
sorted(answers)
"""
    assert client(code, repo=repo, parent=head(client, repo)) == [200, 412, 412, 412]
    assert len(titles(client, repo)) == 2


def test_what_was_not_uploaded_cannot_be_committed(hub: LocalHub, client: Client, repo: str) -> None:
    code = """
op = Add("x.bin", data)
api.preupload_lfs_files(repo, [op])
op.upload_info.{wrong}
api.create_commit(repo, [op], commit_message="x")
"""
    for wrong in ("sha256 = b'0' * 32", "size = 7"):
        error = refused(client, "data = b'abc'\n" + code.format(wrong=wrong), repo=repo)
        assert error.kind == "BadRequestError" and "LFS pointer" in error.text
    assert titles(client, repo) == ["initial commit"]


def test_an_upload_that_is_not_what_it_says_is_refused(hub: LocalHub) -> None:
    with pytest.raises(Refusal, match="SHA-256"):
        hub.store.put_lfs("0" * 64, [b"other"])
    assert hub.store.lfs_bytes("0" * 64) is None


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", ".", "a/../../x"])
def test_a_path_that_leaves_the_repository_is_refused(hub: LocalHub, client: Client, repo: str, path: str) -> None:
    body = json.dumps({"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}})
    post = urllib.request.Request(
        f"{hub.url}/api/models/{repo}/commit/main", body.encode(), {"Authorization": "Bearer hf_writes"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(post)
    with caught.value as answer:
        assert answer.status == 400
    assert titles(client, repo) == ["initial commit"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/repos/create", "[]"),
        ("/api/repos/create", "{"),
        ("/api/repos/create", '{"name": "../x"}'),
        ("/api/repos/create", '{"name": "x", "type": "dataset"}'),
        ("/api/models/{repo}/commit/main", '{"key": "header", "value": 7}'),
        ("/api/models/{repo}/commit/main", '{"key": "header", "value": {"summary": "x", "parentCommit": 7}}'),
        ("/api/models/{repo}/commit/main", '{"key": "lfsFile", "value": {"path": "x", "oid": "../x"}}'),
        ("/api/models/{repo}/commit/main", '{"key": "other", "value": {"path": "x"}}'),
        ("/api/models/{repo}/commit/main", "{}"),
        ("/api/models/{repo}/preupload/main", '{"files": [7]}'),
        ("/api/models/{repo}/tag/main", '{"tag": null}'),
    ],
)
def test_a_body_that_makes_no_sense_is_a_bad_request(hub: LocalHub, repo: str, path: str, body: str) -> None:
    url = hub.url + path.format(repo=repo)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(url, body.encode(), {"Authorization": "Bearer hf_writes"}))
    with caught.value as answer:
        assert answer.status == 400 and json.load(answer)["error"]


def test_an_upload_that_stops_in_the_middle_is_not_kept(hub: LocalHub) -> None:
    sha256 = hashlib.sha256(b"never all of it").hexdigest()
    for head in ("Content-Length: 15\r\n\r\nnever", "Transfer-Encoding: chunked\r\n\r\n-5\r\nnever"):
        with socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(f"PUT /lfs-storage/{sha256} HTTP/1.1\r\nHost: x\r\n{head}".encode())
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    assert hub.store.lfs_bytes(sha256) is None
    assert calls(hub, "lfs_upload")[-1]["status"] is None


def test_xet_is_refused_with_what_to_do(hub: LocalHub, tmp_path: Path) -> None:
    pytest.importorskip("hf_xet")
    client = Client(hub.url, tmp_path / "home", HF_HUB_DISABLE_XET="0")
    code = "api.create_repo('dev/xet')\napi.upload_file(path_or_fileobj=p, path_in_repo='x.bin', repo_id='dev/xet')"
    (tmp_path / "x.bin").write_bytes(b"x")
    since = len(hub.requests())
    try:
        client(code, p=tmp_path / "x.bin")
    except Refused as refusal:
        error = refusal
    else:  # an older client asks the Hub whether it has Xet storage
        assert not calls(hub, "xet_token", since) and calls(hub, "lfs_batch", since)
        return
    finally:
        client.close()
    assert len(calls(hub, "xet_token", since)) == 1
    assert "HF_HUB_DISABLE_XET=1" in error.text


# --- every fault --------------------------------------------------------------------------------------------

COMMIT = "api.create_commit(repo, [Add('x', b'x')], commit_message='step 7').oid"


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_refused_commit_changes_nothing(hub: LocalHub, client: Client, repo: str, status: int) -> None:
    hub.faults.add(Fault("commit", status=status, message="as the test wants"))
    error = refused(client, COMMIT, repo=repo)
    assert error.status == status and "as the test wants" in error.text
    assert titles(client, repo) == ["initial commit"]
    client(COMMIT, repo=repo)
    assert titles(client, repo) == ["step 7", "initial commit"]


def test_an_error_although_the_commit_landed(hub: LocalHub, client: Client, repo: str) -> None:
    hub.faults.add(Fault("commit", status=500, landed=True))
    assert refused(client, COMMIT, repo=repo).status == 500
    assert titles(client, repo) == ["step 7", "initial commit"]


@pytest.mark.parametrize("landed", [False, True])
def test_a_connection_that_is_cut(hub: LocalHub, client: Client, repo: str, landed: bool) -> None:
    hub.faults.add(Fault("commit", cut_at=0, landed=landed))
    error = refused(client, COMMIT, repo=repo)
    assert {"TransportError", "RequestException"} & {*error.bases} and error.status is None
    assert titles(client, repo) == ["step 7"] * landed + ["initial commit"]
    assert calls(hub, "commit")[-1]["status"] is None and calls(hub, "commit")[-1]["fault"]


@pytest.mark.parametrize("landed", [False, True])
def test_a_server_that_stalls(hub: LocalHub, client: Client, repo: str, landed: bool) -> None:
    hurry = "from roll_ckpt.upload.hub import version\nversion.limit_all_calls(version.time_limits(s, s))"
    client(hurry, s=0.5)
    hub.faults.add(Fault("commit", stall_s=1.0, cut_at=0, landed=landed))
    error = refused(client, COMMIT, repo=repo)
    client(hurry, s=60)
    assert error.kind == "ReadTimeout"
    assert titles(client, repo) == ["step 7"] * landed + ["initial commit"]


def test_a_stall_alone_only_delays(hub: LocalHub, client: Client, repo: str) -> None:
    hub.faults.add(Fault("commit", stall_s=0.3))
    client(COMMIT, repo=repo)
    assert titles(client, repo) == ["step 7", "initial commit"]
    assert calls(hub, "commit")[-1]["seconds"] >= 0.3


def test_retry_after_is_waited_for(hub: LocalHub, client: Client, repo: str) -> None:
    hub.faults.add(Fault("preupload", status=429, retry_after_s=1))
    began = time.monotonic()
    if not version.retries_questions():
        header = f"try:\n    {COMMIT}\nexcept Exception as e:\n    waits = e.response.headers['retry-after']\nwaits"
        assert client(header, repo=repo) == "1"
        return
    client(COMMIT, repo=repo)
    assert time.monotonic() - began >= 1
    assert [line["status"] for line in calls(hub, "preupload")[-2:]] == [429, 200]


def test_the_nth_call_fails_and_so_many_after_it(hub: LocalHub, client: Client, repo: str) -> None:
    hub.faults.add(Fault("repo_info", call=2, times=2, status=404))
    exists = [client("api.repo_exists(repo)", repo=repo) for _ in range(4)]
    assert exists == [True, False, False, True] and not hub.faults.pending()


def test_an_upload_survives_a_cut_a_503_and_a_lost_answer(
    hub: LocalHub, client: Client, repo: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "weights/model.safetensors").write_bytes(data := LARGE[::-1])
    hub.faults.add(Fault("lfs_part", call=2, cut_at=0))
    hub.faults.add(Fault("lfs_complete", cut_at=0, landed=True))
    (folder / "weights/small.bin").write_bytes(repo.encode())
    hub.faults.add(Fault("lfs_upload", status=503))
    for _ in range(2):
        with suppress(Refused):  # older clients do not try each request again
            push(client, repo, folder)
    push(client, repo, folder)
    assert not hub.faults.pending()
    path = client("api.hf_hub_download(repo, 'weights/model.safetensors')", repo=repo)
    assert Path(path).read_bytes() == data


def test_faults_are_set_over_http(hub: LocalHub, client: Client, repo: str) -> None:
    def control(method: str, fault: object = None) -> Any:
        data = json.dumps(fault).encode() if fault is not None else None
        with urllib.request.urlopen(
            urllib.request.Request(hub.url + server.FAULTS_PATH, data, method=method)
        ) as answer:
            return json.load(answer)

    assert control("POST", {"route": "commit", "status": 403, "code": "GatedRepo"})[0]["status"] == 403
    assert refused(client, COMMIT, repo=repo).kind == "GatedRepoError"
    assert control("GET") == []
    control("POST", {"route": "*", "status": 503, "times": 0})
    assert control("DELETE") == []
    client(COMMIT, repo=repo)
    with pytest.raises(urllib.error.HTTPError) as caught:
        control("POST", {"route": "comit", "status": 503})
    with caught.value as answer:
        assert "no route 'comit'" in json.load(answer)["error"]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"route": "commit"}, "give a status"),
        ({"route": "commit", "status": 200}, "is no error"),
        ({"route": "commit", "status": 500, "cut_at": 0}, "exclude each other"),
        ({"route": "commit", "cut_at": -1}, "negative"),
        ({"route": "commit", "cut_at": 0, "call": 0}, "counts from 1"),
        ({"route": "commit", "cut_at": 0, "retry_after_s": 1}, "go with a status"),
        ({"route": "commit", "status": "500"}, "status cannot be '500'"),
        ({"route": "commit", "statsu": 500}, "no key 'statsu'"),
        ({"status": 500}, '"route"'),
        ([], '"route"'),
    ],
)
def test_a_fault_that_cannot_be_meant_is_refused(hub: LocalHub, wrong: object, why: str) -> None:
    post = urllib.request.Request(hub.url + server.FAULTS_PATH, json.dumps(wrong).encode())
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(post)
    with caught.value as answer:
        assert answer.status == 400 and why in json.load(answer)["error"]


def test_a_route_that_is_not_there_says_so(client: Client, repo: str) -> None:
    error = refused(client, "api.super_squash_history(repo)", repo=repo)
    assert error.status == 404 and "no route POST" in error.text


# --- on disk ------------------------------------------------------------------------------------------------


def test_a_commit_that_dies_anywhere_leaves_the_old_head_or_the_new_one(tmp_path: Path) -> None:
    class Died(BaseException):
        pass

    def attempt(root: Path, dies_at: int) -> bool:
        store = Store(root)
        repo = store.create("dev/r", private=True)
        left = dies_at

        def observe(operation: str, paths: tuple[str, ...]) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Died(operation)

        failpoints.observer = observe
        try:
            store.put_lfs(hashlib.sha256(b"new").hexdigest(), [b"new"])
            file = store.lfs_file(hashlib.sha256(b"new").hexdigest(), 3)
            store.commit("dev/r", "main", [Edit("x.bin", file)], parent=None, title="new", message="")
            finished = True
        except Died:
            finished = False
        finally:
            failpoints.observer = None
            store.close()
        again = Store(root)
        newest = again.resolve(again.repo("dev/r"), "main")
        assert newest.id == repo.branches["main"] or reads.read_bytes(again.contents(newest.files["x.bin"])) == b"new"
        assert tree.list_dir(root / "scratch") == []
        assert len(list(again.history(again.repo("dev/r"), "main"))) == 1 + (newest.title == "new")
        again.close()
        return finished

    at = 1
    while not attempt(tmp_path / str(at), at):
        at += 1
    assert at > 15


def test_after_a_killed_client_the_next_one_pushes_once(
    hub: LocalHub, client: Client, repo: str, tmp_path: Path, folder: Path
) -> None:
    hub.faults.add(Fault("commit", stall_s=0.5, cut_at=0))
    victim = Client(hub.url, tmp_path / "home")
    victim.start(PUSH, repo=repo, folder=folder, paths=list(FILES), parent=None)
    deadline = time.monotonic() + 120
    while hub.faults.pending() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.kill()
    assert titles(client, repo) == ["initial commit"]
    since = len(hub.requests())
    push(client, repo, folder)
    assert titles(client, repo) == ["step 7", "initial commit"]
    assert not calls(hub, "lfs_upload", since) and not calls(hub, "lfs_part", since)


def test_one_server_to_a_directory_and_only_its_own(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="another `roll-ckpt hub-dev`"):
        LocalHub(hub.store.root)
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        LocalHub(tmp_path)
    assert os.listdir(tmp_path) == ["precious"]
    port = int(hub.url.rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1"):
        LocalHub(tmp_path / "other", port=port)
    LocalHub(tmp_path / "other").close()


# --- the command --------------------------------------------------------------------------------------------


def command(root: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "roll_ckpt", "hub-dev", "--root", str(root), *more],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_was_committed_outlives_a_kill_of_the_server(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "root"
    first = command(root, "--token-env", "SECRET", SECRET="hf_hidden")
    assert first.stdout
    url = first.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    client = Client(url, tmp_path / "home", HF_TOKEN="hf_hidden")
    client("api.create_repo('dev/kept', private=True)")
    oid = push(client, "dev/kept", folder)
    client.close()
    first.kill()
    assert "hf_hidden" not in first.communicate()[1]
    second = command(root, "--json", "--token-env", "SECRET", SECRET="hf_hidden")
    assert second.stdout
    told = json.loads(second.stdout.readline())
    client = Client(told["url"], tmp_path / "home2", HF_TOKEN="hf_hidden")
    assert head(client, "dev/kept") == oid
    assert Path(client("api.hf_hub_download('dev/kept', 'weights/model.safetensors')")).read_bytes() == LARGE
    client.close()
    second.send_signal(signal.SIGTERM)
    assert second.communicate()[1].count("Traceback") == 0 and second.returncode == 0
    assert sorted(os.listdir(root / "log")) == ["1.jsonl", "2.jsonl"]


def test_a_token_variable_that_is_not_set_is_told(tmp_path: Path) -> None:
    process = command(tmp_path / "root", "--token-env", "NOT_SET_ANYWHERE")
    assert "NOT_SET_ANYWHERE" in process.communicate()[1] and process.returncode == 1
    assert not (tmp_path / "root").exists()
