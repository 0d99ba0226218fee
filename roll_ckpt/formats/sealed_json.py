"""Sealed records: canonical JSON that carries its own SHA-256, so that any flipped bit is detected.

    {
     "epoch": 3,                    keys sorted, one line each, ASCII, one newline at the end
     ...
     "sha256": "..."                of the same text without this key
    }

Reading trusts nothing: bytes that differ in any way from what writing produces are refused as errors.Damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from roll_ckpt.errors import Damaged

T = TypeVar("T")


def canonical(record: dict[str, Any]) -> bytes:
    """The only permitted spelling of `record`.

    One line for each key, and one for each entry of a value that is an object: people can read it, and all values go
    through the fast encoder of `json`, which cannot indent.

    Raises:
        ValueError, TypeError: the record is not plain JSON (NaN, foreign types).
    """
    lines = [f" {_spell(key)}: {_spell_value(record[key])}" for key in sorted(record)]
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _spell_value(value: object) -> str:
    if not isinstance(value, dict) or not value:
        return _spell(value)
    return "{\n" + ",\n".join(f"  {_spell(key)}: {_spell(value[key])}" for key in sorted(value)) + "\n }"


def _spell(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)


def seal(record: dict[str, Any]) -> bytes:
    """The canonical bytes of `record` with its digest added."""
    return canonical({**record, "sha256": hashlib.sha256(canonical(record)).hexdigest()})


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object in `data`. Damaged, naming `where`, if `data` holds none, or one that is nested too deeply."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{where}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise Damaged(f"{where}: holds no JSON object")
    return value


def unseal(data: bytes, where: object) -> dict[str, Any]:
    """The record in `data`, without its digest. Damaged, naming `where`, if a bit differs from what was sealed."""
    try:
        record = json.loads(data)
        is_canonical = isinstance(record, dict) and canonical(record) == data
    except (ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{where}: not a record of roll_ckpt ({error})") from error
    if not is_canonical:
        raise Damaged(f"{where}: bytes are not as they were written")
    digest = record.pop("sha256", None)
    if digest != hashlib.sha256(canonical(record)).hexdigest():
        raise Damaged(f"{where}: its digest does not match its contents")
    contents: dict[str, Any] = record
    return contents


def sha256(data: bytes) -> str:
    """The SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


class Fields:
    """Reads the keys of an unsealed record and checks type and range of each; Damaged names file and key."""

    def __init__(self, record: dict[str, Any], where: object) -> None:
        self._record = dict(record)
        self.where = where

    def take(self, key: str, kind: type[T], valid: Callable[[T], bool] = lambda _: True) -> T:
        """The value of `key`. Damaged if it is missing, not of exactly this type, or not valid."""
        value = self._record.pop(key, None)
        if type(value) is not kind or not valid(value):
            raise Damaged(f"{self.where}: {key} is {_short(value)}")
        return value

    def count(self, key: str) -> int:
        """The value of `key`: a non-negative integer below 2**53, which every JSON reader represents exactly."""
        return self.take(key, int, is_count)

    def optional(self, key: str, kind: type[T], valid: Callable[[T], bool] = lambda _: True) -> T | None:
        """The value of `key` as for take; None if it is null."""
        if key in self._record and self._record[key] is None:
            del self._record[key]
            return None
        return self.take(key, kind, valid)

    def end(self) -> None:
        """Damaged if the record has a key that was not taken."""
        if self._record:
            raise Damaged(f"{self.where}: unknown key {min(self._record)!r}")


def is_count(value: int) -> bool:
    """Whether a number can be a count: at least 0 and below 2**53."""
    return 0 <= value < 2**53


def is_sha256(value: object) -> bool:
    """Whether `value` is a SHA-256 in lower-case hex."""
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
