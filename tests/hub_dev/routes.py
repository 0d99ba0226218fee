"""The answer to every request that huggingface_hub makes for a model repository.

A route is a name, a method, a path and the token that it needs; its function turns a Call into a Reply, or raises
Refusal.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlencode

from roll_ckpt import names

from .store import MAIN, Commit, Edit, File, Refusal, Repo, Store, pointer_bytes

USER = "dev"
REGULAR_BYTES = 10_000_000  # larger files are uploaded with LFS
PAGE = 1000  # entries in one answer

_LFS_NAMES = (*(".bin", ".ckpt", ".distcp", ".gz", ".model", ".npy", ".npz", ".pt", ".pth", ".safetensors", ".zip"),)
_NO_XET = "the local Hub has no Xet storage: start the client with HF_HUB_DISABLE_XET=1, so that it uses LFS"
_NO_XET_PATH = "/no-xet-here/start-the-client-with/HF_HUB_DISABLE_XET=1"


class Token(Enum):
    """What the token of a request permits."""

    NONE = "none"
    WRONG = "wrong"
    READ = "read"
    WRITE = "write"


class Body(Protocol):
    """The body of a request."""

    def blocks(self) -> Iterator[bytes]:
        """The whole body in blocks. ConnectionError if the client stops in the middle."""
        ...


@dataclass(frozen=True)
class Call:
    """One request: `base` is the server's address, `args` come from the path, names of headers are in lower case."""

    store: Store
    base: str
    token: Token
    args: dict[str, str]
    query: dict[str, str]
    headers: dict[str, str]
    body: Body
    part_bytes: int

    def json(self) -> dict[str, Any]:
        """The JSON object in the body, {} if there is no body; Refusal (400) if it is anything else."""
        try:
            document = json.loads(b"".join(self.body.blocks()) or b"{}")
        except ValueError as error:
            raise Refusal(400, f"The body is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise Refusal(400, "The body is no JSON object")
        return document

    def repo(self) -> Repo:
        """The repository in the path. Refusal if there is none, or if this token may not see it."""
        return visible(self.store, self.args["repo"], self.token)


@dataclass(frozen=True)
class Reply:
    """An answer: JSON, or `nbytes` of a file from `start` on."""

    json: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    nbytes: int = 0


@dataclass(frozen=True)
class Route:
    """`path` must match the whole path of a request; its named groups become `Call.args`."""

    name: str
    method: str
    path: re.Pattern[str]
    answer: Callable[[Call], Reply]
    needs: Token = Token.NONE


ROUTES: list[Route] = []


def _route(name: str, method: str, path: str, needs: Token = Token.NONE) -> Callable[..., Callable[[Call], Reply]]:
    pattern = path.replace("{repo}", "(?P<repo>[^/]+/[^/]+)").replace("{path}", "(?P<path>.+)")
    pattern = re.sub(r"{([a-z]\w*)}", r"(?P<\1>[^/]+)", pattern)

    def add(answer: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        ROUTES.append(Route(name, method, re.compile(pattern), answer, needs))
        return answer

    return add


def visible(store: Store, repo_id: str, token: Token) -> Repo:
    """A repository. Refusal, the same one, if there is none or if a request with this token may not see it."""
    try:
        repo = store.repo(repo_id)
    except Refusal as error:
        if error.status == 404 and token is Token.NONE:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound") from None
        raise
    if repo.private and token is Token.NONE:
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")
    return repo


# --- the user, and repositories as a whole ------------------------------------------------------------------


@_route("whoami", "GET", "/api/whoami-v2", Token.READ)
def _whoami(call: Call) -> Reply:
    access = {"type": "access_token", "accessToken": {"displayName": "local", "role": call.token.value}}
    return Reply({"type": "user", "id": "0" * 24, "name": USER, "fullname": USER, "orgs": [], "auth": access})


@_route("agents", "GET", "/api/agent-harnesses")
def _agents(call: Call) -> Reply:
    return Reply({"harnesses": {}})


@_route("validate_yaml", "POST", "/api/validate-yaml")
def _validate_yaml(call: Call) -> Reply:
    return Reply({"errors": [], "warnings": []})


@_route("create_repo", "POST", "/api/repos/create", Token.WRITE)
def _create_repo(call: Call) -> Reply:
    document, repo_id = _named_repo(call)
    url = f"{call.base}/{repo_id}"
    try:
        call.store.create(repo_id, private=document.get("visibility") == "private" or document.get("private") is True)
    except Refusal as error:
        # With exist_ok the client reads the address from the refusal.
        raise Refusal(error.status, error.message, error.code, url=url) from None
    return Reply({"url": url, "name": repo_id})


@_route("delete_repo", "DELETE", "/api/repos/delete", Token.WRITE)
def _delete_repo(call: Call) -> Reply:
    call.store.delete(_named_repo(call)[1])
    return Reply({})


def _named_repo(call: Call) -> tuple[dict[str, Any], str]:
    document = call.json()
    if document.get("type") not in (None, "model"):
        raise Refusal(400, f"The local Hub has model repositories only, not {document['type']!r}")
    return document, f"{document.get('organization') or USER}/{document.get('name')}"


@_route("auth_check", "GET", "/api/models/{repo}/auth-check")
def _auth_check(call: Call) -> Reply:
    call.repo()
    return Reply({})


@_route("auth_check", "GET", "/api/models/{repo}/auth-check/write", Token.WRITE)
def _auth_check_write(call: Call) -> Reply:
    return _auth_check(call)


@_route("repo_info", "GET", "/api/models/{repo}")
@_route("repo_info", "GET", "/api/models/{repo}/revision/{revision}")
def _repo_info(call: Call) -> Reply:
    repo = call.repo()
    commit = _commit(call, repo)
    siblings = []
    for path, file in sorted(commit.files.items()):
        more = {"size": file.nbytes, "blobId": file.oid, **_lfs(file)} if "blobs" in call.query else {}
        siblings.append({"rfilename": path, **more})
    info = {
        **{"id": repo.id, "modelId": repo.id, "author": repo.id.partition("/")[0], "sha": commit.id},
        **{"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0},
        **{"createdAt": repo.created, "lastModified": commit.date, "siblings": siblings},
    }
    return Reply(info)


def _commit(call: Call, repo: Repo) -> Commit:
    return call.store.resolve(repo, call.args.get("revision", MAIN))


# --- files and history --------------------------------------------------------------------------------------


@_route("tree", "GET", "/api/models/{repo}/tree/{revision}")
@_route("tree", "GET", "/api/models/{repo}/tree/{revision}/{path}")
def _tree(call: Call) -> Reply:
    files = _commit(call, call.repo()).files
    above = f"{call.args['path'].strip('/')}/" if "path" in call.args else ""
    recursive = call.query.get("recursive", "").lower() in ("true", "1")
    entries = {}
    for path, file in files.items():
        if not path.startswith(above):
            continue
        parts = path[len(above) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = above + "/".join(parts[:depth])
            entries[folder] = _folder_entry(folder)
        if recursive or len(parts) == 1:
            entries[path] = _file_entry(path, file)
    if above and not entries:
        raise Refusal(404, f"{above[:-1]} does not exist on {call.args['revision']!r}", "EntryNotFound")
    return _page(call, [entries[path] for path in sorted(entries)])


@_route("paths_info", "POST", "/api/models/{repo}/paths-info/{revision}")
def _paths_info(call: Call) -> Reply:
    files = _commit(call, call.repo()).files
    paths = parse_qs(b"".join(call.body.blocks()).decode(errors="replace")).get("paths", [])
    entries = []
    for path in paths:
        if path in files:
            entries.append(_file_entry(path, files[path]))
        elif any(name.startswith(f"{path.rstrip('/')}/") for name in files):
            entries.append(_folder_entry(path.rstrip("/")))
    return Reply(entries)


@_route("commits", "GET", "/api/models/{repo}/commits/{revision}")
def _commits(call: Call) -> Reply:
    commits = [
        {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": USER}]}
        for c in call.store.history(call.repo(), call.args["revision"])
    ]
    return _page(call, commits)


def _page(call: Call, entries: list[dict[str, Any]]) -> Reply:
    begin = int(call.query.get("cursor", "0")) if call.query.get("cursor", "0").isdecimal() else 0
    if begin + PAGE >= len(entries):
        return Reply(entries[begin:])
    following = urlencode({**call.query, "cursor": begin + PAGE})
    link = f'<{call.base}{call.args["raw_path"]}?{following}>; rel="next"'
    return Reply(entries[begin : begin + PAGE], headers={"Link": link})


def _file_entry(path: str, file: File) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": file.oid, "size": file.nbytes, **_lfs(file)}


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}


def _lfs(file: File) -> dict[str, Any]:
    if file.sha256 is None:
        return {}
    pointer = {"oid": file.sha256, "sha256": file.sha256, "size": file.nbytes, "pointerSize": pointer_bytes(file)}
    return {"lfs": pointer}


@_route("metadata", "HEAD", "/{repo}/resolve/{revision}/{path}")
@_route("download", "GET", "/{repo}/resolve/{revision}/{path}")
def _download(call: Call) -> Reply:
    commit = _commit(call, call.repo())
    file = commit.files.get(call.args["path"])
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if file.sha256:
        headers.update({"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(file.nbytes)})
    contents = call.store.contents(file)
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if span is None or not any(span.groups()):
        return Reply(headers=headers, file=contents, nbytes=file.nbytes)
    if span[1]:
        start, end = int(span[1]), min(int(span[2] or file.nbytes), file.nbytes - 1)
    else:
        start, end = max(0, file.nbytes - int(span[2])), file.nbytes - 1
    if start > end:
        return Reply({"error": "Range not satisfiable"}, 416, {"Content-Range": f"bytes */{file.nbytes}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{file.nbytes}"
    return Reply(status=206, headers=headers, file=contents, start=start, nbytes=end - start + 1)


# --- branches and tags --------------------------------------------------------------------------------------


@_route("refs", "GET", "/api/models/{repo}/refs")
def _refs(call: Call) -> Reply:
    repo = call.repo()
    branches = [_ref(name, f"refs/heads/{name}", commit) for name, commit in repo.branches.items()]
    tags = [_ref(name, f"refs/tags/{name}", commit) for name, commit in repo.tags.items()]
    return Reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


def _ref(name: str, ref: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": commit}


@_route("create_branch", "POST", "/api/models/{repo}/branch/{branch}", Token.WRITE)
def _create_branch(call: Call) -> Reply:
    call.store.add_branch(call.repo().id, call.args["branch"], call.json().get("startingPoint") or MAIN)
    return Reply({})


@_route("delete_branch", "DELETE", "/api/models/{repo}/branch/{branch}", Token.WRITE)
def _delete_branch(call: Call) -> Reply:
    call.store.remove_branch(call.repo().id, call.args["branch"])
    return Reply({})


@_route("create_tag", "POST", "/api/models/{repo}/tag/{revision}", Token.WRITE)
def _create_tag(call: Call) -> Reply:
    call.store.add_tag(call.repo().id, _text(call.json(), "tag"), call.args["revision"])
    return Reply({})


@_route("delete_tag", "DELETE", "/api/models/{repo}/tag/{tag}", Token.WRITE)
def _delete_tag(call: Call) -> Reply:
    call.store.remove_tag(call.repo().id, call.args["tag"])
    return Reply({})


# --- a push -------------------------------------------------------------------------------------------------


@_route("preupload", "POST", "/api/models/{repo}/preupload/{revision}", Token.WRITE)
def _preupload(call: Call) -> Reply:
    commit = _commit(call, call.repo())
    answers = []
    for file in _list(call.json(), "files"):
        path, nbytes = _text(file, "path"), _count(file, "size")
        binary = b"\0" in _from_base64(file.get("sample") or "")
        large = nbytes > REGULAR_BYTES or path.endswith(_LFS_NAMES) or binary
        current = {"oid": commit.files[path].etag} if path in commit.files else {}
        answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **current})
    return Reply({"files": answers, "commitOid": commit.id})


@_route("lfs_batch", "POST", r"/{repo}\.git/info/lfs/objects/batch", Token.WRITE)
def _lfs_batch(call: Call) -> Reply:
    call.repo()
    document = call.json()
    parts = "multipart" in (document.get("transfers") or [])
    objects = [_lfs_object(call, requested, parts) for requested in _list(document, "objects")]
    multipart = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    answer = {"transfer": "multipart" if multipart else "basic", "objects": objects}
    return Reply(answer, headers={"Content-Type": "application/vnd.git-lfs+json"})


def _lfs_object(call: Call, requested: dict[str, Any], parts: bool) -> dict[str, Any]:
    """The answer about one LFS file: where to upload it; `parts` if the client can upload it in parts."""
    sha256, nbytes = _text(requested, "oid"), _count(requested, "size")
    answer: dict[str, Any] = {"oid": sha256, "size": nbytes, "authenticated": True}
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        return {**answer, "error": {"code": 422, "message": "The oid is no SHA-256"}}
    if call.store.lfs_bytes(sha256) == nbytes:
        return answer  # no actions: the file need not be uploaded
    # As on the real Hub, these addresses need no token: the client sends none to them.
    address = f"{call.base}/lfs-storage/{sha256}"
    upload: dict[str, Any] = {"href": address}
    if parts and nbytes > call.part_bytes:
        numbers = range(1, -(-nbytes // call.part_bytes) + 1)
        header = {f"{number:05d}": f"{address}/parts/{number}" for number in numbers}
        upload = {"href": f"{address}/complete", "header": {"chunk_size": str(call.part_bytes), **header}}
    verify = {"href": f"{call.base}/{call.args['repo']}.git/info/lfs/objects/verify"}
    return {**answer, "actions": {"upload": upload, "verify": verify}}


_SHA256 = "(?P<sha256>[0-9a-f]{64})"


@_route("lfs_upload", "PUT", f"/lfs-storage/{_SHA256}")
def _lfs_upload(call: Call) -> Reply:
    call.store.put_lfs(call.args["sha256"], call.body.blocks())
    return Reply()


@_route("lfs_part", "PUT", rf"/lfs-storage/{_SHA256}/parts/(?P<number>[1-9]\d{{0,5}})")
def _lfs_part(call: Call) -> Reply:
    etag = call.store.put_part(call.args["sha256"], int(call.args["number"]), call.body.blocks())
    return Reply(headers={"ETag": f'"{etag}"'})


@_route("lfs_complete", "POST", f"/lfs-storage/{_SHA256}/complete")
def _lfs_complete(call: Call) -> Reply:
    numbers = [_count(part, "partNumber") for part in _list(call.json(), "parts")]
    call.store.join_parts(call.args["sha256"], sorted(numbers))
    return Reply({})


@_route("lfs_verify", "POST", r"/{repo}\.git/info/lfs/objects/verify", Token.WRITE)
def _lfs_verify(call: Call) -> Reply:
    document = call.json()
    if call.store.lfs_bytes(_sha256(document)) != _count(document, "size"):
        raise Refusal(404, f"The store has no {document['oid']} with {document['size']} bytes")
    return Reply({})


@_route("commit", "POST", "/api/models/{repo}/commit/{branch}", Token.WRITE)
def _make_commit(call: Call) -> Reply:
    repo = call.repo()
    if call.query.get("create_pr"):
        raise Refusal(400, "The local Hub has no pull requests")
    header: dict[str, Any] = {}
    edits = []
    for line in b"".join(call.body.blocks()).splitlines():
        try:
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
        except (ValueError, TypeError, KeyError) as error:
            raise Refusal(400, f"A line of the commit is no operation: {error!r}") from error
        if not isinstance(value, dict):
            raise Refusal(400, f"The value of {key!r} is no JSON object")
        if key == "header":
            header = value
        else:
            edits.append(_edit(call.store, key, value))
    commit = call.store.commit(
        repo.id,
        call.args["branch"],
        edits,
        parent=_text(header, "parentCommit") if header.get("parentCommit") else None,
        title=_text(header, "summary"),
        message=_text(header, "description") if header.get("description") else "",
    )
    url = f"{call.base}/{repo.id}/commit/{commit.id}"
    return Reply({"success": True, "commitOid": commit.id, "commitUrl": url, "pullRequestUrl": None, "hookOutput": ""})


def _edit(store: Store, key: str, value: dict[str, Any]) -> Edit:
    try:
        path = names.check_relative(_text(value, "path").rstrip("/" if key == "deletedFolder" else ""))
    except ValueError as error:
        raise Refusal(400, f"Invalid path {value['path']!r}: {error}") from error
    if ".git" in path.lower().split("/"):
        raise Refusal(400, f"Invalid path {path!r}: git keeps its own files there")
    if key == "file":
        return Edit(path, store.put_regular(_from_base64(_text(value, "content"))))
    if key == "lfsFile":
        return Edit(path, store.lfs_file(_sha256(value), value.get("size")))
    if key in ("deletedFile", "deletedFolder"):
        return Edit(path, folder=key == "deletedFolder")
    raise Refusal(400, f"The local Hub does not know the operation {key!r}")


@_route("xet_token", "GET", "/api/models/{repo}/xet-(?:read|write)-token/{revision}")
def _xet_token(call: Call) -> Reply:
    # hf_xet shows only the status and the last address of a failure, so the address says what to do.
    return Reply({"error": _NO_XET}, 307, {"Location": f"{call.base}{_NO_XET_PATH}"})


@_route("no_xet", "GET", _NO_XET_PATH)
def _no_xet(call: Call) -> Reply:
    raise Refusal(404, _NO_XET)


# --- values in the body of a request --------------------------------------------------------------------------


def _text(document: Any, key: str) -> str:
    if isinstance(document, dict) and isinstance(value := document.get(key), str):
        return value
    raise Refusal(400, f"{key!r} must be a text")


def _sha256(document: Any) -> str:
    value = _text(document, "oid")
    if re.fullmatch("[0-9a-f]{64}", value):
        return value
    raise Refusal(400, "'oid' must be a SHA-256")


def _count(document: Any, key: str) -> int:
    if isinstance(document, dict) and type(value := document.get(key)) is int and value >= 0:
        return value
    raise Refusal(400, f"{key!r} must be a number")


def _list(document: Any, key: str) -> list[Any]:
    if isinstance(document, dict) and isinstance(value := document.get(key), list):
        return value
    raise Refusal(400, f"{key!r} must be a list")


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise Refusal(400, f"Not base64: {error}") from error
