"""A committed checkpoint to the Hub: one commit with every file of it, then the tag `checkpoint-N`.

    look → check files → send the large ones → look again → one commit on what was looked at → tag

The commit's message carries the manifest's SHA-256. Whoever comes after a kill, or after an answer that was lost,
finds it there; and because every commit names its parent, of two that were asked for only one can land.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
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
from roll_ckpt.native import extension
from roll_ckpt.transaction import reader_locks
from roll_ckpt.upload.hub import answers
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.client import Head, look, read_file
from roll_ckpt.upload.hub.push_client import branch, create, drop_branch, exists, history, refs, tag
from roll_ckpt.upload.hub.sending import HubFile, Sending

CARD = "README.md"
MARKER = "<!-- roll_ckpt writes this card anew with every checkpoint; take this line out to keep your own -->"
_SMALL_BYTES = 1 << 20  # such files are held in memory, so that what was checked is what is sent
_HISTORY = 1000  # commits that are searched for one of ours
_TRIES = 8
Progress = Callable[[str, int, int], None]
"""What is being done ("checking" or "sending"), bytes that are done, and all bytes."""


class Hashes(Protocol):
    """Remembers digests of large files from one process to the next."""

    def known(self, receipt: Receipt, mtime_ns: int) -> str | None:
        """The SHA-256 of the file that the receipt is about, if it has not been touched since."""
        ...

    def remember(self, receipt: Receipt, mtime_ns: int, sha256: str) -> None: ...


@dataclass(frozen=True)
class _Checked:
    """A checkpoint whose every byte is as it was committed, ready to be sent."""

    told: Manifest
    digest: str
    uploads: list[HubFile]
    touched: dict[str, int]
    """When each file that is not held in memory was last changed."""


def push(
    checkpoint_dir: Path,
    remote: Remote,
    *,
    private: bool,
    progress: Progress | None = None,
    hashes: Hashes | None = None,
    on_side_branch: bool = False,
) -> str:
    """Put a committed checkpoint at the root of a repository, as one commit, and tag it; return the commit's id.

    Blocks. Exactly once, however often it is called and wherever it was killed: what is there already is only
    tagged. The repository is made if it is missing. Files of the checkpoint that was there before go, those of
    others stay. The checkpoint is not pruned meanwhile, and is checked before it goes. With `aside` only the tag
    names it and the branch stays as it is: a newer checkpoint lies there already.

    Raises:
        HubRefused: the Hub says no; or the repository is public and `private` is asked for; or a file holds a
            token; or the revision is no branch. HubUnavailable: try again later.
        Damaged: a file is not as it was committed; nothing was committed on the Hub. NotFound: no checkpoint.
    """
    with reader_locks.reading(checkpoint_dir):
        record = reads.read_bytes(checkpoint_dir / names.MANIFEST)
        told = manifests.parse(record, checkpoint_dir / names.MANIFEST)
        digest = sha256(record)
        _open(remote, private)
        side = Remote(remote.repo_id, f"roll_ckpt-{sha256(f'{digest} {remote.revision}'.encode())[:16]}")
        landed = _find(remote, side, told.name, digest)
        if landed is None:
            checked = _check(checkpoint_dir, told, record, hashes, progress or (lambda *_: None))
            if on_side_branch:
                branch(side, start=remote.revision)
            landed = _commit_once(
                checkpoint_dir, side if on_side_branch else remote, checked, progress or (lambda *_: None)
            )
        failpoints.failpoint("push.committed", name=told.name)
        _tag(remote, told.name, landed)
        failpoints.failpoint("push.tagged", name=told.name)
        if side.revision in refs(remote)[0]:
            drop_branch(side)
        return landed


def _open(remote: Remote, private: bool) -> None:
    """Refuse a repository that must not be written to, before a byte of the checkpoint is read."""
    try:
        head = look(remote)
    except HubRefused as error:
        if error.status != 404 or exists(remote):
            raise
        create(remote, private=private)
        head = look(remote)
    if private and not head.private:
        raise HubRefused(
            f"{remote.uri}: the repository is public, and `private: true` is asked for; make it private, or say "
            "`private: false` if everybody may have the checkpoints"
        )
    branches, _ = refs(remote)
    if remote.revision not in branches:
        raise HubRefused(f"{remote.uri}: {remote.revision} is no branch of the repository; checkpoints go to a branch")


def _mark(digest: str) -> str:
    return f"roll_ckpt manifest sha256:{digest}"


def _find(remote: Remote, side: Remote, name: str, digest: str) -> str | None:
    """The commit that brought this very checkpoint to the branch, or beside it; None if there is none."""
    branches, tags = refs(remote)
    found = _find_on(side, digest, 1) if side.revision in branches else None
    found = found or _find_on(remote, digest, _HISTORY)
    if found is None and name in tags:
        # The tag may be another branch's: this one's only if the commit was made on our side branch.
        found = _find_on(Remote(remote.repo_id, tags[name]), digest, 1, made_on=side.revision)
    return found


def _find_on(remote: Remote, digest: str, limit: int, made_on: str = "") -> str | None:
    mark = _mark(digest)
    return next((found for found, text in history(remote, limit) if mark in text and made_on in text), None)


def _tag(remote: Remote, name: str, landed: str) -> None:
    """Let the tag name the commit, unless it names a newer one by now. What was done is looked at, not believed."""
    for left in reversed(range(_TRIES)):
        _, tags = refs(remote)
        there = tags.get(name)
        if there == landed or (there is not None and _is_newer(remote, there, landed)):
            return
        try:
            tag(remote, name, landed, instead_of=there)
        except (HubRefused, HubUnavailable) as error:
            # It may be there all the same, or somebody else has changed it: look again.
            if not left or (error.status is not None and error.status not in (404, 409, 500, 502, 504)):
                raise


def _is_newer(remote: Remote, one: str, other: str) -> bool:
    order = [found for found, _ in history(remote, _HISTORY)]
    return one in order and other in order and order.index(one) < order.index(other)


def _commit_once(checkpoint_dir: Path, remote: Remote, checked: _Checked, progress: Progress) -> str:
    sending = Sending(remote, checked.uploads, _Sum("sending", checked.uploads, progress))
    sending.send()
    failpoints.failpoint("push.sent", name=checked.told.name)
    problem: HubUnavailable | None = None
    for _ in range(_TRIES):
        head = look(remote)
        # Looked for after the head was: a commit of ours that lands later than this has another parent.
        landed = _find_on(remote, checked.digest, _HISTORY)
        if landed is not None:
            return landed
        if problem is not None and problem.status != 412:
            raise problem  # it did not land, and the Hub wants a pause
        _check_untouched(checkpoint_dir, checked)
        try:
            return sending.commit(
                _card(remote, head, checked),
                _outdated(remote, head, checked),
                title=checked.told.name,
                message=f"{_mark(checked.digest)}\n"
                f"run {checked.told.run_id}, step {checked.told.step}, on {remote.revision}",
                parent=head.commit,
            )
        except HubUnavailable as error:
            problem = error
    assert problem is not None
    raise problem


def _outdated(remote: Remote, head: Head, checked: _Checked) -> list[str]:
    """The files of the checkpoint that was there before which this one has not."""
    if names.MANIFEST not in head.files:
        return []
    data = read_file(remote, names.MANIFEST, head.commit)
    try:
        told = manifests.parse(data or b"", f"{remote.uri}: {names.MANIFEST}")
    except Damaged:
        return []  # somebody else's
    mine = {upload.path for upload in checked.uploads}
    return sorted(({*_paths(told)} - mine) & head.files)


def _paths(told: Manifest) -> Iterator[str]:
    """Every file of a checkpoint."""
    yield from (receipt.path for receipt in told.files)
    yield from (f"{names.VOTES}/{file}" for file in told.votes)
    yield names.DECISION
    yield names.MANIFEST


def _card(remote: Remote, head: Head, checked: _Checked) -> list[HubFile]:
    """The model card, unless the repository has one that a person wrote."""
    if any(upload.path == CARD for upload in checked.uploads):
        return []
    if CARD in head.files and MARKER.encode() not in (read_file(remote, CARD, head.commit) or b""):
        return []
    return [_small(CARD, card(checked.told, remote).encode())]


def card(told: Manifest, remote: Remote) -> str:
    """The model card's text."""
    clusters = ", ".join(f"{name} ({facts['world_size']} ranks)" for name, facts in sorted(told.clusters.items()))
    return f"""---
tags:
- roll_ckpt
---
{MARKER}

# {told.name}

A checkpoint of roll_ckpt: {clusters}; step {told.step}, {told.nbytes()} bytes in {len(told.files)} files.

    roll-ckpt pull {remote.uri} .

brings the newest one, every byte checked; `hf://{remote.repo_id}@{told.name}` names this one, and each tag
`checkpoint-N` an older or newer one. Or resume from it: `resume_from_checkpoint: {remote.uri}`.
"""


def _check(checkpoint_dir: Path, told: Manifest, record: bytes, hashes: Hashes | None, progress: Progress) -> _Checked:
    uploads, touched = [], {}
    done = 0
    for receipt in told.files:
        path = checkpoint_dir / receipt.path
        if receipt.nbytes <= _SMALL_BYTES or locks.is_held(path):
            data = reads.read_bytes(path)
            if records.receipt_of_bytes(receipt.path, data, receipt.block_bytes) != receipt:
                raise _damaged(path)
            uploads.append(_small(receipt.path, data))
        else:
            touched[receipt.path] = reads.mtime_ns(path)
            uploads.append(_large(path, receipt, touched[receipt.path], hashes))
        done += receipt.nbytes
        progress("checking", done, told.nbytes())
    for file, digest in told.votes.items():
        data = reads.read_bytes(checkpoint_dir / names.VOTES / file)
        if sha256(data) != digest:
            raise _damaged(checkpoint_dir / names.VOTES / file)
        uploads.append(_small(f"{names.VOTES}/{file}", data))
    decided = reads.read_bytes(checkpoint_dir / names.DECISION)
    decision = records.parse_decision(decided, checkpoint_dir / names.DECISION)
    if not decision.commit or decision.manifest != sha256(record):
        raise _damaged(checkpoint_dir / names.DECISION)
    uploads += [_small(names.DECISION, decided), _small(names.MANIFEST, record)]
    if leaking := [u.path for u in uploads if isinstance(u.source, bytes) and answers.holds_token(u.source)]:
        raise HubRefused(
            f"{checkpoint_dir / leaking[0]}: it holds what looks like a token of the Hub; nothing of {told.name} was sent. "
            "Revoke that token, keep it out of what is saved, and save again"
        )
    return _Checked(told, sha256(record), uploads, touched)


def _damaged(path: Path) -> Damaged:
    return Damaged(f"{path}: not as it was committed; nothing was pushed. See `roll-ckpt verify`")


def _small(path: str, data: bytes) -> HubFile:
    return HubFile(path, data, len(data), sha256(data))


def _large(path: Path, receipt: Receipt, mtime_ns: int, hashes: Hashes | None) -> HubFile:
    known = hashes.known(receipt, mtime_ns) if hashes is not None else None
    if known is None or tree.file_bytes(path) != receipt.nbytes:
        digest, crcs, nbytes = hashlib.sha256(), [], 0
        for block in reads.read_blocks(path, receipt.block_bytes):
            digest.update(block)
            crcs.append(extension.crc32(block))
            nbytes += len(block)
        if nbytes != receipt.nbytes or records.root_of(nbytes, receipt.block_bytes, crcs) != receipt.root:
            raise _damaged(path)
        known = digest.hexdigest()
        if hashes is not None:
            hashes.remember(receipt, mtime_ns, known)
    return HubFile(receipt.path, path, receipt.nbytes, known)


def _check_untouched(checkpoint_dir: Path, checked: _Checked) -> None:
    """What was sent is what was checked, and the checkpoint under this name is still the same."""
    try:
        same = sha256(reads.read_bytes(checkpoint_dir / names.MANIFEST)) == checked.digest and all(
            reads.mtime_ns(checkpoint_dir / path) == mtime_ns for path, mtime_ns in checked.touched.items()
        )
    except FileNotFoundError:
        same = False
    if not same:
        raise Damaged(
            f"{checkpoint_dir}: it changed while it was sent; nothing was committed on the Hub. Push it again"
        )


class _Sum:
    """Adds up what several threads report."""

    def __init__(self, doing: str, uploads: list[HubFile], progress: Progress) -> None:
        self._doing = doing
        self._all = sum(upload.nbytes for upload in uploads)
        self._done = 0
        self._progress = progress
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._doing, self._done, self._all)
