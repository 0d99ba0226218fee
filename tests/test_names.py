from __future__ import annotations

import pytest

from roll_ckpt import names
from roll_ckpt.errors import ConfigError

AWKWARD = ["checkpoint-100", "a", "v1.2.3", "x.1.2", "ünïcode", "with space", "1", "expected", "n" * 200]


@pytest.mark.parametrize("name", AWKWARD)
def test_names_are_parsed_back_to_what_they_were_built_from(name: str) -> None:
    assert names.parse_attempt_dir(names.attempt_dir(name, 3, 12)) == (name, 3, 12)
    assert names.parse_vote_file(names.vote_file(name, 7)) == (name, 7)
    assert names.parse_digest_file(names.digest_file(name, 7)) == (name, 7)
    assert names.parse_tensor_file(names.tensor_file(name, 7)) == (name, 7)
    assert names.parse_epoch_file(names.epoch_file(4, name)) == (4, name)
    assert names.parse_epoch_file(names.epoch_file(4)) == (4, None)
    assert names.parse_aborted_file(names.aborted_file(name, 3, 12)) == (name, 3, 12)
    assert names.parse_temporary_file(names.temporary_file(name)) == name
    assert names.parse_pull_dir(names.pull_dir(name, "0123456789abcdef" * 4)) == (name, "0123456789abcdef")
    assert len(names.pull_dir(name, "0" * 64).encode()) <= 255
    assert len(names.temporary_file(name).encode()) <= 255
    assert names.check_name("tag", name) == name


def test_an_index_of_format_1_is_found_under_its_name() -> None:
    assert names.old_tensor_file("actor", 3) == "tensors/actor.3.json"
    assert names.parse_tensor_file(names.old_tensor_file("actor", 3)) is None


def test_a_step_is_parsed_only_from_the_one_spelling() -> None:
    assert names.step_of(names.checkpoint(150)) == 150
    for other in ("checkpoint-", "checkpoint-007", "checkpoint--1", "checkpoint-1 ", "Checkpoint-1", "step1"):
        assert names.step_of(other) is None


@pytest.mark.parametrize("entry", [".a.1.tmp", ".a.01.1.tmp", "a.1.1.tmp", ".1.1.tmp", "..1.1.tm", ".epochs"])
def test_foreign_entries_are_no_attempts(entry: str) -> None:
    assert names.parse_attempt_dir(entry) is None


def test_expected_json_is_no_vote() -> None:
    assert names.parse_vote_file("expected.json") is None


@pytest.mark.parametrize(
    "name", ["", ".epochs", "..", "a\\b", "latest", "new\nline", "nul\0", "n" * 201, "\ud800", "tab\t"]
)
@pytest.mark.parametrize("kind", ["tag", "cluster"])
def test_names_that_cannot_be_are_refused_with_the_reason(kind: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{kind} .* cannot be used as a name: "):
        names.check_name(kind, name)


def test_a_cluster_may_not_be_called_like_a_part_of_a_checkpoint() -> None:
    for name in ("votes", "decision", "manifest.json", "digests", "tensors", "pipeline"):
        with pytest.raises(ConfigError):
            names.check_name("cluster", name)


@pytest.mark.parametrize("path", ["", "/a", "a/../b", "a//b", "./a", "a/", "a\\b", "a\nb", ".."])
def test_paths_that_leave_the_checkpoint_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="it "):
        names.check_relative(path)
