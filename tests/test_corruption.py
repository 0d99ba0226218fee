"""Damage of every kind to every kind of file of real checkpoints: found, named, and refused by every load.

`make test` takes a sample with each kind of harm and each kind of file; the whole matrix is long.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from corruption import FILE_KINDS, KINDS, WHOLE, Named, Patient, file_kind, plain_user
from megatron_worlds import MISSING, Worlds

from roll_ckpt.cli import main, printing
from roll_ckpt.config import Settings
from roll_ckpt.errors import Damaged, NotFound, Unreadable
from roll_ckpt.load.checkpoint import OpenedCheckpoint
from roll_ckpt.load.reader import open_reader
from roll_ckpt.load.together import check_bytes
from roll_ckpt.ranks.group import RankGroup
from roll_ckpt.transaction import verification

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)

CASES = "corruption_cases"
UNITS = {
    "actor": ("global_step2", "global_step1"),
    "reward": ("global_step2", "global_step1"),
    "critic": ("iter_2", "iter_1"),
    "run": ("checkpoint-2", "checkpoint-1"),
}
"""What was saved: by plain DeepSpeed at ZeRO-3 and at ZeRO-2, by Megatron, by a pipeline; the step before it."""

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
        assert verification.verify(made[way].checkpoint_dir) == []
    return made


@contextlib.contextmanager
def seconds(limit: int) -> Iterator[None]:
    """A load that waits for ever fails here."""
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)


def what_a_load_says(checkpoint_dir: Path) -> str:
    """What the checks before any load say; "" if the checkpoint would be loaded."""
    try:
        with open_reader(checkpoint_dir, Settings()):
            check_bytes(RankGroup(0, 1, None), checkpoint_dir, 60)
    except (Damaged, Unreadable) as problem:
        return str(problem)
    return ""


def reads_bytes_that_changed(checkpoint_dir: Path, path: str) -> bool:
    """Whether the bytes of a file are read although they are not as they were written: without the check before."""
    try:
        opened = OpenedCheckpoint(checkpoint_dir)
        opened.read(checkpoint_dir / path, Settings())
    except (Damaged, NotFound, OSError):
        return False
    return True


def missed(patient: Patient, named: Named) -> str:
    """What is wrong about how this damage is caught, "" if nothing is."""
    found: Named = {}
    for problem in verification.verify(patient.checkpoint_dir):
        found.setdefault(problem.path, set()).add(problem.kind)
    said = what_a_load_says(patient.checkpoint_dir)
    for path, kinds in named.items():
        if not found.get(path, set()) & kinds:
            return f"verify tells {found}, and not that {path} is {' or '.join(kinds)}"
        if path not in said and len(found) <= 10:
            return f"a load says {said!r}, and nothing of {path}"
        if file_kind(path) in READ and reads_bytes_that_changed(patient.checkpoint_dir, path):
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


def command_line_tells(checkpoint_dir: Path, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether `roll-ckpt verify` prints what `verify.verify` finds, and ends with 3."""
    found = [asdict(problem) for problem in verification.verify(checkpoint_dir)]
    capsys.readouterr()
    code = main.main(["verify", str(checkpoint_dir), "--json"])
    return code == printing.DAMAGED and json.loads(capsys.readouterr().out)["problems"] == found


def run_matrix(
    patients: dict[str, Patient], chosen: list[Cell], also: Callable[[Path], bool] = lambda checkpoint_dir: True
) -> Counter[tuple[str, str]]:
    """How many of these cells were there of each kind and kind of file. Fails with a table if one was missed."""
    tried: Counter[tuple[str, str]] = Counter()
    wrong = []
    for cell in chosen:
        named = harmed(patients, cell)
        if named is None:
            continue
        tried[cell[:2]] += 1
        with seconds(60), plain_user():
            problem = missed(patients[cell[2]], named)
            problem = problem or (
                "" if also(patients[cell[2]].checkpoint_dir) else "the command line says something else"
            )
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


def test_each_kind_of_damage_and_of_file_is_caught(
    patients: dict[str, Patient], capsys: pytest.CaptureFixture[str]
) -> None:
    every = {file_kind(path) for patient in patients.values() for path in patient.files()}
    assert every == set(FILE_KINDS), "there are kinds of files that are not damaged"
    tried = run_matrix(patients, sample(patients), lambda checkpoint_dir: command_line_tells(checkpoint_dir, capsys))
    assert {file for _, file in tried} == set(FILE_KINDS)
    assert {kind for kind, _ in tried} == set(KINDS)


@pytest.mark.long
def test_every_kind_of_damage_to_every_file_is_caught(patients: dict[str, Patient]) -> None:
    tried = run_matrix(patients, cells(patients))
    assert {file for _, file in tried} == set(FILE_KINDS)
    for kind in ("one bit flipped", "cut to nothing", "missing", "renamed", "a pipe"):
        assert {file for harm, file in tried if harm == kind} == set(FILE_KINDS)


@pytest.mark.parametrize("harm", WHOLE)
def test_records_of_another_checkpoint_are_caught(patients: dict[str, Patient], harm: str) -> None:
    for patient in patients.values():
        patient.heal()
        assert missed(patient, WHOLE[harm](patient)) == ""


# --- real loads ----------------------------------------------------------------------------------------------

SAMPLE = [
    ("one bit flipped", "actor/checkpoint-2/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    ("4 KiB of zeros", "critic/__1_0.distcp"),
    ("a pipe", "votes/expected.json"),
    ("renamed", "manifest.json"),
]
"""Harm to the newest step of a run, which resumes from the one before."""

LONG = [
    ("cut to nothing", "manifest.json"),
    ("of another step", "manifest.json"),
    ("of another run", "decision"),
    ("missing", "votes/critic.1.json"),
    ("missing", "votes/expected.json"),
    ("a dangling link", "votes/expected.json"),
    ("one bit of the last byte", "digests/actor.0.json"),
    ("two blocks swapped", "tensors/critic.0.index"),
    ("extended by one byte", "pipeline/worker_state_pipeline.json"),
    ("swapped with another rank's", "pipeline/rng_state_rank_1.pth"),
    ("of another run", "pipeline/stateful_cursor_rank_0.pth"),
    ("of another step", "actor/latest"),
    ("a directory", "actor/checkpoint-2/zero_pp_rank_0_mp_rank_00_model_states.pt"),
    ("swapped with another rank's", "actor/checkpoint-2/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    ("of another step", "reward/checkpoint-2/mp_rank_00_model_states.pt"),
    ("missing", "critic/.metadata"),
    ("cut at a block", "critic/common.pt"),
    ("a copy beside it", "critic/__0_0.distcp"),
]


NOTHING_LEFT = [("missing", "manifest.json"), ("cut to nothing", "decision")]
"""Harm to each step of a run."""


def damaged(built: Path, out: Path, way: str, *harms: tuple[str, str], name: str | None = None) -> list[str]:
    """A copy of what was saved in this way, with harm to its newest step, or to the one of this name; the paths that
    are to be named."""
    ours, another = built / "ours" / way, built / "another" / way
    if not out.exists():
        # The record of the run that saved is locked by it, also under another name.
        shutil.copytree(ours, out, copy_function=os.link, ignore=shutil.ignore_patterns(".epochs"))
    newest, older = UNITS[way]
    hurt = name or newest
    patient = Patient(out / hurt, ours / hurt, ours / older, another / newest)
    named = [KINDS[kind](patient, path) for kind, path in harms]
    assert None not in named
    return [path for one in named for path in one or ()]


@pytest.mark.parametrize("harms", [SAMPLE, pytest.param(LONG, marks=pytest.mark.long)])
def test_a_run_resumes_from_the_newest_sound_step_and_says_which_it_refused_and_why(
    megatron: Worlds, built: Path, tmp_path: Path, harms: list[tuple[str, str]]
) -> None:
    outs = [tmp_path / str(at) for at in range(len(harms) + len(NOTHING_LEFT))]
    named = [damaged(built, out, "run", harm) for out, harm in zip(outs, harms, strict=False)]
    for out, harm in zip(outs[len(harms) :], NOTHING_LEFT, strict=True):
        for name in UNITS["run"]:
            damaged(built, out, "run", harm, name=name)
    damaged(built, tmp_path / "sound", "run")
    told = megatron.at("DP2").call(f"{CASES}:fall_back", str(tmp_path / "sound"), list(map(str, outs)))
    for rank, found in enumerate(told):
        for harm, paths, (step, said, right) in zip(harms, named, found, strict=False):
            assert (step, right) == (1, True), (harm, step, said)
            assert "taking checkpoint-1; refused: checkpoint-2" in said
            # What the records tell rank 0 has said; what the bytes tell, all.
            assert rank or all(path in said for path in paths), (harm, said)
        for step, said, untouched in found[len(harms) :]:
            assert step.startswith("Damaged") and "none of its checkpoints is sound" in step, (step, said)
            assert "checkpoint-1" in step and "checkpoint-2" in step and untouched


def test_plain_loads_refuse_damage_on_every_rank_and_fall_back_only_where_nothing_was_asked_for(
    megatron: Worlds, built: Path, tmp_path: Path
) -> None:
    bits = {
        "actor": "zero_pp_rank_1_mp_rank_00_model_states.pt",
        "reward": "mp_rank_00_model_states.pt",
        "critic": "__1_0.distcp",
    }
    for way, path in bits.items():
        damaged(built, tmp_path / way, way, ("one bit flipped", path))
    for name in UNITS["actor"]:
        damaged(built, tmp_path / "none sound", "actor", ("one bit flipped", bits["actor"]), name=name)
        damaged(built, tmp_path / "none with a manifest", "actor", ("missing", "manifest.json"), name=name)
    (tmp_path / "none with a manifest" / "latest").unlink()
    for name in UNITS["critic"]:
        damaged(built, tmp_path / "no critic", "critic", ("one bit flipped", "decision"), name=name)
    for told in megatron.at("DP2").call(f"{CASES}:load_plain", str(tmp_path)):
        for name in ("none sound", "none with a manifest", "no critic"):
            said, _, untouched = told[name]
            assert said.startswith("Damaged") and "none of its checkpoints is sound" in said and untouched, told
            assert all(hurt in said for hurt in UNITS["critic" if name == "no critic" else "actor"])
        for name, path in (("asked for", bits["actor"]), ("reward", bits["reward"]), ("critic", bits["critic"])):
            said, _, untouched = told[name]
            assert said.startswith("Damaged") and path in said and untouched, told
        said, log, untouched = told["newest"]
        assert "global_step1" in said and not untouched
        assert bits["actor"] in log and "taking global_step1; refused: global_step2" in log
        said, log, untouched = told["newest critic"]
        assert "critic/iter_1'), 1)" in said and not untouched, said
        assert bits["critic"] in log and "taking iter_1; refused: iter_2" in log


def test_what_one_rank_alone_finds_damaged_all_pass_over_together(
    megatron: Worlds, built: Path, tmp_path: Path
) -> None:
    for way in ("actor", "critic", "run"):
        damaged(built, tmp_path / way, way)
    for told in megatron.at("DP2").call(f"{CASES}:load_where_one_rank_differs", str(tmp_path), "damaged"):
        said, untouched = told.pop("critic by path")
        assert said.startswith("Damaged") and "iter_2/manifest.json" in said and untouched
        assert "global_step1" in told["actor"][0] and told["critic"][0].endswith("iter_1"), told
        assert told["run"] == ("1", False)


def test_nothing_older_is_loaded_because_a_disk_refuses_one_rank(megatron: Worlds, built: Path, tmp_path: Path) -> None:
    for way in ("actor", "critic", "run"):
        damaged(built, tmp_path / way, way)
    world = megatron.at("DP2")
    for rank in (0, 1):
        for told in world.call(f"{CASES}:load_where_one_rank_differs", str(tmp_path), "refused", rank):
            assert len(told) == 4
            for said, untouched in told.values():
                assert said.startswith("Unreadable") and "2/manifest.json: it cannot be read: Input/output err" in said
                assert "choose another one by hand" in said and untouched
    for told in world.call(f"{CASES}:load_where_one_rank_differs", str(tmp_path), "refused", 0, 1):
        # The names of a pipeline tell what is older; of others only their manifests do, but `latest` comes first.
        assert told["run"][0] == "2" and "global_step2" in told["actor"][0]
        assert told["critic"][0].startswith("Unreadable") and "iter_1/manifest.json" in told["critic"][0]


def test_bytes_that_change_after_the_check_are_refused_as_they_are_read(
    megatron: Worlds, built: Path, tmp_path: Path
) -> None:
    paths = {
        "reward": ["global_step2/mp_rank_00_model_states.pt"],
        "critic": ["iter_2/__1_0.distcp", "iter_2/.metadata", "iter_2/common.pt"],
        "run": ["checkpoint-2/critic/__0_0.distcp", "checkpoint-2/pipeline/worker_state_pipeline.json"],
    }
    for way, changed in paths.items():
        for path in changed:
            damaged(built, tmp_path / f"{way} {Path(path).name}", way)
    for told in megatron.at("DP2").call(f"{CASES}:change_after_the_check", str(tmp_path), paths):
        assert len(told) == 6
        for path, said in told.items():
            assert said.startswith("Damaged") and path in said, (path, said)
