from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import runs
from corruption import plain_user

from roll_ckpt import names
from roll_ckpt.cli import main, printing
from roll_ckpt.transaction import epochs, verification
from roll_ckpt.upload import file_system

HERE = Path(__file__).parent
CRASHED = """
epoch = runs.claim(out)
attempt = attempts.begin(epoch, "checkpoint-3", step=3, expected=runs.CLUSTERS)
runs.other_ranks(attempt, "new", runs.RANKS[:{votes}])
"""


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own, without torch, so that it may fork."""
    head = (
        "import sys, runs; from pathlib import Path; "
        "from roll_ckpt.transaction import attempts; out = Path(sys.argv[1])"
    )
    return subprocess.Popen(
        [sys.executable, "-c", f"{head}\n{script}", *map(str, arguments)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == 0


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has saved steps 1 and 2 and has ended."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    finish(python("runs.history(out, [1, 2])", directory))
    return directory


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


@pytest.fixture
def live(run: Path) -> Iterator[Path]:
    """The run, started again and writing step 3."""
    script = CRASHED.format(votes=1) + "print('ready', flush=True); sys.stdin.read()"
    process = python(script, run)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield run
    finish(process)


def roll_ckpt(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it."""
    command = [sys.executable, "-m", "roll_ckpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)


def answer(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json, in this process."""
    assert main.main([*map(str, arguments), "--json"]) == code
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def is_listed(path: str) -> bool:
    """Whether the manifest has a receipt for this file; it knows votes by their digests, and not itself."""
    return path == names.EXPECTED or not path.startswith((f"{names.VOTES}/", names.MANIFEST, names.DECISION))


def test_ls_has_one_row_for_each_checkpoint_and_marks_latest(run: Path) -> None:
    done = roll_ckpt("ls", run)
    assert (done.returncode, done.stderr) == (0, "")
    head, first, second, *_ = done.stdout.splitlines()
    assert head.split() == ["NAME", "STEP", "COMMITTED", "AGE", "CLUSTERS", "(RANKS)", "FILES", "SIZE"]
    name, step, day, minute, *rest = first.split()
    assert (name, step) == ("checkpoint-1", "1")
    committed_at = datetime.fromtimestamp((run / "checkpoint-1" / names.MANIFEST).stat().st_mtime)
    assert f"{day} {minute}" == f"{committed_at:%Y-%m-%d %H:%M}"
    assert " min " in first and rest[-7:-3] == ["actor", "(2),", "critic", "(2)"]
    assert second.split()[:3] == ["*", "checkpoint-2", "2"]


@pytest.mark.parametrize(
    ("seconds", "age"),
    [
        *((-5, "<1 min"), (59, "<1 min"), (60, "1 min"), (3599, "59 min"), (3600, "1 h"), (2 * 86400 - 1, "47 h")),
        *((2 * 86400, "2 d"), (40 * 86400, "40 d")),
    ],
)
def test_an_age_is_told_in_minutes_hours_or_days(seconds: float, age: str) -> None:
    assert printing.human_age(seconds) == age


def test_ls_tells_when_a_checkpoint_was_committed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    at = time.time() - 3 * 3600
    os.utime(run / "checkpoint-1" / names.MANIFEST, (at, at))
    row = answer(capsys, "ls", run)["checkpoints"][0]
    assert abs(row["age_s"] - 3 * 3600) < 60
    assert datetime.fromisoformat(row["committed_at"]) == datetime.fromtimestamp(int(at), timezone.utc)
    assert row["committed_at"].endswith("+00:00")
    assert main.main(["ls", str(run / "checkpoint-1")]) == printing.FINE
    assert f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M}  3 h " in capsys.readouterr().out


def test_the_help_names_the_development_hub() -> None:
    assert "`roll-ckpt hub-dev` starts a local Hub" in roll_ckpt("--help").stdout


def test_ls_json_shows_exactly_the_committed_steps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "ls", run)
    assert [row["step"] for row in told["checkpoints"]] == [1, 2]
    listed = [len(data) for path, data in files(run / "checkpoint-2").items() if is_listed(path)]
    row = told["checkpoints"][1]
    assert row == {
        **{"committed_at": row["committed_at"], "age_s": row["age_s"]},
        **{"name": "checkpoint-2", "step": 2, "clusters": {"actor": 2, "critic": 2}, "run_id": runs.RUN},
        **{"epoch": 1, "attempt": 1, "latest": True, "files": len(listed), "bytes": sum(listed)},
    }
    assert (told["pending"], told["damaged"], told["live"], told["foreign"]) == ([], [], [], [])


def test_ls_shows_apart_what_a_live_run_is_writing(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = roll_ckpt("ls", live)
    assert "being written: checkpoint-3 (attempt 2.1, 1 of 4 votes)" in done.stdout
    assert "live: process " in done.stdout
    told = answer(capsys, "ls", live)
    assert [row["name"] for row in told["checkpoints"]] == ["checkpoint-1", "checkpoint-2"]
    assert [(left["name"], left["votes"]) for left in told["pending"]] == [("checkpoint-3", 1)]


def test_ls_tells_a_live_run_on_another_host_by_its_heartbeat(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("roll_ckpt.disk.reads.boot_id", lambda: "another host")
    record = run / names.EPOCHS / "1"
    os.utime(record)
    assert len(answer(capsys, "ls", run)["live"]) == 1
    os.utime(record, (0, 0))
    assert answer(capsys, "ls", run)["live"] == []


def test_ls_names_a_checkpoint_whose_manifest_is_damaged(run: Path) -> None:
    flip(run / "checkpoint-1/manifest.json")
    done = roll_ckpt("ls", run)
    assert done.returncode == printing.DAMAGED
    assert "checkpoint-1/manifest.json" in done.stderr
    assert "checkpoint-2" in done.stdout and "checkpoint-1 " not in done.stdout
    assert roll_ckpt("ls", run / "checkpoint-1").returncode == printing.DAMAGED
    assert roll_ckpt("show", run / "checkpoint-1").returncode == printing.DAMAGED
    assert roll_ckpt("show", run).stdout.startswith(str(run / "checkpoint-2"))
    flip(run / "checkpoint-2/manifest.json")
    assert roll_ckpt("show", run).returncode == printing.DAMAGED


def test_show_describes_the_newest_checkpoint(run: Path) -> None:
    done = roll_ckpt("show", run)
    assert done.returncode == 0
    assert done.stdout.splitlines()[0] == str(run / "checkpoint-2")
    assert "step 2, epoch 1, attempt 1, run_id 'run-1'" in done.stdout
    assert "framework none, world_size 2" in done.stdout
    assert "critic/rank_1.pt" in done.stdout


def test_show_of_a_cluster_shows_its_files_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(capsys, "show", run / "checkpoint-1/actor")
    assert told["name"] == "checkpoint-1"
    below = {f"actor/{path}": len(data) for path, data in files(run / "checkpoint-1/actor").items()}
    assert {file["path"]: file["nbytes"] for file in told["files"]} == below
    assert told["bytes"] == sum(below.values())


@pytest.mark.parametrize("path", ["", "checkpoint-2", "checkpoint-2/critic"])
def test_verify_of_a_sound_run_or_checkpoint_ends_with_0(run: Path, path: str) -> None:
    done = roll_ckpt("verify", run / path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sound: " in done.stdout and "checkpoint-2" in done.stdout


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_verify_names_every_file_in_which_a_bit_was_flipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint_dir = run / "checkpoint-1"
    for path, data in files(checkpoint_dir).items():
        if data:
            flip(checkpoint_dir / path)
            for target, prefix in ((checkpoint_dir, ""), (run, "checkpoint-1/")):
                told = answer(capsys, "verify", target, code=printing.DAMAGED)
                assert f"{prefix}{path}" in [problem["path"] for problem in told["problems"]]
                assert not told["sound"]
            (checkpoint_dir / path).write_bytes(data)
    assert answer(capsys, "verify", run)["sound"]


def test_verify_names_what_is_missing_too_long_or_strange(run: Path) -> None:
    (run / "checkpoint-1/actor/rank_0.pt").unlink()
    with (run / "checkpoint-1/actor/rank_1.pt").open("ab") as file:
        file.write(b"x")
    (run / "checkpoint-2/critic/extra_states.pt").touch()
    (run / "checkpoint-2/tokenizer.json").touch()
    done = roll_ckpt("verify", run)
    assert done.returncode == printing.DAMAGED
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        ["damaged", "checkpoint-1/actor/rank_0.pt", "missing:"],
        ["damaged", "checkpoint-1/actor/rank_1.pt", "size:"],
        ["damaged", "checkpoint-2/critic/extra_states.pt", "extra:"],
        ["not", "ours:", str(run / "checkpoint-2/tokenizer.json")],
    ]


@pytest.mark.parametrize("record", [names.MANIFEST, names.EXPECTED, names.DECISION])
def test_a_checkpoint_that_lost_a_record_is_damaged_and_not_unknown(run: Path, record: str) -> None:
    (run / "checkpoint-2" / record).unlink()
    done = roll_ckpt("verify", run / "checkpoint-2")
    assert done.returncode == printing.DAMAGED
    assert record in done.stdout


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_verify_and_ls_name_what_cannot_be_read(run: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    (run / "checkpoint-2" / "manifest.json").chmod(0)
    with plain_user():
        told = answer(capsys, "verify", run / place, code=3)["problems"]
        assert ("unreadable", "Permission denied") in {(problem["kind"], problem["detail"]) for problem in told}
        assert any("manifest.json: " in text for text in answer(capsys, "ls", run / place, code=3)["damaged"])


def test_verify_leaves_what_is_being_written_alone(live: Path) -> None:
    assert roll_ckpt("verify", live).returncode == 0
    done = roll_ckpt("verify", live / names.attempt_dir("checkpoint-3", 2, 1) / "checkpoint-3")
    assert done.returncode == printing.ERROR
    assert "is being written, or was left by a crash" in done.stderr


def test_prune_removes_the_oldest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(run)
    would = answer(capsys, "prune", run, "--keep", 1, "--dry-run")
    assert (would["removed"], would["kept"], would["dry_run"]) == (["checkpoint-1"], ["checkpoint-2"], True)
    assert files(run) == before
    did = answer(capsys, "prune", run, "--keep", 1)
    assert (did["removed"], did["kept"], did["dry_run"]) == (["checkpoint-1"], ["checkpoint-2"], False)
    assert list(runs.assert_sound(run)) == ["checkpoint-2"]
    assert verification.verify_run(run) == []


def test_prune_keeps_what_latest_names_and_what_has_no_complete_copy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(capsys, "prune", run, "--keep", 1, "--upload-dir", tmp_path / "uploads")
    assert told["removed"] == []
    (run / names.LATEST).write_text("checkpoint-1")
    for more in (["--dry-run"], []):
        assert answer(capsys, "prune", run, "--keep", 1, *more)["removed"] == []


def test_prune_knows_where_the_run_uploads_to(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    destination = file_system.FileSystemDestination(run, tmp_path / "copies")
    destination.upload("checkpoint-2")
    assert verification.verify_run(run) == [] and file_system.recorded(run) == tmp_path / "copies"
    for more in (["--dry-run"], []):
        assert answer(capsys, "prune", run, "--keep", 1, *more)["removed"] == []
    assert main.main(["prune", str(run), "--keep", "1"]) == printing.FINE
    said = capsys.readouterr().out
    assert (
        f"checkpoint-1 has no complete copy in {tmp_path / 'copies'}" in said and f"remove {run / names.COPIES}" in said
    )
    destination.upload("checkpoint-1")
    assert answer(capsys, "prune", run, "--keep", 1)["removed"] == ["checkpoint-1"]


def test_prune_keeps_what_it_has_just_recovered_and_has_no_complete_copy(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        file_system.upload(run / name, tmp_path / "uploads")

    again = CRASHED.partition("attempt =")[2].replace("checkpoint-3", "checkpoint-4").replace("step=3", "step=4")
    finish(python((CRASHED + "attempt =" + again).format(votes=4), run))
    told = answer(capsys, "prune", run, "--keep", 1, "--upload-dir", tmp_path / "uploads")
    assert told["removed"] == ["checkpoint-1", "checkpoint-2"]
    assert told["kept"] == ["checkpoint-3", "checkpoint-4"]


def test_prune_and_recover_refuse_a_live_run(live: Path) -> None:
    before = files(live)
    for command in (["prune", live, "--keep", 1], ["recover", live], ["recover", live, "--dry-run"]):
        done = roll_ckpt(*command)
        assert done.returncode == printing.ERROR
        assert "is running and saves there" in done.stderr
    assert files(live) == before


@pytest.mark.parametrize(
    ("votes", "action", "after"),
    [
        (1, "discard", ["checkpoint-1", "checkpoint-2"]),
        (4, "finish", ["checkpoint-1", "checkpoint-2", "checkpoint-3"]),
    ],
)
def test_recover_does_what_its_dry_run_has_said(
    run: Path, votes: int, action: str, after: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    finish(python(CRASHED.format(votes=votes), run))
    assert f"left by a crash: checkpoint-3 (attempt 2.1, {votes} of 4 votes)" in roll_ckpt("ls", run).stdout
    assert [left["fate"] for left in answer(capsys, "recover", run, "--dry-run")["pending"]] == [action]
    assert list(runs.assert_sound(run)) == ["checkpoint-1", "checkpoint-2"]
    [done] = answer(capsys, "recover", run)["recovered"]
    assert (done["name"], done["action"]) == ("checkpoint-3", f"{action.removesuffix('e')}ed")
    assert list(runs.assert_sound(run)) == after
    assert answer(capsys, "ls", run)["pending"] == []
    assert roll_ckpt("recover", run).stdout == "nothing to recover\n"


def test_recover_tells_in_a_table_and_in_json_what_it_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finish(python(CRASHED.format(votes=1), run))
    left = run / names.trash_dir(1) / "checkpoint-0.gone"
    left.mkdir(parents=True)
    assert answer(capsys, "recover", run, "--dry-run")["garbage"] == [".trash/1/checkpoint-0.gone"]
    assert left.is_dir()
    head, *rows = (line.split(maxsplit=3) for line in roll_ckpt("recover", run, "--dry-run").stdout.splitlines())
    assert head == ["WOULD", "CHECKPOINT", "ATTEMPT", "BECAUSE"]
    assert [row[:3] for row in rows] == [
        ["discard", "checkpoint-3", "2.1"],
        ["delete", ".trash/1/checkpoint-0.gone", "-"],
    ]
    head, *rows = (line.split(maxsplit=3) for line in roll_ckpt("recover", run).stdout.splitlines())
    assert head == ["DID", "CHECKPOINT", "ATTEMPT", "BECAUSE"]
    assert [row[:2] for row in rows] == [
        ["discarded", "checkpoint-3"],
        ["deleted", ".trash/1/checkpoint-0.gone"],
    ]
    assert not left.exists()
    again = answer(capsys, "recover", run)
    assert (again["recovered"], again["garbage"], again["dry_run"]) == ([], [], False)


def test_a_pipe_in_the_place_of_a_record_is_damage_and_holds_nobody_up(run: Path) -> None:
    for record in (names.EXPECTED, names.MANIFEST, names.DECISION):
        path = run / "checkpoint-2" / record
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        done = subprocess.run(
            [sys.executable, "-m", "roll_ckpt", "verify", run],
            capture_output=True,
            text=True,
            cwd=HERE.parent,
            timeout=60,
        )
        assert done.returncode == printing.DAMAGED and f"checkpoint-2/{record}" in done.stdout
        path.unlink()
        path.write_bytes(kept)


def test_a_run_whose_manifests_are_all_gone_is_damaged_and_not_empty(run: Path) -> None:
    for step in (1, 2):
        (run / f"checkpoint-{step}" / names.MANIFEST).unlink()
    for command in ("ls", "show", "verify"):
        done = roll_ckpt(command, run)
        assert done.returncode == printing.DAMAGED and "checkpoint-2" in done.stdout + done.stderr


def test_a_run_starts_at_once_after_the_command_line_has_owned_its_directory(run: Path) -> None:
    assert roll_ckpt("recover", run).returncode == 0
    claim = runs.claim(run)
    assert claim.number == epochs.newest_number(run) == 3
    claim.release()


def test_deepspeed_checkpoints_of_other_writers_are_shown_and_not_verified(run: Path) -> None:
    (run / "global_step7").mkdir()
    (run / "global_step7/mp_rank_00_model_states.pt").touch()
    assert "foreign: global_step7" in roll_ckpt("ls", run).stdout
    done = roll_ckpt("verify", run)
    assert (done.returncode, "not verified: global_step7" in done.stderr) == (0, True)


def test_a_foreign_manifest_makes_no_checkpoint(run: Path) -> None:
    (run.parent / names.MANIFEST).write_text("{}")
    assert roll_ckpt("ls", run).returncode == 0
    assert roll_ckpt("ls", run.parent).returncode == printing.ERROR


@pytest.mark.parametrize("command", [["ls"], ["show"], ["verify"], ["prune", "--keep", "1"], ["recover"]])
def test_a_path_without_checkpoints_is_an_error_that_says_so(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "file").touch()
    for path, text in (
        ("missing", "does not exist"),
        ("", "no checkpoint of roll_ckpt"),
        ("file", "no checkpoint"),
    ):
        done = roll_ckpt(command[0], tmp_path / path, *command[1:])
        assert (done.returncode, done.stdout) == (printing.ERROR, "")
        assert str(tmp_path / path) in done.stderr and text in done.stderr
    assert list(files(tmp_path)) == ["file"]


def test_prune_and_recover_want_the_whole_directory(run: Path) -> None:
    for command in (["prune", run / "checkpoint-1", "--keep", 1], ["recover", run / "checkpoint-1"]):
        done = roll_ckpt(*command)
        assert done.returncode == printing.ERROR and f"works on a whole directory: {run}" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["frobnicate"], ["prune", "."], ["prune", ".", "--keep", "0"], ["ls", ".", "--keep", "1"]],
)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    done = roll_ckpt(*arguments)
    assert done.returncode == 2 and "usage: roll-ckpt" in done.stderr


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune", "recover"])
def test_help_explains_and_gives_an_example(command: str) -> None:
    done = roll_ckpt(command, "--help")
    assert done.returncode == 0 and f"  roll-ckpt {command} runs/demo" in done.stdout
    assert "Exit codes: 0 fine, 1 error, 2 wrong usage, 3 damaged, 4 uploads still owed." in done.stdout


def test_ls_loads_nothing_heavy(run: Path) -> None:
    script = (
        "import sys; from roll_ckpt.cli import main; main.main(['ls', sys.argv[1]]);"
        "heavy = {'torch', 'deepspeed', 'numpy', 'pydantic', 'rich', 'yaml', 'huggingface_hub'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script, run], cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_early_gets_no_traceback(run: Path) -> None:
    command = f"{sys.executable} -m roll_ckpt show {run} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=HERE.parent)
    assert done.stderr == ""
