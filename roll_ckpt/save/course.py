"""Course: which checkpoints an engine or a pipeline continues when it saves; it gives each save its lineage."""

from __future__ import annotations

import hashlib
import secrets
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from roll_ckpt import names, process
from roll_ckpt.formats.manifests import Manifest
from roll_ckpt.formats.records import Lineage


class Course:
    """The course of one engine or pipeline through its checkpoints. Only that of rank 0 is written."""

    def __init__(self) -> None:
        self._lineage = Lineage(series=_new(), segment=_new())
        self._settled = False
        process.part(Courses).add(self)

    @property
    def lineage(self) -> Lineage:
        """The lineage of the next save; its `order` is set when the save begins."""
        return self._lineage

    @property
    def series(self) -> str:
        """The series in which this course saves, "" before format 3."""
        return self._lineage.series

    def resumed(self, manifest: Manifest | None) -> None:
        """From now on, saves continue the checkpoint of `manifest`; None: one that roll_ckpt has not saved."""
        if manifest is None:
            return
        loaded = f"{manifest.epoch}.{manifest.lineage.order}"
        self._lineage = Lineage(series=manifest.lineage.series, segment=_new(), continues=loaded)
        self._settled = True

    def settle(self, committed: Sequence[Manifest], clusters: Iterable[str], name: str) -> None:
        """Before the first save in a directory, unless something was resumed: take over the series that lies there.

        That is the newest one of the same clusters, and of names that differ in numbers only, which no other engine
        or pipeline of this process continues. Its checkpoints are an abandoned branch from then on.
        """
        if self._settled:
            return
        self._settled = True
        taken = process.part(Courses).series_of_others(self)
        for manifest in sorted(committed, key=lambda manifest: manifest.age, reverse=True):
            same = {*manifest.clusters} == {*clusters} and names.pattern(manifest.name) == names.pattern(name)
            if same and manifest.lineage.series not in taken:
                self._lineage = Lineage(series=manifest.lineage.series, segment=_new())
                return

    def share(self, run_id: str, epoch: int) -> None:
        """Let the jobs that save together name their series and segment alike: by their run and its epoch."""
        series = hashlib.sha256(run_id.encode()).hexdigest()[:16]
        self._lineage = replace(self._lineage, series=series, segment=str(epoch))
        self._settled = True

    @property
    def settled(self) -> bool:
        """Whether this course has resumed or saved."""
        return self._settled


class Courses:
    """The part of the `process` registry that knows all courses, and those of saves that belong to no engine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: weakref.WeakSet[Course] = weakref.WeakSet()
        self._by_place: dict[tuple[Path, str], Course] = {}

    def add(self, course: Course) -> None:
        """Know `course` for as long as it lives."""
        with self._lock:
            self._all.add(course)

    def series_of_others(self, course: Course) -> set[str]:
        """The series in which other courses of this process save."""
        with self._lock:
            return {other.series for other in self._all if other is not course and other.settled}

    def at(self, output_dir: Path, cluster: str) -> Course:
        """The one course of all saves of `cluster` into `output_dir` that no engine or handle makes."""
        key = (output_dir.resolve(), cluster)
        with self._lock:
            course = self._by_place.get(key)
        if course is None:
            course = self._by_place.setdefault(key, Course())
        return course


def _new() -> str:
    return secrets.token_hex(8)
