"""Damage of every kind to every kind of file of real checkpoints: found, named, and refused by every load.

`make test` takes a sample with each kind of harm and each kind of file; the whole matrix is long.
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from corruption import FILE_KINDS, KINDS, WHOLE, Named, Patient, file_kind
from megatron_worlds import MISSING, Worlds

from roll_ckpt import cli, errors, loader, verify
from roll_ckpt.config import Settings
from roll_ckpt.world import World

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CASES = "corruption_cases"
UNITS = {
    "run": ("checkpoint-2", "checkpoint-1"),
    "actor": ("global_step2", "global_step1"),
    "reward": ("global_step2", "global_step1"),
    "critic": ("iter_2", "iter_1"),
}
"""What was saved: by a pipeline, by plain DeepSpeed at ZeRO-3 and at ZeRO-2, by Megatron; the step before it."""

READ = {"ZeRO-3 model states", "model states and client state", "optimizer states", "distcp", ".metadata", "common.pt"}
READ |= {"metadata.json", "random numbers", "component", "pipeline state"}
"""The kinds of files whose bytes a load takes into a model or a pipeline."""


@pytest.fixture(scope="module")
def built(megatron: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a real run, and of another."""
    folder = tmp_path_factory.mktemp("built")
    megatron.at("DP2").call(f"{CASES}:build_runs", str(folder))
    return folder


@pytest.fixture(scope="module")
def patients(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Patient]:
    folder = tmp_path_factory.mktemp("patients")
    made = {}
    for way, (name, older) in UNITS.items():
        ours = built / "ours" / way
        made[way] = Patient.of(folder / way, ours / name, ours / older, built / "another" / way / name)
        assert verify.verify(made[way].unit) == []
    return made


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """A load that waits for ever fails here."""
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)


def what_a_load_says(unit: Path) -> str:
    """What the checks before any load say; "" if the checkpoint would be loaded."""
    try:
        with loader.reading(unit, Settings()):
            loader.check_bytes(World(0, 1, None), unit)
    except errors.Damaged as problem:
        return str(problem)
    return ""


def reads_bytes_that_changed(unit: Path, path: str) -> bool:
    """Whether the bytes of a file are read although they are not as they were written: without the check before."""
    try:
        opened = loader.Unit(unit)
        opened.read(unit / path, Settings())
    except (errors.Damaged, errors.NotFound, OSError):
        return False
    return True


def missed(patient: Patient, named: Named, *, by_bytes: bool = True) -> str:
    """What is wrong about how this damage is caught, "" if nothing is."""
    found: Named = {}
    for problem in verify.verify(patient.unit):
        found.setdefault(problem.path, set()).add(problem.kind)
    said = what_a_load_says(patient.unit)
    for path, kinds in named.items():
        if not found.get(path, set()) & kinds:
            return f"verify tells {found}, and not that {path} is {' or '.join(kinds)}"
        if path not in said and len(found) <= 10:
            return f"a load says {said!r}, and nothing of {path}"
        if by_bytes and file_kind(path) in READ and reads_bytes_that_changed(patient.unit, path):
            return f"{path} can be read"
    return "" if said else "it is loaded"


Cell = tuple[str, str, str, str]
"""A kind of harm, a kind of file, a way of saving, and a path."""


def cells(patients: dict[str, Patient]) -> list[Cell]:
    return [
        (kind, file_kind(path), way, path)
        for kind in KINDS
        for way, patient in patients.items()
        for path in patient.files()
    ]


def harmed(patients: dict[str, Patient], cell: Cell) -> Named | None:
    kind, _, way, path = cell
    patients[way].heal()
    return KINDS[kind](patients[way], path)


def run_matrix(patients: dict[str, Patient], chosen: list[Cell]) -> Counter[tuple[str, str]]:
    """How many of these cells were there of each kind and kind of file. Fails with a table if one was missed."""
    tried: Counter[tuple[str, str]] = Counter()
    wrong = []
    for cell in chosen:
        named = harmed(patients, cell)
        if named is None:
            continue
        tried[cell[:2]] += 1
        with seconds(60):
            problem = missed(patients[cell[2]], named, by_bytes=cell[0] != "in a linked directory")
        if problem:
            wrong.append((cell, problem))
    by_kind, bad = Counter(), Counter(cell[0] for cell, _ in wrong)
    for (kind, _), count in tried.items():
        by_kind[kind] += count
    table = "\n".join(f"{kind:30} {count - bad[kind]:5} of {count:5} caught" for kind, count in by_kind.items())
    print(f"{table}\n{'all':30} {tried.total() - len(wrong):5} of {tried.total():5} caught")
    assert not wrong, f"{table}\n" + "\n".join(f"{cell}: {problem}" for cell, problem in wrong[:20])
    return tried


def sample(patients: dict[str, Patient]) -> list[Cell]:
    """Few cells, in which each kind of harm, and each kind of file, is there."""
    every = cells(patients)
    files = list(FILE_KINDS)
    chosen: list[Cell] = []
    for at, kind in enumerate(KINDS):
        turned = files[at % len(files) :] + files[: at % len(files)]
        those = sorted((cell for cell in every if cell[0] == kind), key=lambda cell: turned.index(cell[1]))
        possible = (cell for cell in those if harmed(patients, cell) is not None)
        chosen += [cell for cell in [next(possible, None)] if cell]
    return chosen + [next(c for c in every if c[1] == file) for file in files if file not in {c[1] for c in chosen}]


def test_each_kind_of_damage_and_of_file_is_caught(patients: dict[str, Patient]) -> None:
    every = {file_kind(path) for patient in patients.values() for path in patient.files()}
    assert every == set(FILE_KINDS), "there are kinds of files that are not damaged"
    tried = run_matrix(patients, sample(patients))
    assert {file for _, file in tried} == set(FILE_KINDS)
    assert len({kind for kind, _ in tried}) >= len(KINDS) - 2  # root reads everything


@pytest.mark.long
def test_every_kind_of_damage_to_every_file_is_caught(patients: dict[str, Patient]) -> None:
    tried = run_matrix(patients, cells(patients))
    assert {file for _, file in tried} == set(FILE_KINDS)
    for kind in ("one bit flipped", "cut to nothing", "missing", "renamed", "a pipe", "a link to the same bytes"):
        assert {file for harm, file in tried if harm == kind} == set(FILE_KINDS)


@pytest.mark.parametrize("harm", WHOLE)
def test_records_of_another_checkpoint_are_caught(patients: dict[str, Patient], harm: str) -> None:
    for patient in patients.values():
        patient.heal()
        assert missed(patient, WHOLE[harm](patient)) == ""


def test_the_command_line_names_damage_of_each_kind_and_ends_with_3(
    patients: dict[str, Patient], capsys: pytest.CaptureFixture[str]
) -> None:
    for cell in sample(patients):
        named = harmed(patients, cell)
        with seconds(60):
            assert cli.main(["verify", str(patients[cell[2]].unit), "--json"]) == cli.DAMAGED, cell
        told = {(problem["path"], problem["kind"]) for problem in json.loads(capsys.readouterr().out)["problems"]}
        assert named is not None
        assert all(any((path, kind) in told for kind in kinds) for path, kinds in named.items()), cell
