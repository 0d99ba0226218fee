"""How the local Hub misbehaves when it is told to: which call of which route, and in what way."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any

from roll_ckpt.errors import ConfigError

# What the real Hub says with a status, and the X-Error-Code that its client makes an exception of.
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
    """One way to misbehave. Exactly one of `status` and `cut_at`, or `stall_s` alone or with either."""

    route: str
    """The name of a route as the request log has it, or "*"."""
    call: int = 1
    """Which call of that route it begins with, counted from when the fault was set."""
    times: int = 1
    """How many calls in a row misbehave; 0: all that follow."""
    status: int | None = None
    """Answer with this error."""
    message: str = ""
    """What the error says; by default what the real Hub says with that status."""
    code: str = ""
    """Its X-Error-Code: RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo; 404 has the first by default."""
    retry_after_s: int | None = None
    """Its Retry-After."""
    stall_s: float = 0.0
    """Say nothing for so long; then misbehave as said, or else answer as usual."""
    cut_at: int | None = None
    """Cut the connection: 0 without an answer, else after so many bytes of the answer's body."""
    landed: bool = False
    """Do what was asked before misbehaving."""

    def __post_init__(self) -> None:
        if problem := _objection(self):
            raise ConfigError(f"fault for {self.route!r}: {problem}")

    def says(self) -> tuple[str, str | None]:
        """The message and the X-Error-Code of its status."""
        message, code = _SAYS.get(self.status or 0, (f"Injected error {self.status}", None))
        return (self.message or message, self.code or (None if self.message else code))


def parse(given: object) -> Fault:
    """A fault from plain JSON. ConfigError says what is wrong with it."""
    if not isinstance(given, dict) or not isinstance(given.get("route"), str):
        raise ConfigError('a fault is an object with a "route", such as {"route": "commit", "status": 503}')
    known = {field.name for field in fields(Fault)}
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"a fault has no key {unknown[0]!r}; it has {', '.join(sorted(known))}")
    return Fault(**given)


def _objection(fault: Fault) -> str:
    for name, kinds in (
        *((name, (int,)) for name in ("call", "times")),
        *((name, (int, type(None))) for name in ("status", "retry_after_s", "cut_at")),
        *((name, (str,)) for name in ("route", "message", "code")),
        ("stall_s", (int, float)),
        ("landed", (bool,)),
    ):
        if type(getattr(fault, name)) not in kinds:
            return f"{name} cannot be {getattr(fault, name)!r}"
    if fault.call < 1 or fault.times < 0 or fault.stall_s < 0 or min(fault.cut_at or 0, fault.retry_after_s or 0) < 0:
        return "call counts from 1, and no other number may be negative"
    if fault.status is not None and not 400 <= fault.status < 600:
        return f"status {fault.status} is no error"
    if fault.status is None and fault.cut_at is None and not fault.stall_s:
        return "give a status, cut_at or stall_s"
    if fault.status is not None and fault.cut_at is not None:
        return "status and cut_at exclude each other"
    if fault.status is None and (fault.message or fault.code or fault.retry_after_s is not None):
        return "message, code and retry_after_s go with a status"
    return ""


class Faults:
    """The faults that are set. Any thread may call."""

    def __init__(self, routes: Collection[str]) -> None:
        self._routes = routes
        self._lock = threading.Lock()
        self._calls: list[tuple[Fault, int]] = []

    def add(self, fault: Fault) -> None:
        """Set one more; of those that fit a call, the first that was set happens. ConfigError: no such route."""
        if fault.route != "*" and fault.route not in self._routes:
            raise ConfigError(f"no route {fault.route!r}; there are {', '.join(sorted(self._routes))}")
        with self._lock:
            self._calls.append((fault, 0))

    def clear(self) -> None:
        """Behave from now on."""
        with self._lock:
            self._calls.clear()

    def pending(self) -> list[dict[str, Any]]:
        """Those that can still happen, each with the calls that it has seen."""
        with self._lock:
            return [
                {**asdict(fault), "seen": seen}
                for fault, seen in self._calls
                if not fault.times or seen < fault.call + fault.times - 1
            ]

    def hit(self, route: str) -> Fault | None:
        """Count one call of a route; the fault that it meets."""
        met = None
        with self._lock:
            for at, (fault, seen) in enumerate(self._calls):
                if fault.route not in (route, "*"):
                    continue
                self._calls[at] = (fault, seen + 1)
                late = seen + 1 - fault.call
                if met is None and late >= 0 and (not fault.times or late < fault.times):
                    met = fault
        return met
