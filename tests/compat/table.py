"""What the rows came to, and the table of it in docs/support.md.

python tests/compat/table.py        write the table anew from rows.yaml and results.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rows import HERE, PARTS, ROOT, Row, read

RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- make compat: begin -->\n", "<!-- make compat: end -->\n"
TITLES = {"python": "Python", "deepspeed": "DeepSpeed", "megatron-core": "Megatron-core"}
LONGEST = 160

Result = dict[str, Any]
"""{"date", "seconds", "parts": {part: {"passed", "failed", "skipped", "reason"}}}, or {"date", "failed": why}."""


def of_report(report: Path) -> dict[str, dict[str, Any]]:
    """What pytest's report in JUnit's form says of each part."""
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        part = next((p.get("value", "") for p in case.iter("property") if p.get("name") == "core"), "")
        told = found.setdefault(part, {"passed": 0, "failed": 0, "skipped": 0, "reason": ""})
        problem = next((at for at in case if at.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        if problem is not None:
            told["failed"] += 1
            told["reason"] = told["reason"] or f"{case.get('name')}: {_first(problem)}"
        elif skipped is not None:
            told["skipped"] += 1
            told["reason"] = told["reason"] or f"{case.get('name')}: {skipped.get('message', '')}"
        else:
            told["passed"] += 1
    return found


def after_second_run(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What became of each part, if those that failed in the first run had a second one."""
    nothing = {"passed": 0, "failed": 0, "reason": ""}
    return {
        part: {**told, "passed": told["passed"] + again["passed"], "failed": again["failed"], "reason": again["reason"]}
        if told["failed"]
        else told
        for part, told, again in ((part, told, second.get(part, nothing)) for part, told in first.items())
    }


def _first(problem: ElementTree.Element) -> str:
    """The line that names the error: of a rank's traceback the last one, else the message."""
    lines = [line.strip() for line in (problem.text or "").partition("--- log")[0].splitlines()]
    errors = [line.removeprefix("E").strip() for line in lines if "Error: " in line and not line.startswith("File")]
    told = errors[-1] if errors else problem.get("message", "")
    return " ".join(told.split())[:LONGEST]


def load() -> dict[str, Result]:
    told: dict[str, Result] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    return told


def store(name: str, result: Result) -> None:
    """Note what a row came to, and write the table anew."""
    results = {**load(), name: result}
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    write()


def passed(row: Row, result: Result) -> bool:
    """Whether every part ran and passed, or failed for a reason that rows.yaml names."""
    return "failed" not in result and all(
        part in row.reasons or (told.get("passed", 0) > 0 and not told["failed"])
        for part, told in ((part, result["parts"].get(part, {})) for part in PARTS)
    )


def cell(row: Row, part: str, result: Result | None) -> str:
    version = row.python if part == "python" else row.versions[part]
    if result is None:
        return f"{version}: not run yet"
    if "failed" in result:
        return f"{version}: not run, see the last column"
    told = result["parts"].get(part)
    if told and told["passed"] and not told["failed"]:
        return f"{version} ✓"
    if part in row.reasons:
        return f"{version}: {row.reasons[part]}"
    if not told:
        return f"{version}: no test ran"
    what = f"{told['failed']} of {told['failed'] + told['passed']} failed" if told["failed"] else "skipped"
    return f"{version}: {what}: {_plain(told['reason'])}"


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "&lt;").replace(">", "&gt;").replace("[", "(").replace("]", ")")


def render(rows: Mapping[str, Row], results: Mapping[str, Result]) -> str:
    titles = ["Row", *(TITLES.get(part, part) for part in PARTS), "Ran"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in rows.values():
        result = results.get(row.name)
        ran = "never" if result is None else result["date"]
        if result and "failed" in result:
            ran += f": {_plain(result['failed'])}"
        cells = [f"`{row.name}`: {row.why}", *(cell(row, part, result) for part in PARTS), ran]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def page(text: str) -> str:
    """docs/support.md with the table of today in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{render(read(), load())}\n{END}{after}"


def write() -> None:
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
