"""Who may import whom, who may touch the disk, and what starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "roll_ckpt"

# A module imports from its own layer or from those above it in this list, never from below.
LAYERS: list[set[str]] = [
    {"errors", "names", "config", "image", "seal"},
    {"layout", "manifest", "disk", "native"},
    {"commit", "arena", "attempt", "epoch", "lease", "trash", "world"},
    {"hub", "hub_dev", "loader", "pull", "push", "push_queue", "retention", "saver", "uploader", "uploads", "verify"},
    {"place", "printing"},
    {"__init__", "__main__", "backends", "cli", "cli_hub", "cluster", "deepspeed", "pipeline", "pipeline_state", "run"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

TORCH_FREE = [
    *("cli", "commit", "disk", "errors", "hub", "hub_dev", "manifest", "names", "native", "pull", "push"),
    *("push_queue", "retention", "uploader", "uploads", "verify"),
]

OS_MUTATORS = {
    *("chmod", "chown", "fdatasync", "fsync", "ftruncate", "link", "makedirs", "mkdir", "open", "pwrite"),
    *("remove", "removedirs", "rename", "renames", "replace", "rmdir", "symlink", "truncate", "unlink"),
    *("utime", "write"),
}
PATH_MUTATORS = {"hardlink_to", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    """The name in LAYERS that a file belongs to: its own, or its subpackage's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, also inside functions, by its absolute name."""
    package = ("roll_ckpt", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def called(path: Path) -> Iterator[tuple[int, str, str, ast.Call]]:
    """(line, receiver, function, call) of every call; the receiver is "" where it is no plain name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            receiver = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            yield node.lineno, receiver, node.func.attr, node
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.lineno, "", node.func.id, node


def text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_every_module_has_its_layer() -> None:
    assert {part(path) for path in modules()} <= set(LEVEL)


def test_no_module_imports_from_a_layer_below_it() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        for name in imports(path)
        if name.startswith("roll_ckpt.") and LEVEL.get(name.split(".")[1], 0) > LEVEL[part(path)]
    ]
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        parts = {name.split(".")[1] for name in imports(path) if name.startswith("roll_ckpt.")}
        graph.setdefault(part(path), set()).update(parts & set(LEVEL) - {part(path), "__init__"})
    while leaves := {name for name, needs in graph.items() if not needs & graph.keys()}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, "these import each other"


@pytest.mark.parametrize(
    ("module", "only_in"),
    [
        *(("roll_ckpt._native", "native.py"), ("huggingface_hub", "hub.py"), ("httpx2", "hub.py")),
        *(("deepspeed", "backends/deepspeed.py"), ("megatron", "backends/megatron")),
    ],
)
def test_one_file_or_folder_alone_imports(module: str, only_in: str) -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(f"{name}.".startswith(f"{module}.") for name in imports(path))
    }
    assert [name for name in importers if name != only_in and not name.startswith(f"{only_in}/")] == []


def test_disk_py_alone_changes_the_disk() -> None:
    wrong = []
    for path in modules():
        if path.name == "disk.py":
            continue
        for line, receiver, function, call in called(path):
            modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
            writes = function == "open" and any(set("wax+") & set(mode) for mode in map(text, modes))
            by_os = receiver == "os" and function in OS_MUTATORS
            by_path = receiver not in {"disk", "os"} and function in PATH_MUTATORS
            if writes or by_os or by_path or receiver in {"shutil", "tempfile"}:
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} {receiver}.{function}")
    assert not wrong


WITHOUT = """
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[2:]:
            raise AssertionError(f"{sys.argv[1]} imports {name}")

sys.meta_path.insert(0, Refuse())
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize("module", TORCH_FREE)
def test_starts_without_torch(module: str) -> None:
    refused = ["torch", "deepspeed", "transformers"]
    if module == "cli":
        refused += ["huggingface_hub", "numpy", "pydantic", "rich", "yaml"]
    command = [sys.executable, "-c", WITHOUT, f"roll_ckpt.{module}", *refused]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
