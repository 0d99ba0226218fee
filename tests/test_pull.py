"""Pulls by real processes with the real client from the local Hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hub_runs
import pytest
from hub_client import Client, Refused
from roll_ckpt_hub_dev import Fault, LocalHub

from roll_ckpt import names as names_module
from roll_ckpt.disk import tree
from roll_ckpt.formats import manifests
from roll_ckpt.formats.sealed_json import canonical, seal, sha256, unseal
from roll_ckpt.transaction import epochs, verification

pytest.importorskip("huggingface_hub")

HERE = Path(__file__).parent
SMALL, LARGE = "dev/small", "dev/large"
PUSH = """
ops = [Add(path, folder + "/" + path) for path in paths]
api.create_commit(repo, ops, commit_message="checkpoint")
api.create_tag(repo, tag=tag, exist_ok=True)
"""


def python(script: str, *arguments: object) -> None:
    """Run it in a process of its own, without torch, so that it may fork."""
    head = "import sys, runs; from pathlib import Path; out = Path(sys.argv[1])"
    environment = {**os.environ, "PYTHONPATH": hub_runs.PYTHON_PATH}
    subprocess.run(
        [sys.executable, "-c", f"{head}\n{script}", *map(str, arguments)], cwd=HERE, env=environment, check=True
    )


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def push(client: Client, repo: str, checkpoint_dir: Path) -> None:
    """As a plain client does: every file of the unit at the root, and a tag of its name."""
    client("api.create_repo(repo, private=True, exist_ok=True)", repo=repo)
    client(PUSH, repo=repo, folder=checkpoint_dir, paths=sorted(files(checkpoint_dir)), tag=checkpoint_dir.name)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    root = tmp_path_factory.mktemp("hub") / "root"
    with LocalHub(root, write_token="hf_writes", read_token="hf_reads") as hub:
        yield hub


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def client_of(hub: LocalHub, home: Path, **environment: str) -> Client:
    settings = {"PYTHONPATH": hub_runs.PYTHON_PATH, "ROLL_CKPT_HUB_TIMEOUT_S": "0.5", "PYTHONWARNINGS": "ignore"}
    return Client(hub.url, home, **{**settings, **environment})


@pytest.fixture(scope="module")
def shared(hub: LocalHub, home: Path) -> Iterator[Client]:
    client = client_of(hub, home)
    yield client
    client.close()


@pytest.fixture(scope="module")
def checkpoint_dirs(shared: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of small files and a checkpoint of files of some MB, both pushed."""
    out = tmp_path_factory.mktemp("units")
    python("runs.history(out / 'small', [1, 2])\nruns.history(out / 'large', [7], salt='x' * 2_000_000)", out)
    for checkpoint_dir in (out / "small/checkpoint-1", out / "small/checkpoint-2"):
        push(shared, SMALL, checkpoint_dir)
    push(shared, LARGE, out / "large/checkpoint-7")
    return out


@pytest.fixture
def client(hub: LocalHub, shared: Client, checkpoint_dirs: Path) -> Iterator[Client]:
    yield shared
    hub.faults.clear()


def pull(client: Client, uri: str, to: Path) -> Path:
    return Path(case(client, "pulled(uri, to)", uri=uri, to=to))


def refused(client: Client, uri: str, to: Path, code: str = "pull_cases.pulled(uri, to)", **more: object) -> Refused:
    with pytest.raises(Refused) as caught:
        client(f"import pull_cases\n{code}", uri=uri, to=to, **more)
    return caught.value


def case(client: Client, call: str, **names: object) -> Any:
    return client(f"import pull_cases\npull_cases.{call}", **names)


def staging_of(checkpoint_dir: Path) -> str:
    return names_module.pull_dir(checkpoint_dir.name, sha256((checkpoint_dir / names_module.MANIFEST).read_bytes()))


def flipped(data: bytes) -> bytes:
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def downloads(hub: LocalHub, since: int) -> list[dict[str, Any]]:
    return [line for line in hub.requests()[since:] if line["route"] == "download"]


def assert_same(pulled: Path, checkpoint_dir: Path) -> None:
    """Every byte of every file, nothing else, and nothing left beside it."""
    assert files(pulled) == files(checkpoint_dir)
    assert verification.verify(pulled) == []
    assert [entry for entry in os.listdir(pulled.parent) if entry.startswith(".")] == []


# --- what comes ---------------------------------------------------------------------------------------------


@pytest.mark.core("huggingface_hub")
def test_a_pushed_tag_comes_into_an_empty_folder_byte_for_byte(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    since = len(hub.requests())
    assert pull(client, f"hf://{SMALL}@checkpoint-1", tmp_path / "new") == tmp_path / "new/checkpoint-1"
    assert_same(tmp_path / "new/checkpoint-1", checkpoint_dirs / "small/checkpoint-1")
    pull(client, f"hf://{SMALL}", tmp_path / "new")
    assert_same(tmp_path / "new/checkpoint-2", checkpoint_dirs / "small/checkpoint-2")
    commits = {line["path"].split("/resolve/")[1].split("/")[0] for line in downloads(hub, since)}
    assert len(commits) == 2 and all(len(commit) == 40 for commit in commits), "one commit each, whatever moves"


def test_the_same_checkpoint_is_not_brought_again(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    checkpoint_dir = pull(client, f"hf://{SMALL}", tmp_path)
    before = {path: path.stat().st_mtime_ns for path in checkpoint_dir.rglob("*")}
    since = len(hub.requests())
    assert pull(client, f"hf://{SMALL}@checkpoint-2", tmp_path) == checkpoint_dir
    assert [Path(line["path"]).name for line in downloads(hub, since)] == [names_module.MANIFEST]
    assert {path: path.stat().st_mtime_ns for path in checkpoint_dir.rglob("*")} == before


def test_another_content_of_that_name_is_left_alone(client: Client, checkpoint_dirs: Path, tmp_path: Path) -> None:
    for there in ("file", "empty", "foreign", "another"):
        target = tmp_path / there / "checkpoint-7"
        target.parent.mkdir()
        if there == "file":
            target.write_text("mine")
        elif there == "another":
            shutil.copytree(checkpoint_dirs / "small/checkpoint-1", target)
        else:
            target.mkdir()
            if there == "foreign":
                (target / "notes.txt").write_text("mine")
        before = files(target.parent)
        error = refused(client, f"hf://{LARGE}", target.parent)
        assert error.kind == "ConfigError" and "it was left alone" in error.text
        assert files(target.parent) == before and os.listdir(target.parent) == ["checkpoint-7"]


def test_a_copy_here_that_lost_a_file_is_not_called_complete(client: Client, tmp_path: Path) -> None:
    checkpoint_dir = pull(client, f"hf://{SMALL}", tmp_path)
    (checkpoint_dir / "actor/rank_0.pt").unlink()
    error = refused(client, f"hf://{SMALL}", tmp_path)
    assert error.kind == "ConfigError" and "missing or too short" in error.text


def test_progress_tells_of_all_bytes(client: Client, checkpoint_dirs: Path, tmp_path: Path) -> None:
    heard = case(client, "told_of(uri, to)", uri=f"hf://{LARGE}", to=tmp_path)
    nbytes = sum(
        len(data)
        for path, data in files(checkpoint_dirs / "large/checkpoint-7").items()
        if path != names_module.MANIFEST
    )
    assert heard[-1] == [nbytes, nbytes] and sorted(heard) == heard


# --- kills --------------------------------------------------------------------------------------------------


def test_killed_before_any_operation_the_next_pull_ends_right(
    client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    uri, at, kills = f"hf://{SMALL}@checkpoint-1", 1, 0
    while case(client, "killed_at(at, uri, to)", at=at, uri=uri, to=tmp_path / str(at)):
        to = tmp_path / str(at)
        kills += 1
        if tree.exists(to / "checkpoint-1"):
            assert verification.verify(to / "checkpoint-1") == []
        case(client, "pulled_in_child(uri, to)", uri=uri, to=to)
        assert_same(to / "checkpoint-1", checkpoint_dirs / "small/checkpoint-1")
        at += 5
    assert kills > 10


def test_a_killed_pull_goes_on_in_the_middle_of_its_files(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    uri = f"hf://{LARGE}"
    here = case(client, "killed_at_block(block, uri, to)", block=9, uri=uri, to=tmp_path)
    assert here > 2_000_000 and tree.list_dir(tmp_path) == [staging_of(checkpoint_dirs / "large/checkpoint-7")]
    since = len(hub.requests())
    pull(client, uri, tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")
    came = downloads(hub, since)
    assert 206 in [line["status"] for line in came]
    record = (checkpoint_dirs / "large/checkpoint-7" / names_module.MANIFEST).stat().st_size
    nbytes = sum(map(len, files(checkpoint_dirs / "large/checkpoint-7").values()))
    assert sum(line["answered"] for line in came) - record == nbytes - record - here


def test_bytes_that_a_power_cut_spoilt_are_fetched_again(client: Client, checkpoint_dirs: Path, tmp_path: Path) -> None:
    case(client, "killed_at_block(block, uri, to)", block=9, uri=f"hf://{LARGE}", to=tmp_path)
    begun = max((path for path in tmp_path.rglob("*.pt")), key=lambda path: path.stat().st_size)
    begun.write_bytes(bytes(begun.stat().st_size))
    pull(client, f"hf://{LARGE}", tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")


def test_what_a_killed_pull_of_another_checkpoint_of_this_name_left_goes(client: Client, tmp_path: Path) -> None:
    old = tmp_path / names_module.pull_dir("checkpoint-2", "0" * 64)
    (old / "checkpoint-2").mkdir(parents=True)
    (old / names_module.PULL_LOCK).touch()
    pull(client, f"hf://{SMALL}", tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_pulls_of_one_checkpoint_at_once_wait_for_each_other(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    since = len(hub.requests())
    assert case(client, "all_at_once(uri, to, 3)", uri=f"hf://{LARGE}", to=tmp_path) == [0, 0, 0]
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")
    large = [line["path"] for line in downloads(hub, since) if line["path"].endswith("actor/rank_1.pt")]
    assert len(large) == 1


# --- a Hub that lies ----------------------------------------------------------------------------------------


def test_bytes_that_differ_on_the_hub_are_refused_by_name(
    client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    checkpoint_dir = Path(shutil.copytree(checkpoint_dirs / "small/checkpoint-1", tmp_path / "checkpoint-1"))
    (checkpoint_dir / "critic/rank_1.pt").write_bytes(flipped((checkpoint_dir / "critic/rank_1.pt").read_bytes()))
    push(client, "dev/flipped", checkpoint_dir)
    error = refused(client, "hf://dev/flipped", tmp_path / "to")
    assert error.kind == "Damaged" and "critic/rank_1.pt" in error.text and "actor" not in error.text
    assert "dev/flipped@main" in error.text and os.listdir(tmp_path / "to") == []


@pytest.mark.parametrize("path", ["votes/actor.0.json", "decision", "votes/expected.json"])
def test_a_flipped_record_is_refused_by_name(client: Client, checkpoint_dirs: Path, tmp_path: Path, path: str) -> None:
    checkpoint_dir = Path(shutil.copytree(checkpoint_dirs / "small/checkpoint-1", tmp_path / "checkpoint-1"))
    (checkpoint_dir / path).write_bytes(flipped((checkpoint_dir / path).read_bytes()))
    push(client, "dev/records", checkpoint_dir)
    error = refused(client, "hf://dev/records", tmp_path / "to")
    assert error.kind == "Damaged" and path in error.text
    assert os.listdir(tmp_path / "to") == []


def test_files_that_are_missing_or_of_another_size_are_named_before_a_byte_is_read(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    checkpoint_dir = Path(shutil.copytree(checkpoint_dirs / "small/checkpoint-1", tmp_path / "checkpoint-1"))
    (checkpoint_dir / "actor/rank_0.pt").unlink()
    (checkpoint_dir / "decision").unlink()
    with (checkpoint_dir / "critic/rank_0.pt").open("ab") as file:
        file.write(b"more")
    push(client, "dev/holes", checkpoint_dir)
    since = len(hub.requests())
    error = refused(client, "hf://dev/holes", tmp_path / "to")
    assert error.kind == "Damaged"
    assert all(part in error.text for part in ("actor/rank_0.pt is missing", "decision is missing", "critic/rank_0.pt"))
    assert len(downloads(hub, since)) == 1 and not (tmp_path / "to").exists()


def listing(path: str, nbytes: int = 3, block_bytes: int = 4 << 20) -> Callable[[dict[str, Any]], None]:
    def change(record: dict[str, Any]) -> None:
        record["files"][path] = {"nbytes": nbytes, "block_bytes": block_bytes, "root": sha256(b"")}

    return change


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "above": listing("../x"),
    "above, deep": listing("actor/../../../x"),
    "absolute": listing("/tmp/roll_ckpt_hostile"),
    "backslash": listing("..\\x"),
    "dot": listing("./x"),
    "below a file": listing("actor/rank_0.pt/x"),
    "its own manifest": listing(names_module.MANIFEST),
    "its own decision": listing(names_module.DECISION),
    "its own vote": listing("votes/actor.0.json"),
    "negative": listing("actor/rank_0.pt", nbytes=-1),
    "huge": listing("actor/rank_0.pt", nbytes=2**62),
    "beyond 63 bits": listing("actor/rank_0.pt", nbytes=2**70),
    "a digest for each byte": listing("actor/rank_0.pt", nbytes=12, block_bytes=1),
    "a file that is not there": listing("actor/none.pt"),
    "name above": lambda record: record.update(name="../checkpoint-1"),
    "name with a folder": lambda record: record.update(name="a/../b"),
    "hidden name": lambda record: record.update(name=".epochs"),
    "name of ours": lambda record: record.update(name="latest"),
}


@pytest.mark.parametrize("hostile", [*HOSTILE, "twice", "no record", "truncated"])
def test_a_hostile_manifest_writes_nothing(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path, hostile: str
) -> None:
    checkpoint_dir = Path(shutil.copytree(checkpoint_dirs / "small/checkpoint-1", tmp_path / "unit"))
    data = (checkpoint_dir / names_module.MANIFEST).read_bytes()
    if hostile in HOSTILE:
        record = unseal(data, "test")
        HOSTILE[hostile](record)
        data = seal(record)
    elif hostile == "twice":
        path = json.dumps("actor/rank_0.pt").encode()
        line = next(line for line in data.splitlines() if line.strip().startswith(path))
        data = data.replace(line, line + b"\n" + line)
    else:
        data = canonical({"format": 1}) if hostile == "no record" else data[:-100]
    (checkpoint_dir / names_module.MANIFEST).write_bytes(data)
    push(client, "dev/hostile", checkpoint_dir)
    since = len(hub.requests())
    error = refused(client, "hf://dev/hostile", tmp_path / "to/deep/er")
    assert error.kind == "Damaged" and "hf://dev/hostile@main" in error.text
    assert len(downloads(hub, since)) == 1
    assert os.listdir(tmp_path) == ["unit"] and not Path("/tmp/roll_ckpt_hostile").exists()


@pytest.mark.parametrize("planted", ["staging", "unit", "folder", "file", "lock"])
def test_links_in_the_staging_directory_are_not_followed(
    client: Client, checkpoint_dirs: Path, tmp_path: Path, planted: str
) -> None:
    checkpoint_dir, to, outside = checkpoint_dirs / "small/checkpoint-1", tmp_path / "to", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    staging = to / staging_of(checkpoint_dir)
    link = {
        "staging": staging,
        "unit": staging / checkpoint_dir.name,
        "folder": staging / checkpoint_dir.name / "actor",
        "file": staging / checkpoint_dir.name / "actor/rank_0.pt",
        "lock": staging / names_module.PULL_LOCK,
    }[planted]
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / "mine" if planted in ("file", "lock") else outside)
    if planted == "lock":
        assert refused(client, f"hf://{SMALL}@checkpoint-1", to).kind == "Damaged"
    else:
        pull(client, f"hf://{SMALL}@checkpoint-1", to)
        assert_same(to / checkpoint_dir.name, checkpoint_dir)
    assert files(outside) == {"mine": b"mine"}


# --- a Hub that says no, or nothing -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "kind", "told"),
    [
        ("hf://dev/none", "HubRefused", "check the name, whether the token may see it, and HF_ENDPOINT"),
        (f"hf://{SMALL}@none", "HubRefused", "dev/small@none"),
        ("hf://dev/bare", "NotFound", "it has no manifest.json"),
        ("hf://dev", "ConfigError", "namespace/name"),
        ("https://huggingface.co/dev/small", "ConfigError", "hf://namespace/name"),
    ],
)
def test_what_is_not_there_is_told_with_nothing_written(
    client: Client, tmp_path: Path, uri: str, kind: str, told: str
) -> None:
    client("api.create_repo('dev/bare', private=True, exist_ok=True)")
    error = refused(client, uri, tmp_path / "to")
    assert error.kind == kind and told in error.text
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    ("environment", "kind", "told"),
    [
        ({"HF_TOKEN": ""}, "HubRefused", "set HF_TOKEN in the environment"),
        ({"HF_TOKEN": "hf_wrongwrongwrong"}, "HubRefused", "set HF_TOKEN in the environment"),
        ({"HF_HUB_OFFLINE": "1"}, "HubUnavailable", "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "HubUnavailable", "no answer from http://127.0.0.1:9"),
    ],
)
def test_no_token_and_no_network_are_told(
    hub: LocalHub, checkpoint_dirs: Path, home: Path, tmp_path: Path, environment: dict[str, str], kind: str, told: str
) -> None:
    client = client_of(hub, home, **environment)
    error = refused(client, f"hf://{SMALL}", tmp_path / "to")
    client.close()
    assert error.kind == kind and told in error.text and "wrongwrong" not in error.text
    assert not (tmp_path / "to").exists()


def test_a_token_that_may_only_read_pulls(hub: LocalHub, checkpoint_dirs: Path, home: Path, tmp_path: Path) -> None:
    client = client_of(hub, home, HF_TOKEN="hf_reads")
    pull(client, f"hf://{SMALL}", tmp_path)
    client.close()
    assert_same(tmp_path / "checkpoint-2", checkpoint_dirs / "small/checkpoint-2")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("repo_info", status=503),
        Fault("tree", cut_at=0),
        Fault("download", call=1, cut_at=10),
        Fault("download", call=2, times=3, cut_at=700_000),
        Fault("download", call=3, times=2, status=503),
        Fault("download", call=2, status=429, retry_after_s=0),
        Fault("download", call=2, stall_s=2.0, cut_at=0),
    ],
    ids=lambda fault: f"{fault.route} {fault.status or ('stalls' if fault.stall_s else f'cut at {fault.cut_at}')}",
)
def test_a_hub_that_fails_for_a_while_is_tried_again(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path, fault: Fault
) -> None:
    hub.faults.add(fault)
    pull(client, f"hf://{LARGE}", tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")
    assert hub.faults.pending() == []


def test_a_hub_that_fails_on_and_on_ends_the_pull_which_then_goes_on(
    hub: LocalHub, client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    hub.faults.add(Fault("download", call=6, times=0, cut_at=0))
    error = refused(client, f"hf://{LARGE}", tmp_path)
    staging = tmp_path / staging_of(checkpoint_dirs / "large/checkpoint-7")
    assert error.kind == "HubUnavailable" and str(staging) in error.text and "pull again" in error.text
    assert os.listdir(tmp_path) == [staging.name]
    hub.faults.clear()
    pull(client, f"hf://{LARGE}", tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")


# --- the user's client --------------------------------------------------------------------------------------


@pytest.fixture
def fresh(hub: LocalHub, home: Path, checkpoint_dirs: Path) -> Iterator[Client]:
    """A process that has not spoken with the Hub yet."""
    client = client_of(hub, home)
    yield client
    hub.faults.clear()
    client.close()


def test_a_client_factory_of_the_user_stays_in_force_and_is_used(
    hub: LocalHub, fresh: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    since = len(hub.requests())
    told = case(fresh, "with_a_client_of_the_users_own(uri, to)", uri=f"hf://{LARGE}", to=tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")
    # A stalled request of a test before this one may be logged only now: it has a fault.
    answered = [line for line in hub.requests()[since:] if not line["fault"]]
    assert sorted(told.pop("every request went through it")) == sorted(line["path"] for line in answered)
    assert told == {"the same client": True, "the same verbosity": True, "the same factory": True}


@pytest.mark.parametrize(
    ("route", "call"), [("repo_info", 1), ("tree", 1), ("download", 1), ("download", 2)], ids=lambda value: str(value)
)
def test_a_hub_that_stalls_ends_the_pull_though_the_users_client_has_no_time_limit(
    hub: LocalHub, fresh: Client, tmp_path: Path, route: str, call: int
) -> None:
    hub.faults.add(Fault(route, call=call, times=0, stall_s=60))
    told = case(fresh, "how_long(uri, to)", uri=f"hf://{LARGE}", to=tmp_path)
    assert told["kind"] == "HubUnavailable" and "ReadTimeout" in told["text"], told
    assert told["seconds"] < 15, "each try ends after half a second, and there are few"


# --- this machine -------------------------------------------------------------------------------------------


def test_a_disk_too_small_is_told_before_the_first_byte(client: Client, tmp_path: Path) -> None:
    error = refused(client, f"hf://{LARGE}", tmp_path / "to", "pull_cases.with_little_room(uri, to)")
    assert error.kind == "NoRoom" and "has 1000" in error.text and "OSError" in error.bases
    assert not (tmp_path / "to").exists()


def test_a_disk_that_fills_up_is_told_and_the_next_pull_goes_on(
    client: Client, checkpoint_dirs: Path, tmp_path: Path
) -> None:
    code = "pull_cases.on_a_disk_that_fills_up(uri, to, 3_000_000)"
    error = refused(client, f"hf://{LARGE}", tmp_path, code)
    assert error.kind == "NoRoom" and "rank_1.pt" in error.text and "pull again to resume" in error.text
    pull(client, f"hf://{LARGE}", tmp_path)
    assert_same(tmp_path / "checkpoint-7", checkpoint_dirs / "large/checkpoint-7")


def test_a_directory_that_a_live_run_owns_is_refused(client: Client, tmp_path: Path) -> None:
    claimed = epochs.claim_number(tmp_path / "run", "test", {"actor": 1}, None, take_over=False)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    error = refused(client, f"hf://{SMALL}", tmp_path / "run")
    assert error.kind == "RunIsLive" and f"process {os.getpid()}" in error.text
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    claimed.release()
    pull(client, f"hf://{SMALL}", tmp_path / "run")
    assert verification.verify(tmp_path / "run/checkpoint-2") == []
    assert {problem.path for problem in verification.verify_run(tmp_path / "run")} == {"latest"}, (
        "this run has saved none"
    )
    ours = epochs.claim_number(tmp_path / "run", "test", {"actor": 1}, None, take_over=False)
    assert ours.number > manifests.read(tmp_path / "run/checkpoint-2").epoch, "what it saves counts as newer"
    ours.release()
