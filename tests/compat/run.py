"""Builds the environment of each row of rows.yaml, runs the core tests there and fills the table in docs/support.md.

    make compat                                   every row, one after the other: some hours
    make compat ROWS="newest oldest"              these
    make compat ROWS=short                        those that need no other torch than that of .venv
    make compat ROWS=oldest ARGS="--keep"         its environment stays under build/compat/oldest/
    make compat ROWS=oldest ARGS="--keep -- -x"   arguments for pytest after --

A row's environment takes up to 8 GB on disk where it has a torch of its own, and is removed after the row.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from datetime import date
from typing import Any

import environment
import table
from environment import CannotBuild, Environment, NoPython
from rows import Row, chosen

LIMIT_S = 3600


def core(made: Environment, arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Run the core tests in the row's environment; what became of each part. Those that fail run a second time, alone:
    on a busy machine a limit of time may end a sound test.

    Raises:
        CannotBuild: they could not be run at all.
    """
    parts = _pytest(made, "first", arguments)
    if any(told["failed"] for told in parts.values()):
        parts = table.after_second_run(parts, _pytest(made, "second", ["--last-failed", *arguments]))
    return parts


def _pytest(made: Environment, which: str, arguments: list[str]) -> dict[str, dict[str, Any]]:
    report = made.directory / f"{which}.xml"
    command = [made.python, "-m", "pytest", "-m", "core", "-q", "--durations=15", f"--junitxml={report}", *arguments]
    with open(made.directory.with_suffix(".log"), "a", encoding="utf-8") as log:
        print(f"== core tests, {which} run:", *command, file=log, flush=True)
        try:
            subprocess.run(
                command, cwd=made.tree, env=made.variables(), stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT_S
            )
        except subprocess.TimeoutExpired:
            raise CannotBuild(f"the core tests did not end within {LIMIT_S} s; see {log.name}") from None
    if not report.exists():
        raise CannotBuild(f"the core tests did not start; see {log.name}")
    return table.of_report(report)


def try_row(row: Row, arguments: list[str]) -> table.Result | None:
    """What the row came to; None where this machine has no such Python."""
    started = time.monotonic()
    today = date.today().isoformat()
    try:
        made = environment.build(row)
        built = time.monotonic()
        print(f"  built in {built - started:.0f} s", flush=True)
        parts = core(made, arguments)
    except NoPython as problem:
        print(f"  not run: {problem}. Its entry in the table stays as it is", flush=True)
        return None
    except CannotBuild as problem:
        return {"date": today, "failed": str(problem).partition("; ")[0]}
    return {"date": today, "seconds": round(time.monotonic() - built), "parts": parts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="all", help="names of rows, `short` or `all` (default)")
    parser.add_argument("--keep", action="store_true", help="leave the environments on disk")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --; then nothing is noted in the table")
    told = parser.parse_args()
    fine = True
    rows = chosen(told.rows.split())
    for at, row in enumerate(rows):
        print(f"{row.name}: Python {row.python}, " + ", ".join(map(" ".join, row.versions.items())), flush=True)
        result = try_row(row, told.pytest)
        if result is not None:
            print(*(f"  {table.cell(row, part, result)}" for part in table.PARTS), sep="\n", flush=True)
            print(f"  {result.get('failed') or '{} s'.format(result['seconds'])}", flush=True)
            fine &= table.passed(row, result)
            if not told.pytest:
                table.store(row.name, result)
        if not told.keep:
            environment.clean(row, rows[at + 1 :])
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
