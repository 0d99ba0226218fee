"""Who may import whom, who may touch the disk, and what starts without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "roll_ckpt"

# The rooms from the lowest row to the highest: a module imports from its own room and from rows below it, from no row
# above and from no other room of its own row. Files at the root of the package are rooms of one module.
ROWS: list[set[str]] = [
    {"errors", "process"},
    {"names"},
    {"config", "disk", "native"},
    {"formats", "ranks"},
    {"transaction"},
    {"load", "save"},
    {"upload"},
    {"backends"},
    {"pipeline"},
    {"activation"},
    {"cli", "deepspeed", "megatron", "state"},
    {"__init__", "__main__", "run"},
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}

PUBLIC = {
    "roll_ckpt",
    *(f"roll_ckpt.{name}" for name in ("config", "deepspeed", "errors", "megatron", "names", "state")),
}
FOR_DEMONSTRATIONS = {"roll_ckpt.disk.failpoints"}
"""What stops a run at a named point, as the demonstration does; it is public to tests and examples alone."""

TORCH_FREE = [
    *("cli.main", "disk.locks", "disk.reads", "disk.writes", "errors", "formats.manifests", "formats.image"),
    *("names", "native.mover", "process", "transaction.claims", "transaction.retention", "transaction.settlement"),
    *("transaction.verification", "upload.file_system", "upload.hub.pull", "upload.hub.push", "upload.hub.push_queue"),
    *("upload.hub.uploader", "upload.hub.worker"),
]

OS_MUTATORS = {
    *("chmod", "chown", "fdatasync", "fsync", "ftruncate", "link", "makedirs", "mkdir", "open", "pwrite"),
    *("remove", "removedirs", "rename", "renames", "replace", "rmdir", "symlink", "truncate", "unlink"),
    *("utime", "write"),
}
PATH_MUTATORS = {"hardlink_to", "rmdir", "symlink_to", "touch", "unlink", "write_bytes", "write_text"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The name in ROWS that a file belongs to: its own at the root of the package, or its folder's."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_name(path: Path) -> str:
    parts = ("roll_ckpt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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


def imported_room(name: str) -> str | None:
    """The room of roll_ckpt that an import leads to; None for other packages and for `__version__`."""
    parts = name.split(".")
    return parts[1] if parts[0] == "roll_ckpt" and len(parts) > 1 and parts[1] in ROW else None


def test_every_file_lies_in_a_room_that_has_its_row() -> None:
    assert {room(path) for path in modules()} == set(ROW)


def test_every_room_says_what_it_is_for() -> None:
    for folder in (path.parent for path in modules() if path.name == "__init__.py" and path.parent != PACKAGE):
        doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert 2 <= len([line for line in doc.splitlines() if line]) <= 4, folder


def test_rooms_import_only_downwards() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules()
        for name in imports(path)
        if (to := imported_room(name)) not in (None, room(path)) and ROW[to] >= ROW[room(path)]  # type: ignore[index]
    ]
    assert not wrong


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    known = {module_name(path): path for path in modules()}
    graph = {
        module: {next((m for m in (name, name.rpartition(".")[0]) if m in known), "") for name in imports(path)}
        - {module, "", "roll_ckpt"}
        for module, path in known.items()
    }
    while leaves := {module for module, needs in graph.items() if not needs & graph.keys()}:
        graph = {module: needs for module, needs in graph.items() if module not in leaves}
    assert not graph, "these import each other"


def test_no_module_passes_on_what_it_only_imported() -> None:
    """`from a import b` in one module and `from that import b` in another: "go to definition" would lie."""
    known = {module_name(path): ast.parse(path.read_text()) for path in modules()}
    public = {"roll_ckpt", *PUBLIC, "roll_ckpt.native.extension"}
    wrong = []
    for path in modules():
        for name in imports(path):
            module, _, symbol = name.rpartition(".")
            if name == "roll_ckpt.native._native":
                continue  # the extension, which is no Python file
            if module in known and module not in public and name not in known and symbol not in _defined(known[module]):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {symbol} from {module}")
    assert not wrong


def _defined(tree: ast.Module) -> set[str]:
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def test_examples_benchmarks_and_readme_use_public_modules_alone() -> None:
    root, wrong = PACKAGE.parent, []
    for path in [*root.glob("examples/**/*.py"), *root.glob("benchmarks/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "roll_ckpt":
                names = [f"roll_ckpt.{a.name}" if (PACKAGE / a.name).is_dir() else "roll_ckpt" for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "roll_ckpt.disk":
                names = [f"roll_ckpt.disk.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            ours = [name for name in names if name.split(".")[0] == "roll_ckpt"]
            wrong += [f"{path.relative_to(root)}: {name}" for name in ours if name not in PUBLIC | FOR_DEMONSTRATIONS]
    code = re.findall(
        r"^ *(?:from (roll_ckpt[\w.]*) import|import (roll_ckpt[\w.]*))", _blocks("README.md"), re.MULTILINE
    )
    wrong += [f"README.md: {name}" for pair in code for name in pair if name and name not in PUBLIC]
    assert not wrong


def _blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (PACKAGE.parent / page).read_text(), re.DOTALL))


def test_nothing_of_the_product_imports_the_development_hub() -> None:
    assert not [p for p in modules() for name in imports(p) if name.split(".")[0] in ("roll_ckpt_hub_dev", "tests")]


def test_a_push_runs_in_a_process_of_ours_alone() -> None:
    """It gives huggingface_hub's client time limits for the whole process, which a training process must not notice."""
    importers = {
        module_name(path)
        for path in modules()
        for name in imports(path)
        if name.startswith("roll_ckpt.upload.hub.push.")
    }
    assert importers <= {"roll_ckpt.upload.hub.worker", "roll_ckpt.cli.hub", "roll_ckpt.cli.push"}


HTTP_LIBRARIES = ("httpx", "httpx2", "requests")


@pytest.mark.parametrize(
    ("module", "only_in"),
    [
        *(
            ("roll_ckpt.native._native", "native/extension.py"),
            ("huggingface_hub", "upload/hub"),
            *((library, "none: it depends on the version of huggingface_hub") for library in HTTP_LIBRARIES),
        ),
        *(("deepspeed", "backends/deepspeed"), ("megatron", "backends/megatron")),
    ],
)
def test_one_file_or_folder_alone_imports(module: str, only_in: str) -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(f"{name}.".startswith(f"{module}.") for name in imports(path))
    }
    assert [name for name in importers if name != only_in and not name.startswith(f"{only_in}/")] == []


def test_the_disk_room_alone_changes_the_disk() -> None:
    wrong = []
    for path in modules():
        if room(path) == "disk":
            continue
        for line, receiver, function, call in called(path):
            modes = [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "mode")]
            writes = function == "open" and any(set("wax+") & set(mode) for mode in map(text, modes))
            by_os = receiver == "os" and function in OS_MUTATORS
            by_path = receiver not in {"writes", "os"} and function in PATH_MUTATORS
            if writes or by_os or by_path or (receiver in {"shutil", "tempfile"} and function != "which"):
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
    if module == "cli.main":
        refused += ["huggingface_hub", "numpy", "pydantic", "rich", "yaml"]
    command = [sys.executable, "-c", WITHOUT, f"roll_ckpt.{module}", *refused]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
