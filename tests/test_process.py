"""The registry of what exists once in a process: made when asked for, left in order, not inherited by a fork."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import runs

from roll_ckpt import process
from roll_ckpt.process import Exit, Process

LEFT: list[str] = []


class Plain:
    """A part that needs no leaving."""


class Threads:
    exit: ClassVar[Exit] = Exit.THREADS

    def leave(self) -> None:
        LEFT.append("threads")


class Saves:
    exit: ClassVar[Exit] = Exit.SAVES

    def leave(self) -> None:
        LEFT.append("saves")


def test_a_part_is_made_once_in_a_registry() -> None:
    with process.installed(Process()) as registry:
        one = process.part(Plain)
        assert process.part(Plain) is one is registry.part(Plain) and process.current() is registry
    assert process.current() is not registry


def test_parts_are_left_in_the_order_of_exit_when_a_registry_is_thrown_away() -> None:
    LEFT.clear()
    before = process.current()
    with pytest.raises(ZeroDivisionError), process.installed(Process()):
        process.part(Threads)
        process.part(Saves)
        raise ZeroDivisionError
    assert LEFT == ["saves", "threads"] and process.current() is before


def test_a_forked_child_starts_with_an_empty_registry() -> None:
    with process.installed(Process()) as registry:
        one = process.part(Plain)

        def child() -> None:
            assert process.current() is not registry and process.part(Plain) is not one

        with registry._lock:  # as if another thread held it while this one forks
            assert runs.ended(runs.forked(child)) == 0
        assert process.part(Plain) is one


def test_the_interpreter_leaves_the_parts_that_are_there() -> None:
    code = (
        "from roll_ckpt import process\n"
        "class Part:\n"
        "    exit = process.Exit.CLAIMS\n"
        "    def leave(self):\n"
        "        print('left', flush=True)\n"
        "process.part(Part)\n"
        "print('end', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "end\nleft\n" and done.returncode == 0
