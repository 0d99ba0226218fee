"""On a file system without hard links, saves are committed all the same, and whatever kills them leaves the old
checkpoint or the new one.

`no_links.cpp` refuses link(2), in the second form renameat2 with flags as well, for Python and for the extension.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import crash_record
import pytest
import shims
from worlds import environment

HERE = Path(__file__).parent
FORMS = {"links": {}, "links and flags": {"NO_LINKS_FLAGS": "1"}}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shims.build("no_links", tmp_path_factory.mktemp("no_links"))


def run(library: Path, folder: Path, *command: object, also: str = "", **extra: str) -> str:
    told = environment(NO_LINKS_BELOW=str(folder), LD_PRELOAD=f"{also} {library}", **extra)
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=HERE, env=told, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("scenario", "stride"),
    [("first", 5), ("save", 7), ("fallback", 11)]
    + [pytest.param(scenario, 2, marks=pytest.mark.long) for scenario in ("again", "rank", "recovery", "zombies")],
)
def test_a_killed_run_leaves_the_old_checkpoint_or_the_new_one(
    library: Path, folder: Path, form: str, scenario: str, stride: int
) -> None:
    assert int(run(library, folder, "kill_points.py", scenario, folder, stride, **FORMS[form])) > 5


@pytest.mark.parametrize("form", FORMS)
def test_so_does_a_power_failure(library: Path, folder: Path, form: str) -> None:
    recorder = str(crash_record.build(folder))
    asked = ("save:197:0", "abort:133:0")
    said = run(library, folder, "crash_points.py", "sweep", folder, *asked, also=recorder, **FORMS[form])
    assert [line.split(":")[0] for line in said.splitlines()] == ["save", "abort"]


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scenario", ["first", "save", "again", "fallback", "only", "abort", "undo"])
def test_so_does_a_power_failure_at_any_moment(library: Path, folder: Path, form: str, scenario: str) -> None:
    recorder = str(crash_record.build(folder))
    run(library, folder, "crash_points.py", "sweep", folder, f"{scenario}:3:0", also=recorder, **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_two_who_decide_and_one_who_takes_over_agree(library: Path, folder: Path, form: str) -> None:
    said = run(library, folder, "crash_actors.py", "late", folder, 2, "decisive", 90, **FORMS[form])
    assert "Outcome True" in said


SCRIPT = """
import os, sys
from pathlib import Path
from roll_ckpt.disk import writes
folder = Path(sys.argv[1])
for name in ("one", "two"):
    print(writes.link_durable(folder / "record", name.encode(), scratch=folder))
print((folder / "record").read_text(), *sorted(p.name for p in folder.iterdir() if not p.name.endswith(".first")))
"""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP", "ENOSYS", "EMLINK", "EINVAL"])
def test_the_first_one_has_the_name_whatever_link_says(library: Path, tmp_path: Path, form: str, code: str) -> None:
    told = {**FORMS[form], "NO_LINKS_ERRNO": str(getattr(errno, code))}
    assert run(library, tmp_path, "-c", SCRIPT, tmp_path, **told).split() == ["True", "False", "one", "record"]


TRAINING = """
import sys
from pathlib import Path
import torch.distributed as dist
import roll_ckpt.state
from roll_ckpt.config import Settings
dist.init_process_group("gloo")
saver = roll_ckpt.state.StateSaver(Settings(staging={"arena_bytes": "16MiB"}))
import torch
run = Path(sys.argv[1])
for step in (1, 2):
    saver.save({"step": step, "w": torch.full((8,), float(step))}, run / "best", step=step)
assert saver.load(run / "best")["step"] == 2
print(*sorted(p.name for p in run.iterdir()))
"""


@pytest.mark.parametrize("form", FORMS)
def test_a_script_saves_replaces_a_tag_and_loads(library: Path, tmp_path: Path, form: str) -> None:
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    port = str(20000 + os.getpid() % 20000)
    said = run(library, tmp_path, "-c", TRAINING, tmp_path / "run", **FORMS[form], **told, MASTER_PORT=port)
    assert said.split() == ["best", "latest"]
