"""Every operation on the disk of this process, Python's and the extension's, as a `crash_model.Trace`.

The process must have been started with the library that `build` makes in LD_PRELOAD.
"""

from __future__ import annotations

import ctypes
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import shims
from crash_model import ROOT, Op, Trace, Tree, read_tree

from roll_ckpt.disk import failpoints

HERE = Path(__file__).parent
_HEAD = struct.Struct("=4I2qQ")


def build(folder: Path) -> Path:
    """Compile the recorder."""
    return shims.build("crash_record", folder)


def note(text: str) -> None:
    """Put a remark into the trace."""
    ctypes.CDLL(None).crash_record_note(text.encode())


def record(root: Path, work: Callable[[], object]) -> Trace:
    """Run `work` and return what it did below `root`, whose present contents are taken as durable."""
    shim = ctypes.CDLL(None)
    shim.crash_record_stop.restype = ctypes.c_void_p
    before = read_tree(root)
    shim.crash_record_start(str(root).encode())
    failpoints.observer = lambda operation, paths: note(f"@{operation} {_caller()}")
    try:
        work()
    finally:
        failpoints.observer = None
        nbytes = ctypes.c_size_t()
        address = shim.crash_record_stop(ctypes.byref(nbytes))
        records = ctypes.string_at(address, nbytes.value)
    reader = _Reader(str(root), before)
    for entry in _parse(records):
        reader.take(*entry)
    trace = Trace(reader.before[0], reader.before[1], reader.ops)
    assert trace.tree(len(trace.ops)) == read_tree(root), "the recorder has missed something"
    return trace


def _caller() -> str:
    """The lines of roll_ckpt that led to an operation, the innermost first, up to the one outside disk/."""
    lines = []
    frame = sys._getframe(1)
    while frame is not None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if "roll_ckpt" in path.parts and name != "announce" and not name.startswith("<"):
            lines.append(f"{path.stem}.{name}:{frame.f_lineno}")
            if path.parent.name != "disk":
                break
        frame = frame.f_back
    return " < ".join(lines)


def _role(path: str) -> str:
    """A file's name without what differs from save to save."""
    name = re.sub(r"\.1\.[0-9a-f]{8}\.[0-9]+", "", Path(path).name)
    return re.sub(r"(?<=[-.])[0-9]+", "N", name)


def _parse(records: bytes) -> Iterator[tuple[str, str, str, bytes, int, int, int]]:
    at = 0
    while at < len(records):
        *sizes, fd, offset, thread = _HEAD.unpack_from(records, at)
        at += _HEAD.size
        parts = []
        for size in sizes:
            parts.append(records[at : at + size])
            at += size
        name, path, other = (part.decode() for part in parts[:3])
        yield name, path, other, parts[3], fd, offset, thread


class _Reader:
    """Follows the operations by path and descriptor, and says which files and directories they are about."""

    def __init__(self, root: str, tree: Tree) -> None:
        self.root = root
        self.folders: dict[int, dict[str, int]] = {ROOT: {}}
        self.files: dict[int, bytes] = {}
        self.nodes = ROOT
        for path in sorted(tree):
            folder, name = self.find(f"{root}/{path}")
            node = self.folders[folder][name] = self.new()
            data = tree[path]
            if data is None:
                self.folders[node] = {}
            else:
                self.files[node] = data
        self.before = dict(self.files), {node: dict(entries) for node, entries in self.folders.items()}
        self.ops: list[Op] = []
        self.open: dict[int, int] = {}
        self.sizes = {node: len(data) for node, data in self.files.items()}
        self.asked: dict[int, str] = {}

    def new(self) -> int:
        self.nodes += 1
        return self.nodes

    def find(self, path: str) -> tuple[int, str]:
        """The directory of a path, and the name in it."""
        folder, *_ = ROOT, None
        *above, name = path.removeprefix(self.root + "/").split("/")
        for part in above:
            folder = self.folders[folder][part]
        return folder, name

    def at(self, path: str) -> int:
        if path.rstrip("/") == self.root:
            return ROOT
        folder, name = self.find(path)
        return self.folders[folder][name]

    def take(self, name: str, path: str, other: str, data: bytes, fd: int, offset: int, thread: int) -> None:
        if name == "note" and path.startswith("@"):
            self.asked[thread] = path[1:]
            return
        if name == "note":
            self.ops.append(Op("note", path))
            return
        if name == "open" and not offset:
            self.open[fd] = self.at(path)
            return
        asked = self.asked.pop(thread, "")
        getattr(self, f"_{name}")(path, other, data, fd, offset, asked)

    def put(self, kind: str, about: str, site: str, *entries: tuple[int, str, int | None], **more: object) -> None:
        for folder, name, node in entries:
            if node is None:
                del self.folders[folder][name]
            else:
                self.folders[folder][name] = node
        about = about.replace(self.root + "/", "")
        self.ops.append(Op(kind, about, site or "native", entries, **more))  # type: ignore[arg-type]

    def _create(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        node = self.open[fd] = self.new()
        self.files[node], self.sizes[node] = b"", 0
        self.put("born", path, asked, node=node)
        self.put("create", path, asked, (*self.find(path), node))

    def _open(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        self.open[fd] = self.at(path)
        self._truncate(path, other, data, fd, 0, asked)

    def _write(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        node = self.open[fd]
        self.sizes[node] = max(self.sizes[node], offset + len(data))
        self.put(
            "write", f"{len(data)} bytes at {offset} of {self.name(node)}", asked, node=node, offset=offset, data=data
        )

    def _truncate(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        node = self.open[fd]
        self.sizes[node] = offset
        self.put("size", f"{offset} of {self.name(node)}", asked, node=node, offset=offset)

    def _allocate(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        if offset > self.sizes[self.open[fd]]:
            self._truncate(path, other, data, fd, offset, asked)

    def _fsync(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        node = self.open[fd]
        path = self.name(node)
        self.put("fsync", path, f"{asked or 'native'} of {_role(path)}", node=node)

    def _mkdir(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        node = self.new()
        self.folders[node] = {}
        self.put("mkdir", path, asked, (*self.find(path), node), moved=(node,))

    def _rmdir(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        self.put("rmdir", path, asked, (*self.find(path), None), moved=(self.at(path),))

    def _link(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        self.put("link", f"{path} {other}", asked, (*self.find(other), self.at(path)))

    def _unlink(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        self.put("unlink", path, asked, (*self.find(path), None))

    def _rename(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        (a, old), (b, new), node = self.find(path), self.find(other), self.at(path)
        if a == b or node in self.folders:
            moved = (node,) if node in self.folders else ()
            self.put("rename", f"{path} {other}", asked, (a, old, None), (b, new, node), moved=moved)
        else:
            self.put("rename", f"{path} {other}", asked, (b, new, node))
            self.put("rename", f"{path} leaves", asked, (a, old, None), after=len(self.ops) - 1)

    def _exchange(self, path: str, other: str, data: bytes, fd: int, offset: int, asked: str) -> None:
        one, two = self.at(path), self.at(other)
        self.put(
            "exchange", f"{path} {other}", asked, (*self.find(path), two), (*self.find(other), one), moved=(one, two)
        )

    def name(self, node: int) -> str:
        """A path of a node, for messages."""
        todo = [("", ROOT)]
        while todo:
            prefix, folder = todo.pop()
            if folder == node:
                return prefix.rstrip("/") or "."
            for entry, below in self.folders.get(folder, {}).items():
                todo.append((f"{prefix}{entry}/", below))
        return f"node {node}"
