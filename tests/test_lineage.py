"""Which checkpoint is the newest, and which is pruned first: by the order of saves in what a run continues."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import runs

from roll_ckpt import process
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, SaveFailed
from roll_ckpt.formats import manifests, records
from roll_ckpt.formats.records import NO_LINEAGE
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.save.begin import Request, begin
from roll_ckpt.save.course import Course
from roll_ckpt.save.pending import PendingSaves
from roll_ckpt.transaction import attempts, listing, retention, settlement, verification
from roll_ckpt.transaction.epochs import Epoch


class Saver:
    """An engine or pipeline that saves in miniature."""

    def __init__(self, epoch: Epoch, clusters: dict[str, int] | None = None) -> None:
        self.epoch, self.course = epoch, Course()
        self.clusters = clusters or runs.CLUSTERS

    def save(self, name: str, step: int | None = None) -> None:
        self.course.settle(listing.committed(self.epoch.output_dir), self.clusters, name)
        attempt = attempts.begin(self.epoch, name, step=step, expected=self.clusters, lineage=self.course.lineage)
        for cluster, ranks in self.clusters.items():
            for rank in range(ranks):
                runs.vote(attempt, name.replace("/", "_"), cluster, rank)
        assert settlement.settle(attempt, lead=True, timeout_s=9).committed

    def load(self, name: str) -> None:
        self.course.resumed(manifests.read(self.epoch.output_dir / name))

    def prune(self, keep: int) -> list[str]:
        (self.epoch.output_dir / "latest").unlink(missing_ok=True)  # it protects what it names
        return retention.prune(self.epoch.output_dir, self.epoch, keep, series=self.course.series)


def newest(out: Path) -> list[str]:
    return [manifest.name for manifest in listing.newest_first(out)]


@pytest.fixture
def saver(tmp_path: Path) -> Saver:
    return Saver(runs.claim(tmp_path / "run"))


def test_after_a_rollback_the_new_branch_is_newest_and_the_abandoned_one_goes_first(saver: Saver) -> None:
    for step in (10, 20, 30, 40):
        saver.save(f"s{step}", step)
    saver.load("s20")
    saver.save("s25", 25)
    assert newest(saver.epoch.output_dir) == ["s25", "s40", "s30", "s20", "s10"]
    assert saver.prune(4) == ["s30"]
    assert saver.prune(2) == ["s40", "s10"]
    saver.load("s20")  # once more
    saver.save("s22", 22)
    assert saver.prune(2) == ["s25"]
    saver.load("s22")
    saver.save("s23", 23)
    assert saver.prune(1) == ["s20", "s22"]
    assert newest(saver.epoch.output_dir) == ["s23"]


def test_a_rollback_in_another_run_is_one(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = Saver(runs.claim(out))
    for step in (10, 20, 30):
        first.save(f"s{step}", step)
    first.epoch.release()
    second = Saver(runs.claim(out))
    second.load("s10")
    second.save("s15", 15)
    assert newest(out)[0] == "s15"
    assert second.prune(2) == ["s20", "s30"]


def test_a_counter_that_starts_anew_is_newest_and_what_it_abandons_goes_first(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = Saver(runs.claim(out))
    for step in (100, 200, 300):
        first.save(f"s{step}", step)
    del first.course
    again = Saver(first.epoch)
    again.save("s1", 1)
    assert newest(out)[0] == "s1"
    assert again.prune(2) == ["s100", "s200"]
    again.save("s2", 2)
    assert again.prune(2) == ["s300"]


def test_two_engines_in_one_folder_keep_each_its_own(saver: Saver) -> None:
    other = Saver(saver.epoch)
    for step in (1, 2, 3):
        saver.save(f"s{10 * step}", 10 * step)
        other.save(f"s{step}", step)
    assert saver.prune(1) == ["s10", "s20"]
    assert other.prune(2) == ["s1"]
    assert newest(saver.epoch.output_dir) == ["s3", "s30", "s2"]


def test_engines_of_other_clusters_and_names_of_another_kind_are_series(tmp_path: Path) -> None:
    epoch = runs.claim(tmp_path / "run")
    actor, critic = Saver(epoch, {"actor": 1}), Saver(epoch, {"critic": 1})
    for step in (1, 2, 3):
        actor.save(f"step{step}", step)
        critic.save(f"step{10 * step}", step)
        if step == 1:
            actor.save("best", step)
            actor.save("epoch1/step0", step)
    assert actor.prune(1) == ["step1", "step2"]
    assert critic.prune(1) == ["step10", "step20"]
    assert newest(epoch.output_dir) == ["step30", "step3", "epoch1/step0", "best"]
    del actor, critic
    after = Saver(runs_restarted(epoch), {"critic": 1})
    after.save("step7", 7)  # without having resumed: it goes on where critic was, and not with actor's
    assert after.prune(1) == ["step30"]


def runs_restarted(epoch: Epoch) -> Epoch:
    epoch.release()
    return runs.claim(epoch.output_dir)


def test_what_was_saved_before_there_were_lineages_is_older_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs.history(out, [5, 6])  # their lineage is empty, as in older formats
    saver = Saver(runs.claim(out))
    saver.load("checkpoint-6")
    saver.save("checkpoint-7", 7)
    assert newest(out) == ["checkpoint-7", "checkpoint-6", "checkpoint-5"]
    assert saver.prune(2) == ["checkpoint-5"]


def test_a_command_prunes_every_series(saver: Saver) -> None:
    other = Saver(saver.epoch)
    for step in (1, 2):
        saver.save(f"a{step}", step)
        other.save(f"b{step}", step)
    (saver.epoch.output_dir / "latest").unlink()
    assert sorted(retention.prune(saver.epoch.output_dir, saver.epoch, 1)) == ["a1", "b1"]


def test_a_forged_lineage_is_refused_or_ends(tmp_path: Path) -> None:
    record = records.Record if hasattr(records, "Record") else retention.Record
    lineage = records.Lineage(1, "s", "a", "1.2")
    other = records.Lineage(2, "s", "b", "1.1")
    circle = [record("x", 1, 0.0, 1, False, "1.1", lineage), record("y", 2, 0.0, 1, False, "1.2", other)]
    assert retention.doomed(circle, 1) == ["x"] or retention.doomed(circle, 1) == []
    data = records.Expected("n", 1, "r", 1, 1, {"a": 1}, True, "s", records.Lineage(1, "x" * 65)).to_bytes()
    with pytest.raises(Damaged):
        records.parse_expected(data, "here")
    old = records.Expected("n", 1, "r", 1, 1, {"a": 1}, True, "s", format=2)
    assert b"lineage" not in old.to_bytes()
    assert records.parse_expected(old.to_bytes(), "here").lineage == NO_LINEAGE


def test_a_copy_under_another_name_is_listed_by_it_and_is_never_pruned(saver: Saver) -> None:
    out = saver.epoch.output_dir
    for step in (1, 2, 3):
        saver.save(f"s{step}", step)
    shutil.copytree(out / "s1", out / "best")
    shutil.move(out / "s2", out / "kept")
    assert verification.verify_run(out) == []
    assert [m.name for m in listing.committed(out)] == ["s1", "s3"]
    assert sorted(newest(out)) == ["best", "kept", "s1", "s3"] and newest(out)[0] == "s3"
    assert saver.prune(1) == ["s1"] and sorted(newest(out)) == ["best", "kept", "s3"]
    shutil.copytree(out / "s3", out / "s9")
    with pytest.raises(Damaged, match="is this directory a copy"):
        raise next(iter(_problems(out)))


def _problems(out: Path) -> list[Exception]:
    found: list[Exception] = []
    listing.committed(out, found.append)
    return found


def test_jobs_that_save_together_have_one_series_and_segment_in_each_epoch(tmp_path: Path) -> None:
    """The first job to begin an attempt names its lineage; only one of the jobs prunes."""
    expected = {"actor": 1, "critic": 1}
    found = []
    for cluster in expected:
        with process.installed(process.Process()):
            settings = Settings(run_id="together")
            request = Request(tmp_path / cluster, "checkpoint-1", 1, {cluster: 1}, expected)
            save = begin(RankGroup(0, 1, None), request, settings, nbytes=1)
            path = save.attempt.checkpoint_dir / "votes/expected.json"
            found.append(records.parse_expected(path.read_bytes(), path).lineage)
            assert found[-1].series == request.course.series, "what it prunes"
            save.fail_to_begin(SaveFailed("the test is over"))
            process.part(PendingSaves)._remove(save)
    assert found[0] == found[1] and found[0].segment == "1"
