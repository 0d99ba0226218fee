"""Which packages roll_ckpt works with, in which versions, and what of that is installed in this interpreter."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

import roll_ckpt
from roll_ckpt.disk import witness

_LIMIT_S = 180.0
FINDER = "RollCkptFinder"
"""The name of the class in `activation.startup`, which nobody may import without becoming switched on."""


@dataclass(frozen=True)
class Supported:
    """The versions of a package that roll_ckpt was tested with, from `oldest` to `newest`; `3.13` is all of 3.13.x.

    `code` runs without an error if the package has all that roll_ckpt needs of it.
    """

    package: str
    oldest: str
    newest: str
    code: str = ""


SUPPORTED = (
    Supported("Python", "3.10", "3.13"),
    Supported("torch", "2.6", "2.14.1"),
    Supported("deepspeed", "0.16", "0.19.8", "import roll_ckpt.deepspeed"),
    Supported("megatron-core", "0.14", "0.19.2", "import roll_ckpt.megatron"),
    Supported("huggingface_hub", "0.34", "2.4.0", "from roll_ckpt.upload.hub import version; version.check_push()"),
    Supported("transformers", "4.57", "5.24.0"),
)
"""The one table of versions. The extras in pyproject.toml and docs/support.md say the same."""

_OTHERS = ("accelerate", "peft", "trl", "ray", "numpy", "pydantic")
"""Shown because they matter when something goes wrong; roll_ckpt asks for no particular version."""


@dataclass(frozen=True)
class Package:
    """One package of this interpreter. `version` is None if it is not installed; `verdict` and `note` are for people.

    `problem` is what keeps roll_ckpt from working with it; "" if nothing does.
    """

    name: str
    version: str | None
    supported: str
    verdict: str
    problem: str = ""
    note: str = ""


def packages() -> list[Package]:
    """Every package of the table and of those that are shown beside it; starts a process for each that is needed.

    Blocks for as long as the frameworks take to import, at most three minutes.
    """
    versions = {supported.package: _version(supported.package) for supported in SUPPORTED}
    asked = [s.code for s in SUPPORTED if s.code and versions[s.package]]
    problems = dict(zip(asked, problems_of(asked), strict=True))
    found = [_judge(supported, versions[supported.package], problems) for supported in SUPPORTED]
    others = [Package(name, _version(name), "", "") for name in _OTHERS]
    return [_ourselves(), *found, *(package for package in others if package.version)]


def _version(package: str) -> str | None:
    if package == "Python":
        return platform.python_version()
    versions = [found.version for found in metadata.distributions(name=package)]
    return versions[0] if versions else None


def _ourselves() -> Package:
    code = "from roll_ckpt.native.extension import cuda_compiled as c, cuda_status as s; print(s() if c else 'none')"
    done = _python(code)
    if done.returncode:
        return Package("roll_ckpt", roll_ckpt.__version__, "", "its extension does not load", _last_error(done.stderr))
    cuda = done.stdout.strip()
    note = "its extension was built without CUDA: it saves tensors of the CPU only" if cuda == "none" else cuda
    verdict = "its extension loads, " + ("without CUDA" if cuda == "none" else "built with CUDA")
    return Package("roll_ckpt", roll_ckpt.__version__, "", verdict, note=note)


def _judge(supported: Supported, version: str | None, problems: dict[str, str]) -> Package:
    span = f"{supported.oldest} to {supported.newest}"
    if version is None:
        return Package(supported.package, None, span, "not installed")
    problem, fit = problems.get(supported.code, ""), compare(version, supported)
    if problem:
        return Package(supported.package, version, span, "does not work", problem)
    if fit < 0:
        advice = f"{supported.package} {version} is older than {supported.oldest}, the oldest that roll_ckpt supports"
        return Package(supported.package, version, span, "too old", f"{advice}; install a newer one")
    verdict = "supported" if not fit else "newer than any that was tested"
    return Package(supported.package, version, span, verdict + ("; all we need is there" if supported.code else ""))


def compare(version: str, supported: Supported) -> int:
    """-1 if the version is older than those of the table, 1 if it is newer, else 0."""
    at, oldest, newest = map(_numbers, (version, supported.oldest, supported.newest))
    if at[: len(oldest)] + (0,) * (len(oldest) - len(at)) < oldest:
        return -1
    return 1 if at[: len(newest)] > newest else 0


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 13, 0) of `2.13.0+cpu`, (0, 16) of `0.16rc1`."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()


def has_pth() -> bool:
    """Whether a new process of this interpreter waits for the import of a framework: roll_ckpt.pth was run."""
    code = f"print(any(getattr(finder, '__name__', '') == {FINDER!r} for finder in sys.meta_path))"
    return _python(code).stdout.strip() == "True"


def problems_of(codes: Sequence[str]) -> list[str]:
    """For each piece of code: "" if a process of its own can run it, else why not, in one line. All run at once."""
    children = [_start(code) for code in codes]
    return [_last_error(done.stderr) if done.returncode else "" for done in map(_finish, children)]


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return _finish(_start(code))


def _start(code: str) -> subprocess.Popen[str]:
    """A process of this interpreter that imports from where this one does, and that nothing has switched on."""
    left_out = ("ROLL_CKPT", "ROLL_CKPT_OPTIONAL", "ROLL_CKPT_RUN", witness.VARIABLE)
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:] = {json.dumps(sys.path)}; {code}"],
        env={name: value for name, value in os.environ.items() if name not in left_out},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _finish(child: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, errors = child.communicate(timeout=_LIMIT_S)
    except subprocess.TimeoutExpired as late:
        child.kill()
        child.communicate()
        return subprocess.CompletedProcess(child.args, 1, "", f"no answer: {late}")
    return subprocess.CompletedProcess(child.args, child.returncode, out, errors)


def _last_error(text: str) -> str:
    """The exception that ended a process, without its traceback, in one line."""
    lines = text.rstrip().splitlines() or ["it ended without a word"]
    traces = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    after = lines[traces[-1] + 1 :] if traces else lines[-1:]
    message = after[next((n for n, line in enumerate(after) if not line.startswith(" ")), -1) :]
    return " ".join(line.strip() for line in message)
