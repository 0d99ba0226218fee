"""Verification: re-reads every byte of a checkpoint and reports what is not as it was committed; changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from roll_ckpt import names
from roll_ckpt.disk import locks, reads, tree
from roll_ckpt.disk.missing import if_there
from roll_ckpt.disk.retry import ReadRetries
from roll_ckpt.errors import Damaged
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Receipt
from roll_ckpt.formats.sealed_json import sha256
from roll_ckpt.transaction import epochs, foreign, listing
from roll_ckpt.transaction.home import find_home

log = logging.getLogger("roll_ckpt")

_SMALL_BYTES = 1 << 20  # below it, starting native threads takes longer than reading


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is not as it was committed. `path` is relative to the directory that was verified.

    `kind` is one of "missing", "extra" (a file that stock code would load as a part of the checkpoint, and that no save
    wrote), "link" (a directory, special file or link to one in place of a file), "size",
    "digest" (also a record that contradicts itself or another one), "name" (another checkpoint has taken the place of
    this one), and "unreadable".
    """

    path: str
    kind: str
    detail: str


def not_ours(checkpoint_dir: Path) -> list[str]:
    """The files of others in a checkpoint, relative to it, sorted; [] if the disk or the manifest does not tell."""
    try:
        written = manifests.read(checkpoint_dir).paths()
        folders = {path.rpartition("/")[0] for path in written}
        found = foreign.foreign_files(checkpoint_dir, written)
        return [path for path in found if path.rpartition("/")[0] not in folders or not foreign.read_by_stock(path)]
    except (Damaged, OSError) as error:
        log.debug("%s: whose files these are is not known: %s", checkpoint_dir, error)
        return []


def verify(checkpoint_dir: Path, *, part: int = 0, parts: int = 1, cache: bool = False) -> list[Problem]:
    """All problems of one checkpoint, sorted by path; [] if every byte is as it was committed. Blocks.

    Several processes can share the reading: each of `parts` reads its `part` of the large files, and all records. With
    `cache` the bytes stay in the page cache for the load that follows. Reads that the disk refuses are retried for two
    seconds in all; after that they are "unreadable". A process that holds `reader_locks.reading(checkpoint_dir)` may
    call it.
    """
    path, retries = checkpoint_dir / names.MANIFEST, ReadRetries()
    try:
        data = retries.run(partial(if_there, partial(reads.read_bytes, path)))
        if data is None:
            return [Problem(names.MANIFEST, "missing", "there is no manifest, so nothing can be verified")]
        manifest = manifests.parse(data, path)
    except Damaged as error:
        return [Problem(names.MANIFEST, "digest" if tree.is_file(path) else "link", str(error))]
    except OSError as error:
        return [_unreadable(names.MANIFEST, error)]
    problems = _listing(checkpoint_dir, manifest, retries)
    if names.differ_in_number_only(checkpoint_dir.absolute().name, manifest.name.rpartition("/")[2]):
        problems.append(Problem(names.MANIFEST, "name", f"it is the manifest of {manifest.name}"))
    bad = {problem.path for problem in problems}
    if not bad & {names.EXPECTED, *manifest.record_paths()}:
        problems += _records(checkpoint_dir, manifest, data, retries)
    for receipt in _share([r for r in manifest.files if r.path not in bad], part, parts):
        problems += _contents(checkpoint_dir, receipt, retries, direct=not cache)
    return sorted(set(problems))


def _listing(checkpoint_dir: Path, manifest: Manifest, retries: ReadRetries) -> list[Problem]:
    try:
        return retries.run(partial(_compare, checkpoint_dir, manifest))
    except OSError as error:
        return [_unreadable(Path(error.filename).relative_to(checkpoint_dir).as_posix(), error)]


def _compare(checkpoint_dir: Path, manifest: Manifest) -> list[Problem]:
    """The names and sizes on disk against those in the manifest."""
    listed = {receipt.path: receipt.nbytes for receipt in manifest.files}
    paths = {*manifest.paths()}
    folders = {path.rpartition("/")[0] for path in paths}
    problems = []
    for path, _ in tree.walk_all(checkpoint_dir):
        if path not in paths and path.rpartition("/")[0] in folders and foreign.read_by_stock(path):
            problems.append(Problem(path, "extra", "no save wrote it, and stock code would load it"))
    for path in sorted(paths):
        if not tree.is_file(checkpoint_dir / path, follow=True):
            if tree.is_dir(checkpoint_dir / path):
                problems.append(Problem(path, "link", "a directory is in its place"))
            elif tree.exists(checkpoint_dir / path):
                problems.append(Problem(path, "link", "a special file or a link that leads to no file is in its place"))
            else:
                problems.append(Problem(path, "missing", "it was committed and does not exist"))
        elif path in listed and (size := tree.file_bytes(checkpoint_dir / path, follow=True)) != listed[path]:
            problems.append(Problem(path, "size", f"it has {size} bytes instead of {listed[path]}"))
    return problems


def _records(checkpoint_dir: Path, manifest: Manifest, data: bytes, retries: ReadRetries) -> list[Problem]:
    """Votes, expected.json and decision against their own digests and against the manifest, whose bytes are `data`."""
    problems: list[Problem] = []
    read = {file: _read(checkpoint_dir, f"{names.VOTES}/{file}", problems, retries) for file in manifest.votes}
    votes = {file: vote for file, vote in read.items() if vote is not None}
    expected = _read(checkpoint_dir, names.EXPECTED, problems, retries)
    decision = _read(checkpoint_dir, names.DECISION, problems, retries)
    foreign = [file for file, vote in votes.items() if sha256(vote) != manifest.votes[file]]
    for file in foreign:
        problems.append(Problem(f"{names.VOTES}/{file}", "digest", "it is not the vote that the manifest rests on"))
    if expected is not None:
        problems += _damage(names.EXPECTED, partial(records.parse_expected, expected, names.EXPECTED))
    contrary = [] if decision is None else _damage(names.DECISION, partial(_check_decision, decision, manifest, data))
    problems += contrary
    if contrary and len(foreign) == len(manifest.votes):
        problems.append(Problem(names.MANIFEST, "digest", "neither a vote nor the decision belongs to this manifest"))
    if not problems and expected is not None:
        problems += _damage(names.MANIFEST, partial(_check_rebuilt, votes, expected, data))
    return problems


def _check_decision(data: bytes, manifest: Manifest, manifest_data: bytes) -> None:
    decision = records.parse_decision(data, names.DECISION)
    same = (decision.name, decision.epoch, decision.attempt) == (manifest.name, manifest.epoch, manifest.attempt)
    if not decision.commit or not same or decision.manifest != sha256(manifest_data):
        raise Damaged("it is not the decision to commit this manifest")


def _check_rebuilt(votes: dict[str, bytes], expected: bytes, manifest_data: bytes) -> None:
    if manifests.build(votes, expected) != manifest_data:
        raise Damaged("it is not the manifest that the votes give")


def _contents(checkpoint_dir: Path, receipt: Receipt, retries: ReadRetries, *, direct: bool) -> list[Problem]:
    from roll_ckpt.native import (
        files,  # here, so that the command line starts, and `doctor` tells, without the extension
    )

    path = checkpoint_dir / receipt.path
    try:
        if receipt.nbytes <= _SMALL_BYTES or locks.is_held(path):
            # Where this process holds a lock on the file, a descriptor opened outside disk/ would drop it.
            data = retries.run(partial(reads.read_bytes, path))
            nbytes, crcs = len(data), records.digest_bytes(data, receipt.block_bytes)
        else:
            digest = retries.run(partial(files.digest_file, str(path), receipt.block_bytes, direct=direct))
            nbytes, crcs = digest.nbytes, list(digest.crcs)
    except Damaged as error:
        return [Problem(receipt.path, "size", str(error))]
    except OSError as error:
        return [_unreadable(receipt.path, error)]
    if nbytes != receipt.nbytes:
        return [Problem(receipt.path, "size", f"it has {nbytes} bytes instead of {receipt.nbytes}")]
    if records.root_of(nbytes, receipt.block_bytes, crcs) != receipt.root:
        return [Problem(receipt.path, "digest", "its bytes are not those that were written")]
    return []


def _share(receipts: Iterable[Receipt], part: int, parts: int) -> list[Receipt]:
    """The receipts of one part. The largest come first, and each goes to the part with the fewest bytes so far."""
    loads = [0] * parts
    share = []
    for receipt in sorted(receipts, key=lambda r: (-r.nbytes, r.path)):
        lightest = loads.index(min(loads))
        loads[lightest] += receipt.nbytes + 1
        if lightest == part:
            share.append(receipt)
    return share


def verify_run(output_dir: Path) -> list[Problem]:
    """All problems of all committed checkpoints of a run, of `latest`, and of the records in `.epochs/`. Blocks.

    Without `latest` and `.epochs/`, no run has saved there: it is a folder of copies, pulled or uploaded, and only the
    checkpoints are verified. OSError if the disk refuses to list a directory.
    """
    problems = []
    sound: dict[str, Manifest] = {}
    for entry in listing.names_in(output_dir):
        checkpoint_dir = output_dir / entry
        if not _looks_committed(checkpoint_dir):
            continue
        problems += [Problem(f"{entry}/{p.path}", p.kind, p.detail) for p in verify(checkpoint_dir)]
        try:
            manifest = manifests.read(checkpoint_dir)
        except (Damaged, OSError) as error:
            log.debug("%s: verify() has reported this: %s", checkpoint_dir, error)
            continue
        if manifest.name != entry:
            log.debug("%s: a copy of %s under another name", checkpoint_dir, manifest.name)
        elif not tree.is_real_dir(checkpoint_dir):
            problems.append(Problem(entry, "link", "it is a link, and a run does not take a link for a checkpoint"))
        else:
            sound[entry] = manifest
    home = find_home(output_dir)
    if tree.exists(home / names.EPOCHS) or tree.exists(output_dir / names.LATEST):
        problems += _latest(output_dir, sound)
        problems += _epochs(home)
    return sorted(problems)


def _looks_committed(checkpoint_dir: Path) -> bool:
    """Whether a directory has the name or a record of a committed checkpoint, or the disk does not tell."""
    paths = (names.MANIFEST, names.DECISION, names.EXPECTED)
    try:
        if not tree.is_dir(checkpoint_dir):
            return False
        return names.step_of(checkpoint_dir.name) is not None or any(
            tree.exists(checkpoint_dir / path) for path in paths
        )
    except OSError as error:
        log.debug("%s: verify() reports what cannot be read: %s", checkpoint_dir, error)
        return True


def _latest(output_dir: Path, sound: dict[str, Manifest]) -> list[Problem]:
    try:
        latest = listing.read_latest(output_dir)
    except Damaged as error:
        return [Problem(names.LATEST, "digest", str(error))]
    if latest is None and any(manifest.save_latest for manifest in sound.values()):
        return [Problem(names.LATEST, "missing", "there are checkpoints that it should name")]
    if latest is not None and latest not in sound:
        return [Problem(names.LATEST, "digest", f"it names {latest!r}, which is no committed checkpoint")]
    return []


def _epochs(home: Path) -> list[Problem]:
    problems = []
    for entry in tree.list_dir(home / names.EPOCHS):
        path = home / names.EPOCHS / entry
        relative = f"{names.EPOCHS}/{entry}"
        if names.parse_temporary_file(entry) is not None or names.parse_epoch_file(names.parse_first_dir(entry) or ""):
            continue  # of a run that is just starting, or by which it was the first
        if parsed := names.parse_epoch_file(entry):
            problems += _damage(relative, partial(_check_member, path, parsed[0]))
        elif names.parse_aborted_file(entry):
            problems += _damage(relative, partial(_check_aborted, path))
        else:
            problems.append(Problem(relative, "extra", "roll_ckpt writes no such file"))
    return problems


def _check_member(path: Path, number: int) -> None:
    if epochs.parse_member(reads.read_bytes(path), path).number != number:
        raise Damaged(f"{path}: it is the record of another epoch")


def _check_aborted(path: Path) -> None:
    decision = records.parse_decision(reads.read_bytes(path), path)
    if names.parse_aborted_file(path.name) != (decision.name, decision.epoch, decision.attempt):
        raise Damaged(f"{path}: it is the record of another attempt")


def _damage(path: str, check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except Damaged as error:
        return [Problem(path, "digest", str(error))]
    except OSError as error:
        return [_unreadable(path, error)]
    return []


def _read(checkpoint_dir: Path, path: str, problems: list[Problem], retries: ReadRetries) -> bytes | None:
    try:
        return retries.run(partial(reads.read_bytes, checkpoint_dir / path))
    except OSError as error:
        problems.append(_unreadable(path, error))
        return None


def _unreadable(path: str, error: OSError) -> Problem:
    return Problem(path, "unreadable", error.strerror or str(error))
