"""A file system that loses power: what each crash may leave of a recorded run.

What an fsync has reached stays. Everything younger may be there or not, each operation by itself: an entry of a
directory (made, linked, renamed, removed) until that directory is synced, the bytes of a file until that file is.
Nothing of one file or directory says anything about another. Two mercies only: a rename of a directory and an
exchange happen as a whole, in both directories as soon as either is synced; and a directory cannot be in two
places. A file renamed into another directory may be there under both names, never under none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Tree = dict[str, bytes | None]
"""What lies below the root: the bytes of each file, None for each directory."""

Loss = tuple[str, set[int], dict[int, str]]
"""What a crash takes: in words, the operations that never came to the disk, and how it shows in files (`tree`)."""

ROOT = 0
WHOLE = ("nothing lost", "all lost")


@dataclass(frozen=True)
class Op:
    """One operation as the model sees it."""

    kind: str
    about: str
    """Its paths, for a message; the text of a note."""
    site: str = ""
    """Who asked for it: the lines of Python that led to it, or "native"."""
    entries: tuple[tuple[int, str, int | None], ...] = ()
    """(directory, name, what it then names or None): all of them happen, or none."""
    moved: tuple[int, ...] = ()
    """The directories whose own place this changes."""
    node: int = -1
    """The file whose bytes change, or the file or directory that is synced."""
    offset: int = 0
    data: bytes | None = None
    """What is written at `offset`; None: the size becomes `offset`."""
    after: int = -1
    """The operation without which this one cannot be."""


@dataclass
class Trace:
    """The operations of one run, on what lay there before."""

    files: dict[int, bytes]
    folders: dict[int, dict[str, int]]
    ops: list[Op]

    def without(self, *sites: str) -> Trace:
        """The same run with every fsync that these call sites asked for left out."""
        ops = [Op("removed", op.about) if op.kind == "fsync" and op.site in sites else op for op in self.ops]
        return Trace(self.files, self.folders, ops)

    def pending(self, end: int) -> list[int]:
        """The indices of those of the first `end` operations that no fsync has reached."""
        found: list[int] = []
        for index, op in enumerate(self.ops[:end]):
            if op.kind == "fsync":
                reached = {i for i in found if self._reached(self.ops[i], op.node)}
                # A directory is in one place only: where it went later is where it is.
                reached |= {i for i in found if any(i < j and self._same(i, j) for j in reached)}
                found = [i for i in found if i not in reached]
            elif op.entries or op.kind in ("write", "size"):
                found.append(index)
        return found

    def _reached(self, op: Op, node: int) -> bool:
        return node == op.node or any(folder == node for folder, _, _ in op.entries)

    def tree(self, end: int, lost: Iterable[int] = (), damaged: dict[int, str] | None = None) -> Tree:
        """What is there after the first `end` operations when those in `lost` never came to the disk.

        `damaged` says of files how the writes that were lost show: "torn" (the first half of the bytes is
        there) or "zero" (the size is there).
        """
        lost, damaged = set(lost), damaged or {}
        folders = {node: dict(entries) for node, entries in self.folders.items()}
        files = {node: bytearray(data) for node, data in self.files.items()}
        for index, op in enumerate(self.ops[:end]):
            for folder, name, node in op.entries if index not in lost else ():
                if node is None:
                    folders.setdefault(folder, {}).pop(name, None)
                else:
                    folders.setdefault(folder, {})[name] = node
            if op.kind in ("born", "write", "size"):
                data = files.setdefault(op.node, bytearray())
                _change(data, op, damaged.get(op.node, "") if index in lost else None)
        return _walk(folders, files)

    def losses(self, end: int, base: Trace | None = None) -> Iterator[Loss]:
        """What a crash behind the first `end` operations may lose.

        With `base`, the same run with more fsyncs, only what could not be lost there.
        """
        pending = self.pending(end)
        new = set(pending) - set(base.pending(end)) if base else set()
        if base is not None and not new:
            return
        for loss in self._losses(pending):
            if base is None or new & loss[1]:
                yield loss

    def _losses(self, pending: list[int]) -> Iterator[Loss]:
        """Everything, nothing, and each operation: alone lost, alone kept, half done."""
        entries = [i for i in pending if self.ops[i].entries]
        writes = {i for i in pending if not self.ops[i].entries}
        yield WHOLE[0], set(), {}
        if not pending:
            return
        yield WHOLE[1], set(pending), {}
        yield "all bytes lost", writes, {}
        for i in entries:
            yield f"lost: {self._tell(i)}", self._needing(i, entries), {}
            yield f"kept: {self._tell(i)}", set(entries) - self._needed(i, entries) | writes, {}
        for node in dict.fromkeys(self.ops[i].node for i in sorted(writes)):
            mine = {i for i in writes if self.ops[i].node == node}
            for how in ("torn", "zero", ""):
                yield f"{how or 'bytes lost'}: {self._tell(min(mine))}", mine, {node: how}

    def _tell(self, index: int) -> str:
        return f"#{index} {self.ops[index].kind} {self.ops[index].about}"

    def _needing(self, index: int, pending: list[int]) -> set[int]:
        """The operation and all later ones that cannot be without it."""
        found = {index}
        for i in pending:
            if i > index and (self.ops[i].after in found or any(self._same(i, j) for j in found)):
                found.add(i)
        return found

    def _needed(self, index: int, pending: list[int]) -> set[int]:
        """The operation and all earlier ones without which it cannot be."""
        found = {index}
        for i in reversed(pending):
            if i < index and any(self.ops[j].after == i or self._same(i, j) for j in found):
                found.add(i)
        return found

    def _same(self, i: int, j: int) -> bool:
        return bool(set(self.ops[i].moved) & set(self.ops[j].moved))


def _change(data: bytearray, op: Op, lost: str | None) -> None:
    """Do a write or a change of size; `lost` says how much of it shows, None that all does."""
    if lost == "" or op.kind == "born":
        return
    if op.data is None:
        if lost != "torn":
            del data[op.offset :]
            data.extend(bytes(op.offset - len(data)))
        return
    written = op.data
    if lost == "torn":
        written = written[: len(written) // 2]
    elif lost == "zero":
        written = bytes(len(written))
    if len(data) < op.offset:
        data.extend(bytes(op.offset - len(data)))
    data[op.offset : op.offset + len(written)] = written


def _walk(folders: dict[int, dict[str, int]], files: dict[int, bytearray]) -> Tree:
    tree: Tree = {}
    todo = [("", ROOT)]
    while todo:
        prefix, folder = todo.pop()
        for name, node in folders.get(folder, {}).items():
            path = f"{prefix}{name}"
            if node in files:
                tree[path] = bytes(files[node])
            else:
                tree[path] = None
                todo.append((f"{path}/", node))
    return tree


def read_tree(root: Path) -> Tree:
    """What lies below a real directory."""
    tree: Tree = {}
    todo = [("", str(root))]
    while todo:
        prefix, folder = todo.pop()
        with os.scandir(folder) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    tree[path] = None
                    todo.append((f"{path}/", entry.path))
                else:
                    with open(entry.path, "rb", buffering=0) as file:
                        tree[path] = file.read()
    return tree


def make_tree(root: Path, tree: Tree) -> None:
    """Put it on a real disk; `root` must be there and empty."""
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            os.mkdir(f"{root}/{path}")
        else:
            descriptor = os.open(f"{root}/{path}", os.O_WRONLY | os.O_CREAT, 0o666)
            os.write(descriptor, data)
            os.close(descriptor)


def fingerprint(tree: Tree) -> bytes:
    """Equal for equal trees."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(tree):
        data = tree[path]
        digest.update(repr((path, data is None, len(data or b""))).encode() + (data or b""))
    return digest.digest()
