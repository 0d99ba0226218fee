"""The table of versions in docs/support.md: it says what ran, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
sys.path.append(str(HERE / "compat"))

import rows  # noqa: E402
import table  # noqa: E402

CASES = """
import pytest

@pytest.mark.core("python")
@pytest.mark.parametrize("at", range(2))
def test_fine(at):
    pass

@pytest.mark.core("torch")
def test_fine_too():
    pass

@pytest.mark.core("torch")
def test_refused():
    raise RuntimeError("torch 1.0 has no | of [that]")

@pytest.mark.core("deepspeed")
def test_skipped():
    pytest.skip("this CPU has no fp16")

@pytest.mark.core("transformers")
@pytest.mark.long
def test_long_and_core():
    pass

@pytest.mark.long
def test_long_alone():
    raise AssertionError
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a core suite in miniature says, run by pytest with our conftest."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-m", "core", "--junitxml=report.xml", "."]
    environment = {"PYTHONPATH": f"{HERE}:{HERE.parent}", "PATH": "/usr/bin:/bin"}
    subprocess.run(command, cwd=folder, env=environment, capture_output=True)
    return table.of_report(folder / "report.xml")


def row(**reasons: str) -> rows.Row:
    return rows.Row("some", "a host", "3.11", dict.fromkeys(rows.PACKAGES, "1.0"), reasons=reasons)


def test_each_cell_says_what_became_of_its_tests(parts: dict[str, dict[str, Any]]) -> None:
    result = {"date": "2026-01-02", "seconds": 3, "parts": parts}
    cells = {part: table.cell(row(), part, result) for part in rows.PARTS}
    assert cells["python"] == "3.11 ✓"
    assert cells["torch"] == "1.0: 1 of 2 failed: test_refused: RuntimeError: torch 1.0 has no / of (that)"
    assert cells["deepspeed"].startswith("1.0: skipped: test_skipped:") and "fp16" in cells["deepspeed"]
    assert cells["transformers"] == "1.0 ✓"
    assert cells["megatron-core"] == "1.0: no test ran"


def test_a_row_is_fine_only_if_every_part_passed_or_its_reason_is_known(parts: dict[str, dict[str, Any]]) -> None:
    result = {"date": "2026-01-02", "seconds": 3, "parts": parts}
    reasons = dict.fromkeys(("torch", "deepspeed", "megatron-core", "huggingface_hub"), "its maker says no")
    assert not table.passed(row(), result)
    assert table.passed(row(**reasons), result)
    assert table.cell(row(**reasons), "torch", result) == "1.0: its maker says no"
    assert not table.passed(row(**reasons), {"date": "2026-01-02", "failed": "torch 1.0 failed: no wheel"})


def test_only_what_failed_twice_has_failed(parts: dict[str, dict[str, Any]]) -> None:
    fine = {"torch": {"passed": 1, "failed": 0, "skipped": 0, "reason": ""}}
    assert table.after_second_run(parts, fine)["torch"] == {"passed": 2, "failed": 0, "skipped": 0, "reason": ""}
    assert table.after_second_run(parts, {"torch": {**parts["torch"], "passed": 0}})["torch"] == parts["torch"]
    assert table.after_second_run(parts, fine)["python"] == parts["python"]


def test_a_row_that_never_ran_is_said_to_be_so() -> None:
    told = table.render({"some": row()}, {})
    assert told.count("not run yet") == len(rows.PARTS) and told.rstrip().endswith("never |")


def test_the_page_holds_the_table_of_what_is_noted() -> None:
    text = table.PAGE.read_text(encoding="utf-8")
    assert table.page(text) == text, "run: python tests/compat/table.py"


def test_rows_are_chosen_by_name_by_group_or_all() -> None:
    every = [row.name for row in rows.chosen([])]
    assert [row.name for row in rows.chosen(["all"])] == every == list(rows.read())
    assert [row.name for row in rows.chosen(["oldest", "oldest"])] == ["oldest"]
    assert all(row.short and row.versions["torch"] == "2.13.0" for row in rows.chosen(["short"]))
    with pytest.raises(SystemExit, match="no such row: eldest"):
        rows.chosen(["eldest"])


RANGES = {"deepspeed": "deepspeed", "megatron-core": "megatron", "huggingface_hub": "hub"}


@pytest.mark.parametrize("package", ["torch", *RANGES])
def test_the_range_in_the_metadata_begins_where_the_rows_do(package: str) -> None:
    """A row outside of it has a reason."""
    project = tomllib.loads((rows.ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    told = extras[RANGES[package]] if package in RANGES else project["dependencies"]
    (asked,) = (requirement for requirement in map(Requirement, told) if requirement.name == package)
    tried = [Version(row.versions[package]) for row in rows.read().values() if package not in row.reasons]
    assert all(asked.specifier.contains(version) for version in tried)
    (bound,) = asked.specifier
    assert bound.operator == ">=" and min(tried).release[:2] == Version(bound.version).release[:2]


def test_a_python_that_is_not_here_is_told() -> None:
    environment: ModuleType = __import__("environment")
    with pytest.raises(environment.NoPython, match=r"python3\.99 is neither on PATH nor under"):
        environment.find_python("3.99")
