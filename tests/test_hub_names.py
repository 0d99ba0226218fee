"""Names that the Hub does not take: a checkpoint gets another tag; all else is refused before the first byte."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_runs
import pytest
from hub_runs import TOKEN
from roll_ckpt_hub_dev import LocalHub

from roll_ckpt import names
from roll_ckpt.errors import ConfigError
from roll_ckpt.upload.hub.address import Remote

pytest.importorskip("huggingface_hub")

FINE = ["checkpoint-5", "global_step10", "best", "v1.2", "A_b-c.d", "20261128", "x" * 200]
AWKWARD = ["best model v1~2", "a:b", "x..y", "ends.lock", "trailing.", "at@{0}", "ünï", "日本", "n" * 180 + "~"]
NOT_YET = [".best", "epoch1/step5", "@", "-x", "main", "HEAD", "a" * 40, "/", "..", "~", "x" * 300]


@pytest.mark.parametrize("name", FINE)
def test_a_name_that_can_be_a_tag_is_the_tag(name: str) -> None:
    assert names.hub_tag(name) == name


@pytest.mark.parametrize("name", AWKWARD + NOT_YET)
def test_any_other_name_has_a_tag_that_git_takes(name: str) -> None:
    tag = names.hub_tag(name)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*-[0-9a-f]{12}", tag) and len(tag) < 120
    assert subprocess.run(["git", "check-ref-format", f"refs/tags/{tag}"], check=False).returncode == 0
    assert names.hub_tag(tag) == names.check_revision(tag) == tag


def test_no_two_names_share_a_tag() -> None:
    similar = ["a b", "a~b", "a:b", "a  b", "a-b", "a.b", "a..b", "ä b", "a/b"]
    assert len({names.hub_tag(name) for name in similar}) == len(similar)


@pytest.mark.parametrize("name", AWKWARD + NOT_YET + ["50%", "a%2Fb"])
def test_the_record_of_a_push_is_one_entry_and_gives_the_name_back(name: str) -> None:
    for path, folder in ((names.hub_record(name), names.HUB_RECORDS), (names.hub_hashes(name), names.HUB_HASHES)):
        assert os.path.dirname(path) == folder and names.parse_hub_record(os.path.basename(path)) == name


@pytest.mark.parametrize(
    "revision", ["", "a..b", "a//b", ".a", "a/.b", "a.lock", "a.lock/b", "a.", "-a", "a b", "a~1", "a\nb"]
)
def test_what_cannot_be_a_branch_is_refused(revision: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a branch"):
        Remote("me/x", revision)


@pytest.mark.parametrize(
    "repo_id", ["x", "a/b/c", "a/.b", "a/b.git", "a--b/c", "a/b c", "a/" + "b" * 97, "ä/b", "a/b."]
)
def test_what_cannot_be_a_repository_is_refused(repo_id: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a repository"):
        Remote(repo_id)


# --- the command line against the local Hub -------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    with LocalHub(tmp_path_factory.mktemp("hub") / "root", write_token=TOKEN) as hub:
        yield hub


def cli(hub: LocalHub, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "roll_ckpt", *map(str, words)],
        env={**os.environ, **told},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_push_says_the_tag_and_a_pull_finds_the_checkpoint_by_either(hub: LocalHub, tmp_path: Path) -> None:
    awkward = [AWKWARD[0], AWKWARD[3], "epoch-1", "epoch1/step5", ".best"]
    hub_runs.history(tmp_path / "run", [1, 2, 3, 4, 5], called=awkward)
    for what in (awkward[0], ""):  # one, and then all others at once
        done = cli(hub, tmp_path, "push", tmp_path / "run" / what, "me/x")
        assert done.returncode == 0, done.stderr
        for name in [what] if what else awkward[1:]:
            tag = names.hub_tag(name)
            assert (f"{name!r}, so it is {tag} there" in done.stdout) == (tag != name), done.stdout
        assert not what or f"hf://me/x@{names.hub_tag(what)}" in done.stdout
    assert set(hub.store.repo("me/x").tags) == {names.hub_tag(name) for name in awkward}
    for number, asked in enumerate((awkward[0], names.hub_tag(awkward[1]), awkward[2])):
        done = cli(hub, tmp_path, "pull", f"hf://me/x@{asked}", tmp_path / f"pulled{number}")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "pulled0" / awkward[0] / "manifest.json").exists()


def test_the_queue_of_a_run_with_such_names_is_pushed_once(hub: LocalHub, tmp_path: Path) -> None:
    hub_runs.history(tmp_path / "run", [1], called=["a:b"])
    first, second = (cli(hub, tmp_path, "push", tmp_path / "run", "me/queue") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "pushed a:b" in first.stdout and "pushed" not in second.stdout
    assert names.hub_tag("a:b") in first.stdout


def test_a_path_that_git_uses_itself_is_refused_before_the_first_byte(hub: LocalHub, tmp_path: Path) -> None:
    hub_runs.history(tmp_path / "run", [1], extra={"actor/.git/config": b"[core]"})
    since = len(hub.requests())
    done = cli(hub, tmp_path, "push", tmp_path / "run/checkpoint-1", "me/git")
    assert done.returncode == 1 and "actor/.git/config: the Hub takes no file of this name" in done.stderr
    assert hub.requests()[since:] == []
