"""The house in figures: how long files, functions and classes are, and how many exceptions are swallowed.

python tests/metrics.py        prints a table; exit code 1 and a list of offenders where a bound is broken

It measures roll_ckpt/ and needs the standard library only. tests/test_metrics.py holds the tree to the same bounds.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import ceil
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent

FILE_LINES = 400
FUNCTION_P95_LINES = 30
CLASS_LINES = 250
ROOT_MODULES = 10
SWALLOWS_PER_1000_LINES = 1.0
COMPLEXITY = 10  # reported only

LONG_FILES: dict[str, str] = {}
"""The files that may have more than FILE_LINES lines, as paths from the root of the repository, and why."""

_LOGGERS = {"log", "logger", "logging", "_log", "_logger"}
_LOG_METHODS = {"debug", "info", "warning", "error", "exception", "critical", "log"}
_BRANCHES = (
    *(ast.If, ast.IfExp, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Assert),
    *(ast.ExceptHandler, ast.comprehension, ast.match_case),
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, ast.Lambda)


@dataclass(frozen=True)
class Found:
    """A function, class or swallowed exception, and where it stands."""

    path: str
    line: int
    name: str
    lines: int = 0
    complexity: int = 0


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the root of the repository."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def functions(self) -> list[Found]:
        """All functions and methods, nested ones too; a function's lines include its docstring, not its decorators."""
        return [
            Found(self.path, node.lineno, name, _lines(node), complexity(node))
            for name, node in _definitions(self.tree)
            if isinstance(node, _FUNCTIONS)
        ]

    def classes(self) -> list[Found]:
        return [
            Found(self.path, node.lineno, name, _lines(node))
            for name, node in _definitions(self.tree)
            if isinstance(node, ast.ClassDef)
        ]

    def swallows(self) -> list[Found]:
        """See the function `swallows`."""
        return [Found(self.path, line, what) for line, what in swallows(self.tree)]


@dataclass(frozen=True)
class Package:
    """The files of roll_ckpt/."""

    root: Path
    sources: list[Source]

    @classmethod
    def read(cls, root: Path = ROOT) -> Package:
        """Read roll_ckpt/ below `root`."""
        paths = sorted(root.joinpath("roll_ckpt").rglob("*.py"))
        return cls(root, [Source(path.relative_to(root).as_posix(), path.read_text("utf-8")) for path in paths])

    @property
    def lines(self) -> int:
        return sum(source.lines for source in self.sources)

    @cached_property
    def functions(self) -> list[Found]:
        return [found for source in self.sources for found in source.functions()]

    @cached_property
    def classes(self) -> list[Found]:
        return [found for source in self.sources for found in source.classes()]

    @cached_property
    def swallows(self) -> list[Found]:
        return [found for source in self.sources for found in source.swallows()]

    @property
    def root_modules(self) -> list[str]:
        """The modules right in roll_ckpt/, `__init__` and `__main__` among them."""
        return [source.path for source in self.sources if source.path.count("/") == 1]

    @property
    def swallows_per_1000_lines(self) -> float:
        return 1000 * len(self.swallows) / max(self.lines, 1)


def _lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Every function and class below `node`, with its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (*_FUNCTIONS, ast.ClassDef)):
            yield f"{prefix}{child.name}", child
            yield from _definitions(child, f"{prefix}{child.name}.")
        else:
            yield from _definitions(child, prefix)


def percentile(values: list[int], percent: int) -> int:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank); 0 if there are none."""
    return sorted(values)[ceil(percent * len(values) / 100) - 1] if values else 0


def complexity(function: ast.AST) -> int:
    """Cyclomatic complexity: 1 and the branches of a function, without those of functions and classes in it."""
    total = 1
    for node in _own_nodes(function):
        total += isinstance(node, _BRANCHES)
        if isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        elif isinstance(node, ast.comprehension):
            total += len(node.ifs)
    return total


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` but those inside functions, lambdas and classes."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _SCOPES):
            yield child
            yield from _own_nodes(child)


# --- swallowed exceptions -----------------------------------------------------------------------------------


def swallows(tree: ast.AST) -> list[tuple[int, str]]:
    """Where exceptions are swallowed: (line, what), sorted.

    One is each `except` that neither raises, nor logs, nor uses the exception that it caught, and each mention of
    `contextlib.suppress`. A function or context manager named for what it swallows, such as `missing_ok()`, counts
    at its definition only, for that is where its `except` or `suppress` stands; its uses are free.
    """
    suppressing = _names_of_suppress(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and not _is_answered(node):
            found.append((node.lineno, f"except {ast.unparse(node.type)}" if node.type else "except"))
        elif isinstance(node, ast.Name | ast.Attribute) and _dotted(node) in suppressing:
            found.append((node.lineno, "suppress"))
    return sorted(found)


def _names_of_suppress(tree: ast.AST) -> set[str]:
    """What contextlib.suppress is called in this file."""
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "contextlib":
            called |= {name.asname or name.name for name in node.names if name.name == "suppress"}
        elif isinstance(node, ast.Import):
            called |= {f"{name.asname or name.name}.suppress" for name in node.names if name.name == "contextlib"}
    return called


def _is_answered(handler: ast.ExceptHandler) -> bool:
    """Whether something is made of the exception: raised on, logged, or used by its name."""
    if any(isinstance(node, ast.Raise) or _is_log(node) for node in _own_nodes(handler)):
        return True
    return any(isinstance(node, ast.Name) and node.id == handler.name for node in ast.walk(handler))


def _is_log(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    receiver, _, method = _dotted(node.func).rpartition(".")
    return (receiver, method) == ("warnings", "warn") or (
        method in _LOG_METHODS and receiver.rpartition(".")[2] in _LOGGERS
    )


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of names and attributes, "" of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (receiver := _dotted(node.value)):
        return f"{receiver}.{node.attr}"
    return ""


# --- bounds -------------------------------------------------------------------------------------------------


def long_files(package: Package) -> list[str]:
    """Files over the bound without a reason in LONG_FILES, and reasons that are not needed any more."""
    too_long = {source.path: source.lines for source in package.sources if source.lines > FILE_LINES}
    offenders = [f"{path}:1: {lines} lines" for path, lines in too_long.items() if path not in LONG_FILES]
    unneeded = [f"{path}:1: named in LONG_FILES, but not that long" for path in LONG_FILES if path not in too_long]
    return offenders + unneeded


def long_functions(package: Package) -> list[str]:
    """The functions over the bound, if more than 5 % are."""
    if percentile([found.lines for found in package.functions], 95) <= FUNCTION_P95_LINES:
        return []
    return _longest_first([found for found in package.functions if found.lines > FUNCTION_P95_LINES])


def long_classes(package: Package) -> list[str]:
    return _longest_first([found for found in package.classes if found.lines > CLASS_LINES])


def root_modules(package: Package) -> list[str]:
    """All modules at the root of roll_ckpt/, if there are too many."""
    found = package.root_modules
    return [f"{path}:1" for path in found] if len(found) > ROOT_MODULES else []


def swallowed(package: Package) -> list[str]:
    """All swallowed exceptions, if there are too many."""
    if package.swallows_per_1000_lines <= SWALLOWS_PER_1000_LINES:
        return []
    return [f"{found.path}:{found.line}: {found.name}" for found in package.swallows]


def _longest_first(found: list[Found]) -> list[str]:
    ordered = sorted(found, key=lambda one: (-one.lines, one.path, one.line))
    return [f"{one.path}:{one.line}: {one.name}: {one.lines} lines" for one in ordered]


BOUNDS: dict[str, Callable[[Package], list[str]]] = {
    f"no file over {FILE_LINES} lines without a reason in LONG_FILES": long_files,
    f"function lines, 95th percentile at most {FUNCTION_P95_LINES}": long_functions,
    f"no class over {CLASS_LINES} lines": long_classes,
    f"at most {ROOT_MODULES} modules at the root of roll_ckpt/": root_modules,
    f"at most {SWALLOWS_PER_1000_LINES:g} swallowed exceptions per 1000 lines": swallowed,
}
"""Each bound in words, and the function that lists what breaks it, as file:line."""


# --- the table ----------------------------------------------------------------------------------------------


def table(package: Package) -> list[tuple[str, str, str]]:
    """(what, figure, bound); the bound is "" where a figure is reported only."""
    files = [source.lines for source in package.sources]
    functions = [found.lines for found in package.functions]
    long = [lines for lines in files if lines > FILE_LINES]
    complex_ones = [found for found in package.functions if found.complexity > COMPLEXITY]
    handlers = [found for found in package.swallows if found.name != "suppress"]
    rate = package.swallows_per_1000_lines
    lengths = f"{median(functions):.0f}, {percentile(functions, 95)}, {max(functions)}"
    return [
        ("files, lines", f"{len(files)}, {package.lines:,}", ""),
        ("file lines: median, max", f"{median(files):.0f}, {max(files)}", ""),
        (f"files over {FILE_LINES} lines", f"{len(long)}", f"{len(LONG_FILES)}, each with a reason"),
        ("functions", f"{len(functions):,}", ""),
        ("function lines: median, p95, max", lengths, f"p95 {FUNCTION_P95_LINES}"),
        (f"classes over {CLASS_LINES} lines", f"{len(long_classes(package))}", "0"),
        ("modules at the root of roll_ckpt/", f"{len(package.root_modules)}", f"{ROOT_MODULES}"),
        ("swallowed: except, suppress", f"{len(handlers)}, {len(package.swallows) - len(handlers)}", ""),
        ("swallowed per 1000 lines", f"{rate:.2f}", f"{SWALLOWS_PER_1000_LINES:g}"),
        (f"functions of complexity over {COMPLEXITY}", f"{len(complex_ones)}", ""),
        ("C++ lines (csrc/)", f"{_count_lines(package.root / 'csrc', '.cpp', '.h', '.cu'):,}", ""),
        ("test lines (tests/)", f"{_count_lines(package.root / 'tests', '.py'):,}", ""),
    ]


def _count_lines(folder: Path, *suffixes: str) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in folder.rglob("*") if path.suffix in suffixes)


def main() -> int:
    """Print the table and what breaks a bound; the exit code."""
    package = Package.read()
    rows = [("", "here", "bound"), *table(package)]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for what, here, bound in rows:
        print(f"{what:<{first}}  {here:>{second}}  {bound}".rstrip())
    broken = {bound: offenders for bound, list_offenders in BOUNDS.items() if (offenders := list_offenders(package))}
    for bound, offenders in broken.items():
        print(f"\nBroken: {bound}", *offenders, sep="\n  ")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
