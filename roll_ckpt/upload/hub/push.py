"""Pushes a committed checkpoint to the Hub: one commit with all its files, then the tag `names.hub_tag(name)`.

    look up → check every byte → send the large files → look up again → one commit on that head → tag

The commit's message carries the manifest's SHA-256. A push that follows a kill or a lost answer finds the commit by it;
and as every commit names its parent, only one of two concurrent requests can land.

Only `worker` and the command line import this module: it changes huggingface_hub for its whole process.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from roll_ckpt import names
from roll_ckpt.disk import failpoints, locks, reads, tree
from roll_ckpt.errors import Damaged, HubRefused, HubUnavailable
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Receipt
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import reader_locks
from roll_ckpt.upload.hub import answers
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import Head, look, read_file
from roll_ckpt.upload.hub.push_client import branch, create, drop_branch, exists, history, refs, tag
from roll_ckpt.upload.hub.sending import HubFile, Sending

log = logging.getLogger("roll_ckpt")

CARD = "README.md"
MARKER = "<!-- roll_ckpt writes this card anew with every checkpoint; take this line out to keep your own -->"
_SMALL_BYTES = 1 << 20  # files up to this size are held in memory, so that what was checked is what is sent
_HISTORY = 1000  # so many commits are searched for the one that a former push made
_TRIES = 8
Progress = Callable[[str, int, int], None]
"""Called with the phase ("checking" or "sending"), the bytes done in it, and all bytes; by one thread at a time."""


class Hashes(Protocol):
    """Stores the SHA-256 of large files from one process to the next; see `push_queue.Hashes`."""

    def known(self, receipt: Receipt, mtime_ns: int) -> str | None:
        """The stored SHA-256 of the receipt's file; None if there is none, or if the file was changed since."""
        ...

    def remember(self, receipt: Receipt, mtime_ns: int, sha256: str) -> None: ...


@dataclass(frozen=True)
class _Checked:
    """A checkpoint whose every byte is as it was committed, ready to be sent."""

    manifest: Manifest
    digest: str
    """The SHA-256 of manifest.json."""
    uploads: list[HubFile]
    mtimes_ns: dict[str, int]
    """When each file that is not held in memory was last changed, before it was checked."""


def push(
    checkpoint_dir: Path,
    remote: Remote,
    *,
    private: bool,
    progress: Progress | None = None,
    hashes: Hashes | None = None,
    on_side_branch: bool = False,
) -> str:
    """Commit a checkpoint to the root of a repository, as one commit, and tag it; return the commit's id.

    Blocks. The commit is made exactly once, however often this is called and wherever it was killed: a checkpoint that
    is on the Hub already is only tagged. The repository is created if it is missing. Files of the previous checkpoint
    are removed, other files stay. Every byte is checked first, and the checkpoint is not pruned meanwhile.

    With `on_side_branch` the branch stays at the newer checkpoint that it holds, and only the tag names this one.

    Raises:
        HubRefused: the Hub refuses; or the repository is public and `private` is asked for; or a file holds a
            token, or a path that the Hub never takes; or the revision is no branch. HubUnavailable: try again later.
        Damaged: a file is not as it was committed; nothing was committed on the Hub. NotFound: no checkpoint.
    """
    progress = progress or (lambda *_: None)
    with reader_locks.reading(checkpoint_dir):
        record = reads.read_bytes(checkpoint_dir / names.MANIFEST)
        manifest = manifests.parse(record, checkpoint_dir / names.MANIFEST)
        digest, tag_name = sha256(record), names.hub_tag(manifest.name)
        _refuse_paths(checkpoint_dir, manifest)
        _open(remote, private)
        side = Remote(remote.repo_id, f"roll_ckpt-{sha256(f'{digest} {remote.revision}'.encode())[:16]}")
        commit = _find(remote, side, tag_name, digest)
        if commit is None:
            checked = _check(checkpoint_dir, manifest, record, hashes, progress)
            if on_side_branch:
                branch(side, start=remote.revision)
            commit = _commit_once(checkpoint_dir, side if on_side_branch else remote, checked, progress)
        failpoints.failpoint("push.committed", name=manifest.name)
        _tag(remote, tag_name, commit)
        failpoints.failpoint("push.tagged", name=manifest.name)
        if side.revision in refs(remote)[0]:
            drop_branch(side)
        return commit


def _refuse_paths(checkpoint_dir: Path, manifest: Manifest) -> None:
    if refused := [path for path in manifest.paths() if names.hub_refuses(path)]:
        raise HubRefused(
            f"{checkpoint_dir / refused[0]}: the Hub takes no file of this name, which git uses itself; nothing of "
            f"{manifest.name} was sent. Keep it out of what is saved, and save again"
        )


def _open(remote: Remote, private: bool) -> None:
    """Create the repository if it is missing. HubRefused, before a byte is read, if it must not be written to."""
    try:
        head = look(remote)
    except HubRefused as error:
        if error.status != 404 or exists(remote):
            raise
        create(remote, private=private)
        head = look(remote)
    if private and not head.private:
        raise HubRefused(
            f"{remote.uri}: the repository is public, and `private: true` is asked for; make it private, or set "
            "`private: false` if everybody may see the checkpoints"
        )
    branches, _ = refs(remote)
    if remote.revision not in branches:
        raise HubRefused(f"{remote.uri}: {remote.revision} is no branch of the repository; checkpoints go to a branch")


def _mark(digest: str) -> str:
    return f"roll_ckpt manifest sha256:{digest}"


def _find(remote: Remote, side: Remote, name: str, digest: str) -> str | None:
    """The commit that brought this checkpoint to the branch, or to its side branch; None if there is none."""
    branches, tags = refs(remote)
    commit = _find_on(side, digest, 1) if side.revision in branches else None
    commit = commit or _find_on(remote, digest, _HISTORY)
    if commit is None and name in tags:
        # A push to another branch may have set the tag: it counts only if the commit was made on this side branch.
        commit = _find_on(Remote(remote.repo_id, tags[name]), digest, 1, made_on=side.revision)
    return commit


def _find_on(remote: Remote, digest: str, limit: int, made_on: str = "") -> str | None:
    mark = _mark(digest)
    return next((commit for commit, text in history(remote, limit) if mark in text and made_on in text), None)


def _tag(remote: Remote, name: str, commit: str) -> None:
    """Make the tag name the commit, unless it names a newer one by now.

    Re-reads the tag instead of trusting the reply.
    """
    for tries_left in reversed(range(_TRIES)):
        _, tags = refs(remote)
        current = tags.get(name)
        if current == commit or (current is not None and _is_newer(remote, current, commit)):
            return
        try:
            tag(remote, name, commit, instead_of=current)
        except (HubRefused, HubUnavailable) as error:
            # The tag may be set all the same, or another process has changed it: read it again.
            if not tries_left or (error.status is not None and error.status not in (404, 409, 500, 502, 504)):
                raise


def _is_newer(remote: Remote, one: str, other: str) -> bool:
    order = [commit for commit, _ in history(remote, _HISTORY)]
    return one in order and other in order and order.index(one) < order.index(other)


def _commit_once(checkpoint_dir: Path, remote: Remote, checked: _Checked, progress: Progress) -> str:
    """Send the files and make the commit, unless it turns out that it was made already; return its id."""
    sending = Sending(remote, checked.uploads, _Sum("sending", checked.uploads, progress))
    sending.send()
    failpoints.failpoint("push.sent", name=checked.manifest.name)
    problem: HubUnavailable | None = None
    for _ in range(_TRIES):
        head = look(remote)
        # Searched after the head was read: a request of ours that lands later than this has another parent and fails.
        commit = _find_on(remote, checked.digest, _HISTORY)
        if commit is not None:
            return commit
        if problem is not None and problem.status != 412:
            raise problem  # the commit was not made, and the Hub needs a pause
        _check_untouched(checkpoint_dir, checked)
        try:
            return sending.commit(
                _card(remote, head, checked),
                _outdated(remote, head, checked),
                title=checked.manifest.name,
                message=f"{_mark(checked.digest)}\n"
                f"run {checked.manifest.run_id}, step {checked.manifest.step}, on {remote.revision}",
                parent=head.commit,
            )
        except HubUnavailable as error:
            problem = error
    assert problem is not None
    raise problem


def _outdated(remote: Remote, head: Head, checked: _Checked) -> list[str]:
    """Files of the previous checkpoint that this one no longer has."""
    if names.MANIFEST not in head.files:
        return []
    data = read_file(remote, names.MANIFEST, head.commit)
    try:
        previous = manifests.parse(data or b"", f"{remote.uri}: {names.MANIFEST}")
    except Damaged as problem:
        log.debug("no file is removed, since the repository holds another program's manifest: %s", problem)
        return []
    uploaded = {upload.path for upload in checked.uploads}
    return sorted(({*previous.paths()} - uploaded) & head.files)


def _card(remote: Remote, head: Head, checked: _Checked) -> list[HubFile]:
    """The model card, unless the repository has one that a person wrote."""
    if any(upload.path == CARD for upload in checked.uploads):
        return []
    if CARD in head.files and MARKER.encode() not in (read_file(remote, CARD, head.commit) or b""):
        return []
    return [_small(CARD, card(checked.manifest, remote).encode())]


def card(manifest: Manifest, remote: Remote) -> str:
    """The text of the model card (README.md of the repository)."""
    clusters = ", ".join(f"{name} ({facts['world_size']} ranks)" for name, facts in sorted(manifest.clusters.items()))
    return f"""---
tags:
- roll_ckpt
---
{MARKER}

# {manifest.name}

A checkpoint of roll_ckpt: {clusters}; step {manifest.step}, {manifest.nbytes()} bytes in {len(manifest.files)} files.

    roll-ckpt pull {remote.uri} .

brings the newest one, every byte checked; `hf://{remote.repo_id}@{names.hub_tag(manifest.name)}` names this one,
and each tag `checkpoint-N` an older or newer one. Or resume from it: `resume_from_checkpoint: {remote.uri}`.
"""


def _check(
    checkpoint_dir: Path, manifest: Manifest, record: bytes, hashes: Hashes | None, progress: Progress
) -> _Checked:
    """Re-read every byte; `record` is the bytes of manifest.json. Damaged, or HubRefused if a file holds a token."""
    uploads, mtimes_ns = [], {}
    done = 0
    for receipt in manifest.files:
        path = checkpoint_dir / receipt.path
        if receipt.nbytes <= _SMALL_BYTES or locks.is_held(path):
            data = reads.read_bytes(path)
            if records.receipt_of_bytes(receipt.path, data, receipt.block_bytes) != receipt:
                raise _damaged(path)
            uploads.append(_small(receipt.path, data))
        else:
            mtimes_ns[receipt.path] = reads.mtime_ns(path)
            uploads.append(_large(path, receipt, mtimes_ns[receipt.path], hashes))
        done += receipt.nbytes
        progress("checking", done, manifest.nbytes())
    uploads += _check_records(checkpoint_dir, manifest, record)
    if leaking := [u.path for u in uploads if isinstance(u.source, bytes) and answers.holds_token(u.source)]:
        raise HubRefused(
            f"{checkpoint_dir / leaking[0]}: it holds what looks like a token of the Hub; nothing of {manifest.name} "
            "was sent. Revoke that token, keep it out of what is saved, and save again"
        )
    return _Checked(manifest, sha256(record), uploads, mtimes_ns)


def _check_records(checkpoint_dir: Path, manifest: Manifest, record: bytes) -> list[HubFile]:
    """The votes, the decision and the manifest, in this order. Damaged if one is not as it was committed."""
    uploads = []
    for path in manifest.record_paths():
        data = reads.read_bytes(checkpoint_dir / path)
        if path == names.DECISION:
            decision = records.parse_decision(data, checkpoint_dir / path)
            sound = decision.commit and decision.manifest == sha256(record)
        else:
            sound = sha256(data) == manifest.votes[path.removeprefix(f"{names.VOTES}/")]
        if not sound:
            raise _damaged(checkpoint_dir / path)
        uploads.append(_small(path, data))
    return [*uploads, _small(names.MANIFEST, record)]


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path}: not as it was committed; nothing was pushed. See `roll-ckpt verify`")


def _small(path: str, data: bytes) -> HubFile:
    return HubFile(path, data, len(data), sha256(data))


def _large(path: Path, receipt: Receipt, mtime_ns: int, hashes: Hashes | None) -> HubFile:
    """A large file with its SHA-256: the stored one, or computed while the file is checked against its receipt."""
    from roll_ckpt.native import extension  # as in transaction/verification.py

    hex_digest = hashes.known(receipt, mtime_ns) if hashes is not None else None
    if hex_digest is None or tree.file_bytes(path) != receipt.nbytes:
        digest, crcs, nbytes = hashlib.sha256(), [], 0
        for block in reads.read_blocks(path, receipt.block_bytes):
            digest.update(block)
            crcs.append(extension.crc32(block))
            nbytes += len(block)
        if nbytes != receipt.nbytes or records.root_of(nbytes, receipt.block_bytes, crcs) != receipt.root:
            raise _damaged(path)
        hex_digest = digest.hexdigest()
        if hashes is not None:
            hashes.remember(receipt, mtime_ns, hex_digest)
    return HubFile(receipt.path, path, receipt.nbytes, hex_digest)


def _check_untouched(checkpoint_dir: Path, checked: _Checked) -> None:
    """Damaged unless the checkpoint under this name is still the one that was checked, and its files are unchanged."""
    changed = Damaged(
        f"{checkpoint_dir}: it changed while it was sent; nothing was committed on the Hub. Push it again"
    )
    try:
        same = sha256(reads.read_bytes(checkpoint_dir / names.MANIFEST)) == checked.digest and all(
            reads.mtime_ns(checkpoint_dir / path) == mtime_ns for path, mtime_ns in checked.mtimes_ns.items()
        )
    except FileNotFoundError as error:
        raise changed from error
    if not same:
        raise changed


class _Sum:
    """Adds up the bytes that several threads report, and passes the sum on."""

    def __init__(self, doing: str, uploads: list[HubFile], progress: Progress) -> None:
        self._doing = doing
        self._total = sum(upload.nbytes for upload in uploads)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._doing, self._done, self._total)
