"""The repositories on disk: contents by digest, immutable commits, and one record of references for each repository.

    ROOT/
      hub-dev.lock                        locked while a server runs
      repos/<owner>/<name>/repo.json      sealed: private, created, branches, tags; exists if the repository does
      repos/<owner>/<name>/commits/<id>   sealed: parent, title, message, date, files
      regular/<sha1>  lfs/<sha256>        contents, shared by all repositories; never removed
      parts/<sha256>.<n>                  parts of incomplete uploads
      scratch/                            half-written files; emptied at the start
      log/<n>.jsonl                       the requests of the n-th start

A referrer becomes durable after what it refers to: contents, then the commit, then repo.json. So a killed server
leaves the old head or the new one, complete.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree, writes
from roll_ckpt.errors import ConfigError
from roll_ckpt.formats import sealed_json

MAIN = "main"

_LOCK = "hub-dev.lock"
_REPO_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMIT_ID = re.compile(r"[0-9a-f]{7,40}")
_NO_REF = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^@$|(^|/)[.]|\.lock(/|$)|[./]$|^[/-]"
)  # git-check-ref-format(1)
_GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Refusal(Exception):
    """A request is refused. Status, X-Error-Code and message are those of the real Hub."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.more = more


@dataclass(frozen=True)
class File:
    """One file of a commit. `oid` is git's id of the blob, for an LFS file that of its pointer."""

    oid: str
    nbytes: int
    sha256: str | None = None  # for LFS files only

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, File]


@dataclass(frozen=True)
class Repo:
    id: str
    private: bool
    created: str
    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class Edit:
    """One operation of a commit: add `file` at `path`; if it is None, remove the file or the folder at `path`."""

    path: str
    file: File | None = None
    folder: bool = False


class Store:
    """All repositories under a directory. Any thread may call; what a call has changed is durable on return."""

    def __init__(self, root: Path) -> None:
        """ConfigError, with nothing changed, if the directory holds other files or another server uses it."""
        self.root = root
        if tree.list_dir(root) and not tree.exists(root / _LOCK):
            raise ConfigError(f"{root} holds other files than a local Hub's; give it a directory of its own")
        writes.make_dirs(root)
        with suppress(FileExistsError):
            os.close(writes.create(root / _LOCK))
        lock = locks.try_lock(root / _LOCK, exclusive=True)
        if lock is None:
            raise ConfigError(f"another `roll-ckpt hub-dev` serves {root}; stop it, or give another directory")
        self._lock = lock
        self._changing = threading.Lock()
        writes.remove_tree(self._scratch)
        for folder in ("repos", "regular", "lfs", "parts", "scratch", "log"):
            writes.make_dirs(root / folder)

    def close(self) -> None:
        """Release the directory."""
        self._lock.release()

    @property
    def _scratch(self) -> Path:
        return self.root / "scratch"

    # --- repositories ---------------------------------------------------------------------------------------

    def repo(self, repo_id: str) -> Repo:
        """The repository. Refusal (404) if there is none."""
        path = self._home(repo_id) / "repo.json"
        try:
            return Repo(**sealed_json.unseal(reads.read_bytes(path), path))
        except (FileNotFoundError, NotADirectoryError):
            raise Refusal(404, "Repository not found", "RepoNotFound") from None

    def create(self, repo_id: str, *, private: bool) -> Repo:
        """Create a repository with one commit on `main`. Refusal (409) if it exists."""
        with self._changing:
            if tree.exists(self._home(repo_id) / "repo.json"):
                raise Refusal(409, "You already created this model repo")
            first = _new_commit(None, "initial commit", "", {".gitattributes": self.put_regular(_GIT_ATTRIBUTES)})
            repo = Repo(repo_id, private, _now(), {MAIN: first.id}, {})
            writes.make_dirs(self._home(repo_id) / "commits")
            self._write_commit(repo_id, first)
            self._write_repo(repo)
            return repo

    def delete(self, repo_id: str) -> None:
        """Remove a repository. Its contents stay: another repository may have the same ones."""
        with self._changing:
            self.repo(repo_id)
            home = self._home(repo_id)
            deleted = self._scratch / names.unique("deleted")
            writes.rename(home, deleted)
            writes.fsync_dir(home.parent)
            writes.remove_tree(deleted)

    def _home(self, repo_id: str) -> Path:
        if not _REPO_ID.fullmatch(repo_id):
            raise Refusal(400, f"Invalid repository name: {repo_id}")
        return self.root / "repos" / repo_id

    def _write_repo(self, repo: Repo) -> None:
        path = self._home(repo.id) / "repo.json"
        writes.write_durable(path, sealed_json.seal(asdict(repo)), scratch=self._scratch)

    # --- commits --------------------------------------------------------------------------------------------

    def resolve(self, repo: Repo, revision: str) -> Commit:
        """The commit of a branch, a tag or an id, which may be shortened. Refusal (404) if there is none."""
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        commit_id = repo.branches.get(short) or repo.tags.get(short)
        if commit_id is None and _COMMIT_ID.fullmatch(revision):
            fitting = [i for i in tree.list_dir(self._home(repo.id) / "commits") if i.startswith(revision)]
            commit_id = fitting[0] if len(fitting) == 1 else None
        if commit_id is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._read_commit(repo.id, commit_id)

    def history(self, repo: Repo, revision: str) -> Iterator[Commit]:
        """The commit of a revision and its ancestors, newest first."""
        commit = self.resolve(repo, revision)
        yield commit
        while commit.parent is not None:
            commit = self._read_commit(repo.id, commit.parent)
            yield commit

    def commit(
        self, repo_id: str, branch: str, edits: Sequence[Edit], *, parent: str | None, title: str, message: str
    ) -> Commit:
        """Make one commit of all edits. Refusal, with nothing changed: 412 if `parent` is not the branch's head."""
        with self._changing:
            repo = self.repo(repo_id)
            head = self.resolve(repo, branch)
            if branch not in repo.branches:
                raise Refusal(400, f"Invalid rev id: {branch} is not a branch; commits go to branches")
            if parent and not head.id.startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            commit = _new_commit(head.id, title, message, _edited(head.files, edits))
            self._write_commit(repo_id, commit)
            self._write_repo(replace(repo, branches={**repo.branches, branch: commit.id}))
            return commit

    def _read_commit(self, repo_id: str, commit_id: str) -> Commit:
        path = self._home(repo_id) / "commits" / commit_id
        record = sealed_json.unseal(reads.read_bytes(path), path)
        files = {name: File(**file) for name, file in record.pop("files").items()}
        return Commit(commit_id, files=files, **record)

    def _write_commit(self, repo_id: str, commit: Commit) -> None:
        path = self._home(repo_id) / "commits" / commit.id
        writes.write_durable(path, sealed_json.seal(_record(commit)), scratch=self._scratch)

    # --- branches and tags ----------------------------------------------------------------------------------

    def add_branch(self, repo_id: str, branch: str, start: str) -> None:
        """Refusal: 409 if it exists, 404 if `start` does not."""

        def add(repo: Repo) -> Repo:
            if branch in repo.branches:
                raise Refusal(409, f"Reference already exists: {branch}")
            return replace(repo, branches={**repo.branches, branch: self.resolve(repo, start).id})

        self._change_refs(repo_id, add)

    def remove_branch(self, repo_id: str, branch: str) -> None:
        """Refusal: 404 if there is none, 403 for `main`."""
        if branch == MAIN:
            raise Refusal(403, f"The branch {MAIN} cannot be deleted")
        self._change_refs(repo_id, lambda repo: replace(repo, branches=_without(repo.branches, branch)))

    def add_tag(self, repo_id: str, tag: str, revision: str) -> None:
        """Refusal: 400 if git knows no such tag, 409 if it exists, 404 if `revision` does not."""
        if _NO_REF.search(tag):
            raise Refusal(400, f"Invalid reference name: {tag}")

        def add(repo: Repo) -> Repo:
            if tag in repo.tags:
                raise Refusal(409, f"Tag reference exists already: {tag}")
            return replace(repo, tags={**repo.tags, tag: self.resolve(repo, revision).id})

        self._change_refs(repo_id, add)

    def remove_tag(self, repo_id: str, tag: str) -> None:
        """Refusal (404) if there is none."""
        self._change_refs(repo_id, lambda repo: replace(repo, tags=_without(repo.tags, tag)))

    def _change_refs(self, repo_id: str, change: Callable[[Repo], Repo]) -> None:
        with self._changing:
            self._write_repo(change(self.repo(repo_id)))

    # --- contents -------------------------------------------------------------------------------------------

    def put_regular(self, data: bytes) -> File:
        """Store the contents of a small file."""
        file = File(_git_blob(data), len(data))
        if not tree.exists(self.contents(file)):
            writes.write_durable(self.contents(file), data, scratch=self._scratch)
        return file

    def put_lfs(self, sha256: str, blocks: Iterable[bytes]) -> None:
        """Store the contents of an LFS file. Refusal (400) if they do not have this digest."""
        temporary, digest = self._receive(blocks)
        if digest != sha256:
            writes.discard_file(temporary)
            raise Refusal(400, f"The contents have the SHA-256 {digest}, not {sha256}")
        self._keep(temporary, self.root / "lfs" / sha256)

    def put_part(self, sha256: str, number: int, blocks: Iterable[bytes]) -> str:
        """Store one part of an LFS file; return the digest of the part."""
        temporary, digest = self._receive(blocks)
        self._keep(temporary, self._part(sha256, number))
        return digest

    def join_parts(self, sha256: str, numbers: Sequence[int]) -> None:
        """Join the parts of an LFS file. Refusal (400) if one is missing or the whole does not have this digest."""
        if self.lfs_bytes(sha256) is not None:
            return  # a retry, because the first answer was lost
        parts = [self._part(sha256, number) for number in numbers]
        for part in parts:
            if not tree.exists(part):
                raise Refusal(400, f"Part {part.name.rpartition('.')[2]} of {sha256} was not uploaded")
        self.put_lfs(sha256, (block for part in parts for block in reads.read_blocks(part, 1 << 20)))
        for part in parts:
            writes.discard_file(part)

    def lfs_bytes(self, sha256: str) -> int | None:
        """The size of an LFS file, None if the store does not have it."""
        path = self.root / "lfs" / sha256
        return tree.file_bytes(path) if tree.exists(path) else None

    def lfs_file(self, sha256: str, nbytes: int | None) -> File:
        """The file of a commit that points to these contents. Refusal (400) if the store does not have them."""
        stored = self.lfs_bytes(sha256)
        if stored is None:
            raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        if nbytes not in (None, stored):
            raise Refusal(400, f"LFS pointer says {nbytes} bytes, but {sha256} has {stored}")
        return File(_git_blob(_pointer(sha256, stored)), stored, sha256)

    def contents(self, file: File) -> Path:
        """The path of a file's contents."""
        return self.root / "lfs" / file.sha256 if file.sha256 else self.root / "regular" / file.oid

    def _part(self, sha256: str, number: int) -> Path:
        return self.root / "parts" / f"{sha256}.{number}"

    def _receive(self, blocks: Iterable[bytes]) -> tuple[Path, str]:
        temporary = self._scratch / names.temporary_file("upload")
        digest = hashlib.sha256()
        descriptor = writes.create(temporary)
        try:
            for block in blocks:
                digest.update(block)
                writes.write_all(descriptor, block, temporary)
            writes.fsync(descriptor, temporary)
        except BaseException:
            writes.discard_file(temporary)
            raise
        finally:
            os.close(descriptor)
        return temporary, digest.hexdigest()

    def _keep(self, temporary: Path, path: Path) -> None:
        writes.rename(temporary, path)
        writes.fsync_dir(path.parent)


def pointer_bytes(file: File) -> int:
    """The size of the pointer that git itself stores for an LFS file."""
    return len(_pointer(file.sha256 or "", file.nbytes))


def _edited(files: dict[str, File], edits: Sequence[Edit]) -> dict[str, File]:
    files = dict(files)
    for edit in edits:
        if edit.file is not None:
            files[edit.path] = edit.file
            continue
        removed = [path for path in files if path == edit.path or (edit.folder and path.startswith(f"{edit.path}/"))]
        if not removed:
            raise Refusal(404, f"A file with this name doesn't exist: {edit.path}", "EntryNotFound")
        for path in removed:
            del files[path]
    return files


def _new_commit(parent: str | None, title: str, message: str, files: dict[str, File]) -> Commit:
    commit = Commit("", parent, title, message, _now(), files)
    # As on the real Hub, the same edits on the same parent make a new commit each time.
    unique = {**_record(commit), "at_ns": time.time_ns()}
    return replace(commit, id=hashlib.sha1(sealed_json.canonical(unique), usedforsecurity=False).hexdigest())


def _record(commit: Commit) -> dict[str, Any]:
    record = asdict(commit)
    del record["id"]
    return record


def _without(refs: dict[str, str], name: str) -> dict[str, str]:
    if name not in refs:
        raise Refusal(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return {ref: commit for ref, commit in refs.items() if ref != name}


def _pointer(sha256: str, nbytes: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n".encode()


def _git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
