"""The benchmark of movement: it runs, what it reads off is what happened, and a miss is called one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.movement import machine, measure, report, systems

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20


@pytest.mark.long
def test_a_run_of_ours_alone_fills_the_table_and_the_file(tmp_path: Path) -> None:
    told = ["--quick", "--mib", "64", "--tensors", "20", "--many", "40", "--rounds", "1", "--loop-rounds", "1"]
    told += ["--only", "nobody", "--output", str(tmp_path), "--directory", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.movement", *told]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "(b) save() and fence() at once" in done.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["seconds"]["systems"]["roll_ckpt"].keys() == {"save", "blocked", "durable", "load", "cached"}
    assert found["blank"]["torch.save"] == "left out by --only"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("movement-")] == []


def test_the_state_has_the_size_asked_for_and_only_finite_numbers() -> None:
    state = measure.make_state(4 * MIB, 50)
    assert len(state) == 50
    assert 0.98 * 4 * MIB < measure.bytes_of(state) < 1.02 * 4 * MIB
    assert all(tensor.isfinite().all() for tensor in state.values())
    again = measure.make_state(4 * MIB, 50)
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_memcpy_copies_every_byte() -> None:
    state = measure.make_state(2 * MIB, 7)
    target = machine.HugePages(measure.bytes_of(state))
    machine.Copier(list(state.values()), target)()
    wanted = b"".join(bytes(tensor.view(torch.uint8).numpy()) for tensor in state.values())
    assert target.memory[: len(wanted)] == wanted


def test_the_raw_disk_reads_back_what_it_wrote(tmp_path: Path) -> None:
    memory = machine.HugePages(3 * machine.BLOCK_BYTES)
    wanted = os.urandom(memory.nbytes)
    memory.memory[:] = wanted
    disk = machine.RawDisk(tmp_path, memory)
    for depth in machine.DEPTHS:
        disk.write(depth)
        memory.memory[:] = bytes(memory.nbytes)
        disk.read(depth)
        assert memory.memory[:] == wanted


def test_a_contestant_that_returns_other_bytes_is_found_out(tmp_path: Path) -> None:
    class Forgetful(systems.TorchSave):
        def load(self, directory: Path) -> systems.State:
            return {name: torch.zeros_like(tensor) for name, tensor in super().load(directory).items()}

    state = measure.make_state(MIB, 5)
    system = Forgetful()
    measure.save_once(system, state, tmp_path / "x")
    try:
        measure.load_once(system, state, tmp_path / "x", check=True)
    except SystemExit as problem:
        assert "not what was saved" in str(problem)
    else:
        raise AssertionError("nobody noticed")


def test_a_figure_over_its_limit_is_missed_and_one_that_was_not_measured_is_blank() -> None:
    assert report._at_most("f", 1.0, 1.0, "s").met is True
    assert report._at_most("f", 1.1, 1.0, "s").met is False
    assert report._at_least("f", 0.9, 1.0, "x").met is False
    assert report._at_most("f", float("nan"), 1.0, "s").met is None
    assert report._at_least("f", None, 1.0, "x").met is None
    assert report.verdict_lines([report._at_most("f", 1.1, 1.0, "s")])[0].startswith("MISSED")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_benchmark_of_the_gpu_refuses_without_one_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.count("\n") == 1 and "finds no CUDA device here: run it where" in done.stderr
