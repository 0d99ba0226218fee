"""Faults of the local Hub that a test injects: which call of which route fails, and how."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from roll_ckpt.errors import ConfigError

# The message of the real Hub for a status, and the X-Error-Code from which its client chooses an exception.
_SAYS: dict[int, tuple[str, str | None]] = {
    401: ("Invalid credentials in Authorization header", None),
    403: ("Forbidden: you are not allowed to do this", None),
    404: ("Repository not found", "RepoNotFound"),
    409: ("Conflict with the state of this repository", None),
    412: ("A commit has happened since. Please refresh and try again.", None),
    429: ("Too many requests", None),
    500: ("Internal Error", None),
    503: ("Service unavailable", None),
}


@dataclass(frozen=True)
class Fault:
    """One fault: exactly one of `status` and `cut_at`, or `stall_s` alone or with either. ConfigError otherwise."""

    route: str
    """The name of a route as in the request log, or "*" for every route."""
    call: int = 1
    """The first call of the route that fails, counted from 1 since the fault was added."""
    times: int = 1
    """How many calls in a row fail; 0: all that follow."""
    status: int | None = None
    """Answer with this HTTP status."""
    message: str = ""
    """The message of the error; by default that of the real Hub for the status."""
    code: str = ""
    """The X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo; for 404 the first by default."""
    retry_after_s: int | None = None
    """The Retry-After header of the answer."""
    stall_s: float = 0.0
    """Wait so many seconds first; then fail, or answer as usual if the fault says nothing else."""
    cut_at: int | None = None
    """Cut the connection after so many bytes of the answer's body; 0: without an answer."""
    landed: bool = False
    """Carry out the request before failing."""

    def __post_init__(self) -> None:
        if problem := _objection(self):
            raise ConfigError(f"fault for {self.route!r}: {problem}")

    def says(self) -> tuple[str, str | None]:
        """The message and the X-Error-Code of the answer."""
        message, code = _SAYS.get(self.status or 0, (f"Injected error {self.status}", None))
        return (self.message or message, self.code or (None if self.message else code))


def parse(value: object) -> Fault:
    """A fault from parsed JSON; ConfigError, saying what is wrong, if it is none."""
    if not isinstance(value, dict) or not isinstance(value.get("route"), str):
        raise ConfigError('a fault is an object with a "route", such as {"route": "commit", "status": 503}')
    keys = {field.name for field in fields(Fault)}
    if unknown := sorted(value.keys() - keys):
        raise ConfigError(f"a fault has no key {unknown[0]!r}; it has {', '.join(sorted(keys))}")
    return Fault(**value)


def _objection(fault: Fault) -> str:
    """Why a fault makes no sense; "" if it does."""
    return _wrong_type(fault) or _wrong_value(fault) or _wrong_combination(fault)


def _wrong_type(fault: Fault) -> str:
    for name, kinds in (
        *((name, (int,)) for name in ("call", "times")),
        *((name, (int, type(None))) for name in ("status", "retry_after_s", "cut_at")),
        *((name, (str,)) for name in ("route", "message", "code")),
        ("stall_s", (int, float)),
        ("landed", (bool,)),
    ):
        if type(getattr(fault, name)) not in kinds:
            return f"{name} cannot be {getattr(fault, name)!r}"
    return ""


def _wrong_value(fault: Fault) -> str:
    if fault.call < 1 or fault.times < 0 or fault.stall_s < 0 or min(fault.cut_at or 0, fault.retry_after_s or 0) < 0:
        return "call counts from 1, and no other number may be negative"
    if fault.status is not None and not 400 <= fault.status < 600:
        return f"status {fault.status} is no error"
    return ""


def _wrong_combination(fault: Fault) -> str:
    if fault.status is None and fault.cut_at is None and not fault.stall_s:
        return "give a status, cut_at or stall_s"
    if fault.status is not None and fault.cut_at is not None:
        return "status and cut_at exclude each other"
    if fault.status is None and (fault.message or fault.code or fault.retry_after_s is not None):
        return "message, code and retry_after_s go with a status"
    return ""


class Faults:
    """The faults of a server. Any thread may call."""

    def __init__(self, routes: Collection[str]) -> None:
        self._routes = routes
        self._lock = threading.Lock()
        self._calls: list[tuple[Fault, int]] = []

    def add(self, fault: Fault) -> None:
        """Add a fault. Of several that fit a call, the first that was added happens. ConfigError: no such route."""
        if fault.route != "*" and fault.route not in self._routes:
            raise ConfigError(f"no route {fault.route!r}; there are {', '.join(sorted(self._routes))}")
        with self._lock:
            self._calls.append((fault, 0))

    def clear(self) -> None:
        """Remove all faults."""
        with self._lock:
            self._calls.clear()

    def pending(self) -> list[dict[str, Any]]:
        """The faults that can still happen, each with the number of calls that it has counted."""
        with self._lock:
            return [
                {**asdict(fault), "seen": seen}
                for fault, seen in self._calls
                if not fault.times or seen < fault.call + fault.times - 1
            ]

    def hit(self, route: str) -> Fault | None:
        """Count one call of a route; return the fault that this call shall have, if any."""
        hit = None
        with self._lock:
            for at, (fault, seen) in enumerate(self._calls):
                if fault.route not in (route, "*"):
                    continue
                self._calls[at] = (fault, seen + 1)
                late = seen + 1 - fault.call
                if hit is None and late >= 0 and (not fault.times or late < fault.times):
                    hit = fault
        return hit
