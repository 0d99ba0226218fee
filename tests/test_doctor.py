"""roll-ckpt doctor: which versions it calls supported, what a file system lacks, and which processes of a command run
through roll_ckpt."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import activated
import pytest
import shims
import torch
from corruption import plain_user
from worlds import ROOT, environment

from roll_ckpt.cli import doctor, installed, judging, main, watching
from roll_ckpt.cli.judging import Verdict
from roll_ckpt.cli.watching import Seen
from roll_ckpt.disk import abilities

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = str(Path(torch.__file__).parent.parent)
EVERYTHING = ["torch", "deepspeed", "megatron-core", "huggingface_hub"]


# --- versions -----------------------------------------------------------------------------------------------


def supported(package: str) -> installed.Supported:
    return next(one for one in installed.SUPPORTED if one.package == package)


def test_the_page_and_the_metadata_say_the_same_versions() -> None:
    page = (ROOT / "docs" / "support.md").read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+) \|", page, re.M)
    assert {(name.lower(), *span) for name, *span in rows} == {
        (one.package.lower(), one.oldest, one.newest) for one in installed.SUPPORTED
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for key in EXTRAS for line in project["optional-dependencies"][key])]
    asked.append(f"Python{project['requires-python']}")
    told = dict(line.split(">=") for line in asked if ">=" in line)
    assert {name: told.get(name) for name in ("Python", *EVERYTHING)} == {
        one.package: one.oldest for one in installed.SUPPORTED if one.package in ("Python", *EVERYTHING)
    }


EXTRAS = ("deepspeed", "megatron", "hub")


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("2.5.1", -1),
        ("2.6", 0),
        ("2.6.0+cpu", 0),
        ("2.14.1", 0),
        ("2.14.2", 1),
        ("2.15.0.dev1", 1),
        ("3", 1),
        ("2", -1),
    ],
)
def test_a_version_is_older_or_newer_than_the_table(version: str, told: int) -> None:
    assert installed.compare(version, installed.Supported("torch", "2.6", "2.14.1")) == told


def test_what_keeps_a_module_from_being_imported_is_told_in_one_line() -> None:
    codes = ["import json", "import no_such_module", "raise ValueError('one\\ntwo')", "import os; os._exit(3)"]
    assert installed.problems_of(codes) == [
        "",
        "ModuleNotFoundError: No module named 'no_such_module'",
        "ValueError: one two",
        "it ended without a word",
    ]


# --- the file system ----------------------------------------------------------------------------------------


def test_a_real_file_system_has_what_it_has_and_nothing_stays_there(tmp_path: Path, folder: Path) -> None:
    for place in (tmp_path, folder):
        lacks = {name for name, problem in abilities.measure(place).items() if problem}
        assert lacks <= {"direct I/O"}, place  # tmpfs had none for long
        assert not list(place.iterdir())
    assert abilities.mount_of(Path("/proc/self")).kind == "proc"


@pytest.mark.parametrize("flags", [{}, {"NO_LINKS_FLAGS": "1"}])
def test_what_a_file_system_lacks_is_told_with_what_we_do_instead(tmp_path: Path, flags: dict[str, str]) -> None:
    library = str(shims.build("no_links", tmp_path))
    told = environment(NO_LINKS_BELOW=str(tmp_path), LD_PRELOAD=library, **flags)
    show = (
        "from pathlib import Path; from roll_ckpt.cli import doctor; print(doctor._file_system(Path({}), False, {{}}))"
    )
    command = [sys.executable, "-c", show.format(repr(str(tmp_path)))]
    done = subprocess.run(command, env=told, capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    assert "lacks hard links (Operation not permitted): what is decided is named by a rename that" in said
    assert ("lacks exchange of two names" in said) == bool(flags)
    assert said.endswith("[]"), "it is as safe, so it is no problem"
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_directory_that_cannot_be_written_to_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    with plain_user():
        problems = doctor._file_system(tmp_path / "not there", False, {})
    assert problems == [f"nothing can be written in {tmp_path}: Permission denied"]
    assert "parent of" in capsys.readouterr().out


# --- a command ----------------------------------------------------------------------------------------------


def watch(*words: str, limit_s: float | None = 120.0) -> watching.Watched:
    return watching.watch(words, limit_s)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[watching.Watched, list[Verdict]]:
    """A command that starts one process of every kind, all at once, and the verdicts on them."""
    folder = tmp_path_factory.mktemp("mixed")
    python = shlex.quote(sys.executable)
    bare = f"env PYTHONPATH=$ROLL_CKPT_DOCTOR:{PACKAGES} {shlex.quote(os.path.realpath(sys.executable))}"
    stock = "import deepspeed.runtime.engine"
    waits = 'import torch, time, os\nwhile not os.path.exists("seen"): time.sleep(0.1)'
    job = (
        f"cd {folder}\n"  # or else `-c` finds roll_ckpt in the directory where it is
        f"{python} -c '{stock}' stock & a=$!\n"
        f"ROLL_CKPT=1 RANK=3 {python} -c '{stock}' installed & b=$!\n"
        f"ROLL_CKPT=1 {bare} -c '{stock}' other & c=$!\n"
        f"{python} -I -c '{waits}' deaf &\n"
        f"env -i HOME=$HOME {python} -c '{waits}' cleaned &\n"
        f"{python} -c 'import importlib.util; importlib.util.find_spec(\"deepspeed\")' asks &\n"
        "wait $a $b $c\nsleep 2\ntouch seen\nwait\nexit 5\n"
    )
    with mock.patch.dict(os.environ, activated.environment(folder / "site"), clear=True):
        watched = watching.watch(["sh", "-c", job], 200)
    return watched, judging.judge(watched.processes)


def of(mixed: tuple[watching.Watched, list[Verdict]], words: str) -> Verdict:
    found = [verdict for verdict in mixed[1] if words in verdict.reason]
    assert len(found) == 1, (words, mixed[1])
    return found[0]


def test_a_command_with_processes_past_us_is_told_so(mixed: tuple[watching.Watched, list[Verdict]]) -> None:
    watched, verdicts = mixed
    assert (watched.code, watched.stopped) == (5, "")
    assert not judging.all_through_us(verdicts)
    assert len(verdicts) == 5, "one that only asks for a framework is of no concern"


def test_a_stock_process_is_told_why(mixed: tuple[watching.Watched, list[Verdict]]) -> None:
    stock = of(mixed, "ROLL_CKPT is not set there")
    assert stock.state == judging.NO
    assert "set ROLL_CKPT=1" in stock.advice


def test_a_process_that_builds_no_engine_is_no_failure(mixed: tuple[watching.Watched, list[Verdict]]) -> None:
    on = of(mixed, "it built no engine")
    assert (on.state, on.ranks) == (judging.IDLE, (3,))


def test_an_interpreter_without_us_is_named(mixed: tuple[watching.Watched, list[Verdict]]) -> None:
    other = of(mixed, "its interpreter has no roll_ckpt")
    assert (other.state, other.interpreter) == (judging.NO, os.path.realpath(sys.executable))
    assert f"{other.interpreter} -m pip install" in other.advice


def test_processes_that_cannot_be_asked_are_found_and_told_why(
    mixed: tuple[watching.Watched, list[Verdict]],
) -> None:
    assert of(mixed, "started with -I").state == judging.NO
    assert of(mixed, "an environment of its own").state == judging.NO


def test_the_command_tells_all_of_it_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "roll_ckpt", "doctor", "--json", str(tmp_path), "--", "echo", "its own words"]
    told = activated.environment(tmp_path / "site", ROLL_CKPT='{"asynk_save": true}')
    done = subprocess.run(command, env=told, cwd=ROOT, capture_output=True, text=True, timeout=300)
    document = json.loads(done.stdout)
    packages = {package["name"]: package["problem"] for package in document["packages"]}
    assert {name: packages[name] for name in ("roll_ckpt", *EVERYTHING)} == dict.fromkeys(
        ("roll_ckpt", *EVERYTHING), ""
    )
    assert document["activation"]["pth"] and document["file_system"]["lacks"].keys() <= {"direct I/O"}
    assert ["asynk_save" in problem for problem in document["problems"]] == [True]
    assert (done.returncode, document["command"]["exit_code"]) == (1, 0)
    assert "its own words" in done.stderr


def test_a_sitecustomize_of_others_still_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.greeting = 'theirs'\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    script = "import sys, sitecustomize; sys.exit(7 if sys.greeting == 'theirs' else 1)"
    watched = watch(sys.executable, "-c", script)
    assert watched.code == 7
    assert [event["event"] for seen in watched.processes.values() for event in seen.told] == ["starts"]


def test_a_command_that_does_not_end_is_stopped_with_all_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "GRACE_S", 1.0)
    began = time.monotonic()
    job = "trap '' TERM; setsid sleep 100 & env -i sh -c \"trap '' TERM; sleep 99; true\" & wait; wait"
    watched = watch("sh", "-c", job, limit_s=0.6)
    assert time.monotonic() - began < 20
    assert watched.code == -9 and "--seconds" in watched.stopped
    assert len(watched.processes) >= 4 and not watched.left


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main.main(["doctor", str(tmp_path), "--"]) == 2
    assert main.main(["doctor", str(tmp_path), "--seconds", "3"]) == 2
    assert main.main(["doctor", str(tmp_path), "--seconds", "0", "--", "true"]) == 2
    assert capsys.readouterr().err.count("give a command after --") == 3


# --- the verdicts -------------------------------------------------------------------------------------------


def told(event: str, **facts: Any) -> dict[str, Any]:
    common = {"framework": "deepspeed", "executable": "/py", "rank": None, "has_roll_ckpt": True, "variable": ""}
    return {"event": event, **common, **facts}


def process(pid: int, parent: int, *events: dict[str, Any], command: str = "python train.py") -> Seen:
    return Seen(pid, "0", parent, command.split(), "/py", True, False, True, 0.0, list(events))


def states(*processes: Seen) -> list[str]:
    return [verdict.state for verdict in judging.judge({seen.pid: seen for seen in processes})]


def test_a_launcher_is_not_taken_for_a_training_process() -> None:
    launcher = process(1, 0, told("imports"), command="python -m deepspeed.launcher.runner train.py")
    rank = process(2, 1, told("imports"), told("installed"), told("engine", id=1, ours=True))
    assert states(launcher, rank) == [judging.LAUNCHER, judging.YES]
    assert judging.all_through_us(judging.judge({1: launcher, 2: rank}))
    assert states(launcher) == [judging.NO]


def test_one_engine_of_several_past_us_is_enough() -> None:
    past = told("engine", id=2, ours=False, why="because", advice="do this")
    both = process(1, 0, told("imports"), told("installed"), told("engine", id=1, ours=True), past)
    assert [(v.state, v.reason) for v in judging.judge({1: both})] == [
        (judging.NO, "1 of 2 engines saves through stock DeepSpeed: because")
    ]
    both.told.append(told("engine", id=2, ours=True))  # attached after it was built
    assert states(both) == [judging.YES]


def test_nothing_that_trains_is_not_all_through_us() -> None:
    assert not judging.all_through_us([])
    assert not judging.all_through_us(judging.judge({1: process(1, 0, told("imports"), told("installed"))}))


def test_ranks_that_are_alike_are_told_together() -> None:
    ranks = [process(n, 0, told("imports", rank=n), told("engine", id=1, ours=True, rank=n)) for n in (1, 2, 3, 5)]
    verdicts = judging.judge({seen.pid: seen for seen in ranks})
    assert [doctor._numbers(verdict.ranks) for verdict in verdicts] == ["1-3, 5"]
    assert [verdict.chain for verdict in verdicts] == ["train.py"]


def test_a_forked_worker_is_judged_with_its_parent() -> None:
    deaf = process(1, 0, command="python -Ic pass")
    assert states(deaf, process(2, 1, command="python -Ic pass")) == [judging.NO]
