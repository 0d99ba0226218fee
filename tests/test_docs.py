"""The documentation is true where a machine can tell: links, settings, errors, file names, drawings, code."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from roll_ckpt import errors

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "benchmarks" / "RESULTS.md"])

README_LINES = 150
README_BLOCK_LINES = 15

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.M)


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@cache
def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(page)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        twins = sum(known == anchor or known.startswith(f"{anchor}-") for known in found)
        found.add(f"{anchor}-{twins}" if anchor in found else anchor)
    return found


@cache
def links() -> list[tuple[Path, str]]:
    """Every link that stays in the repository, with the page it stands on."""
    return [(page, to) for page in PAGES for to in _LINK.findall(prose(page)) if not re.match(r"[a-z]+:", to)]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return _FENCE.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("page", "target"), links(), ids=lambda value: getattr(value, "stem", value))
def test_a_relative_link_leads_to_a_file_and_to_a_heading(page: Path, target: str) -> None:
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists()
    assert not anchor or anchor in anchors(there)


def test_every_page_of_docs_is_reached_from_the_readme() -> None:
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            pending += [(page.parent / target.partition("#")[0]).resolve() for of, target in links() if of == page]
    assert set(DOCS.glob("*.md")) <= reached


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES
    assert all(len(text.splitlines()) <= README_BLOCK_LINES for _, text in blocks(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_the_documentation_compiles(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")


def test_the_settings_page_is_what_the_schema_says() -> None:
    told = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert told == script("list_settings").settings_page(), "run: python docs/list_settings.py"


@pytest.mark.parametrize("name", ["save", "performance"])
def test_a_drawing_is_what_its_script_draws(name: str) -> None:
    drawn = (DOCS / f"{name}.svg").read_text(encoding="utf-8")
    assert drawn == script(f"draw_{name}").draw(), f"run: python docs/draw_{name}.py"


def test_every_error_has_its_section_in_troubleshooting() -> None:
    kinds = {
        name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.RollCkptError)
    }
    sections = set(re.findall(r"^### (\w+)$", prose(DOCS / "troubleshooting.md"), re.M))
    assert sections == kinds


def test_a_section_of_an_error_names_the_builtin_that_it_also_is() -> None:
    text = prose(DOCS / "troubleshooting.md")
    for name, first in re.findall(r"^### (\w+)\n\n(.*)$", text, re.M):
        bases = {base.__name__ for base in getattr(errors, name).__bases__} - {"RollCkptError", "Exception"}
        assert all(f"`{base}`" in first for base in bases)


def test_files_that_the_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"[\w./]*\w\.(?:py|cpp)\b", text) + re.findall(r"(?<![\w<>./])\w+(?:/\w+)*/(?![\w<])", text)
    places = (ROOT, ROOT / "roll_ckpt", ROOT / "csrc")
    assert not [name for name in named if not any((place / name).exists() for place in places)]


def test_the_rooms_of_the_architecture_are_those_of_the_package() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / "roll_ckpt").glob("*/__init__.py")}
    assert rooms == set(re.findall(r"^\| `(\w+)/` \|", text, re.M))


def test_tests_that_the_guarantees_name_exist() -> None:
    files = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    there = {name for text in files.values() for name in [*files, *re.findall(r"def (test_\w+)", text)]}
    named = re.findall(r"`(test_\w+(?:\.py|…)?|…_\w+)`", prose(DOCS / "guarantees.md"))
    assert len(named) > 100
    for name in named:
        pattern = re.escape(name).replace("…", r"\w+")
        assert any(re.fullmatch(pattern, known) for known in there), name


def fragments(page: str) -> Iterator[str]:
    """What a page quotes of messages, in the first column of its tables headed "The message says"."""
    for table in re.findall(
        r"^\| The message says .*\n\|[-| ]+\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE
    ):
        for row in table.splitlines():
            for quoted in re.findall(r"`([^`]+)`", row.split("|")[1]):
                yield from (part.strip() for part in quoted.split("…"))


@pytest.mark.parametrize("page", ["docs/hub.md", "docs/troubleshooting.md"])
def test_messages_that_a_page_quotes_are_those_of_the_code(page: str) -> None:
    source = "".join(path.read_text() for path in (ROOT / "roll_ckpt").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    quoted = [part for part in fragments(page) if len(part) > 6 and not re.search(r"[0-9]", part)]
    assert quoted and not [part for part in quoted if part not in joined]
