"""Which processes of a watched command run through roll_ckpt, and why not the others. Runs and prints nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from roll_ckpt.cli.watching import Seen

YES, NO, UNKNOWN, IDLE, LAUNCHER = "yes", "no", "unknown", "no engine", "launcher"
_NAMES = {"deepspeed": "DeepSpeed", "megatron.core": "Megatron-core"}
_OPTIONS_WITH_VALUE = ("-W", "-X")
_DEAF = re.compile(r"-(?![WX])[A-Za-z]*[IES][A-Za-z]*")
"""Options with which Python does not run `sitecustomize`, or not from where PYTHONPATH says."""
_CHAIN = 4


@dataclass(frozen=True)
class Verdict:
    """Whether processes that are alike run through roll_ckpt. `chain` is who started them, the command first."""

    state: str
    reason: str
    advice: str
    interpreter: str
    chain: str
    ranks: tuple[int, ...]
    pids: tuple[int, ...]


def judge(processes: dict[int, Seen]) -> list[Verdict]:
    """One verdict for all processes that are alike, of those that imported a framework or could not be asked."""
    importing = {pid for pid, seen in processes.items() if _frameworks(seen)}
    grouped: dict[tuple[str, ...], Verdict] = {}
    for pid, seen in sorted(processes.items()):
        launches = any(pid in _ancestors(processes[other], processes) for other in importing)
        found = _of_told(seen, launches) if pid in importing else _of_silent(seen, processes)
        if found is None:
            continue
        one = _verdict(seen, found, processes)
        key = (one.state, one.reason, one.advice, one.interpreter, one.chain)
        before = grouped.get(key, replace(one, ranks=(), pids=()))
        grouped[key] = replace(before, ranks=before.ranks + one.ranks, pids=before.pids + one.pids)
    return list(grouped.values())


def all_through_us(verdicts: Iterable[Verdict]) -> bool:
    """True if some process runs through roll_ckpt, and none runs past it, as far as could be told."""
    states = {verdict.state for verdict in verdicts}
    return YES in states and not states & {NO, UNKNOWN}


def _frameworks(seen: Seen) -> list[str]:
    return sorted({event["framework"] for event in seen.told if "framework" in event})


def _verdict(seen: Seen, found: tuple[str, str, str], processes: dict[int, Seen]) -> Verdict:
    ranks = [event["rank"] for event in seen.told if event["rank"] is not None]
    executables = [event["executable"] for event in seen.told if event["executable"]]
    chain = [_label(processes[pid].command) for pid in reversed(list(_ancestors(seen, processes)))]
    labels = [*chain, _label(seen.command)]
    distinct = [label for number, label in enumerate(labels) if label != (labels[number - 1] if number else None)]
    shown = distinct if len(distinct) <= _CHAIN else [distinct[0], "…", *distinct[-_CHAIN + 2 :]]
    interpreter = executables[-1] if executables else seen.executable
    return Verdict(*found, interpreter, " > ".join(shown), tuple(ranks[-1:]), (seen.pid,))


def _of_told(seen: Seen, launches: bool) -> tuple[str, str, str]:
    """The verdict on a process that told of a framework: state, reason, advice."""
    engines: dict[Any, dict[str, Any]] = {event["id"]: event for event in seen.told if event["event"] == "engine"}
    installed = {event["framework"] for event in seen.told if event["event"] == "installed"}
    names = " and ".join(_NAMES[framework] for framework in _frameworks(seen))
    past_us = [event for event in engines.values() if event["ours"] is False]
    ours = sum(event["ours"] is True for event in engines.values())
    if past_us:
        few = f"{len(past_us)} of {len(engines)} engines" if len(engines) > 1 else "its engine"
        verb = "save" if len(past_us) > 1 else "saves"
        return NO, f"{few} {verb} through stock {names}: {past_us[0]['why']}", past_us[0]["advice"]
    if ours:
        return YES, f"{'its engine saves' if ours == 1 else f'its {ours} engines save'} through roll_ckpt", ""
    if "megatron.core" in installed and not launches:
        return YES, f"what it saves by {_NAMES['megatron.core']} goes through roll_ckpt", ""
    if launches:
        return LAUNCHER, f"imports {names} and starts the others", ""
    if installed:
        return IDLE, f"roll_ckpt is on there; it built no engine with {names}", ""
    return NO, *_why_not_installed(names, seen.told)


def _why_not_installed(names: str, told: list[dict[str, Any]]) -> tuple[str, str]:
    """Why a process that imported a framework did not get roll_ckpt, and what to do."""
    refused = [event["why"] for event in told if event["event"] == "refused"]
    if refused:
        return f"roll_ckpt could not be switched on: {refused[-1]}", "mend that; until then the process does not train"
    imports = next(event for event in told if event["event"] == "imports")
    if not imports["has_roll_ckpt"]:
        advice = f"install roll_ckpt there: {imports['executable']} -m pip install …"
        return f"it imports stock {names}, and its interpreter has no roll_ckpt", advice
    if not imports["variable"]:
        advice = "set ROLL_CKPT=1, or import roll_ckpt.deepspeed or roll_ckpt.megatron in its script"
        return f"it imports stock {names}, and nothing switches roll_ckpt on: ROLL_CKPT is not set there", advice
    return f"it imports stock {names}, although ROLL_CKPT is {imports['variable']!r} there", (
        "see what `roll-ckpt doctor` of its interpreter says about activation: "
        f"{imports['executable']} -m roll_ckpt doctor"
    )


def _of_silent(seen: Seen, processes: dict[int, Seen]) -> tuple[str, str, str] | None:
    """The verdict on a process that told of no framework; None if it is of no concern here.

    Each Python process tells that it starts, but those that ignore PYTHONPATH or whose environment was cleaned.
    """
    parent = processes.get(seen.parent)
    if seen.told or not seen.has_torch or (parent is not None and parent.command == seen.command):
        return None  # it has no torch, uses no framework, or is a fork of one that is judged
    if not seen.reached:
        how = "it was started with an environment of its own, which lacks the variables"
        advice = "pass ROLL_CKPT on, or import roll_ckpt.deepspeed or roll_ckpt.megatron in its script"
    elif deaf := [word for word in _switches(seen.command) if _DEAF.fullmatch(word)]:
        how = f"it was started with {' '.join(deaf)}, and so ignores PYTHONPATH, by which processes are asked"
        advice = "start it without, or import roll_ckpt.deepspeed or roll_ckpt.megatron in its script"
    else:
        return None
    if seen.has_us:
        return UNKNOWN, f"{how}; it loads torch and roll_ckpt, but cannot be asked about its engines", ""
    return NO, f"{how}; it loads torch without roll_ckpt", advice


def _ancestors(seen: Seen, processes: dict[int, Seen]) -> Iterator[int]:
    """The ids of the processes of the command above this one, the nearest first."""
    passed = {seen.pid}
    while (pid := seen.parent) in processes and pid not in passed:
        passed.add(pid)
        yield pid
        seen = processes[pid]


def _label(command: list[str]) -> str:
    """A process in one or two words: the program, or what Python runs."""
    if not command:
        return "?"
    program = os.path.basename(command[0].split(" ")[0]) or command[0]
    if not program.startswith("python"):
        return program
    rest = command[1 + len(_switches(command)) :]
    if not rest:
        return program
    return {"-c": f"{program} -c …", "-m": " ".join(rest[1:2])}.get(rest[0], os.path.basename(rest[0]))


def _switches(command: list[str]) -> list[str]:
    """The options of the interpreter itself, before the script, -m or -c."""
    if not command or not os.path.basename(command[0]).startswith("python"):
        return []
    found: list[str] = []
    for word in command[1:]:
        takes_value = bool(found) and found[-1] in _OPTIONS_WITH_VALUE
        if not takes_value and (not word.startswith("-") or word in ("-", "-m", "-c")):
            break
        found.append(word)
    return found
