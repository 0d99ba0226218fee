"""Every error a caller of roll_ckpt can meet.

    RollCkptError
    ├── ConfigError (ValueError)          a key, value or combination that cannot be meant
    ├── UnsupportedError (NotImplementedError)   a feature that is refused by name
    ├── RanksDisagree (ValueError)        ranks of one world ask for different saves
    ├── RunIsLive (RuntimeError)          another live run owns the output directory
    ├── EpochLost (RuntimeError)          a newer run has taken the output directory over
    ├── NoRoom (OSError)                  the file system cannot hold one more checkpoint
    ├── SaveFailed (RuntimeError)         a copy, write, vote, commit or upload failed; older checkpoints are sound
    │   └── SourceChanged                 a tensor was changed before it was copied
    ├── NotFound (FileNotFoundError)      no complete checkpoint where one was asked for
    ├── Damaged (ValueError)              bytes on disk are not the bytes that were written
    ├── Unreadable (OSError)              the disk does not give the bytes; they may be sound
    ├── HubRefused (OSError)              the Hub says no, and will again until somebody changes something
    ├── HubUnavailable (ConnectionError)  the Hub cannot be reached, or is busy; later it may be well
    └── ModelMismatch (ValueError)        a checkpoint of another model

Each also is the builtin that a caller would already catch.
"""

from __future__ import annotations

import re
from pathlib import Path

TOKEN = r"(?:hf|api_org)_[A-Za-z0-9]{30,}"
"""What a token of the Hub looks like."""
USER = re.compile(r"://[^/\s'\"]+@")
"""A name and a password before the host of an address."""
_TOKEN = re.compile(TOKEN)


def holds_secret(text: str) -> bool:
    """Whether there is a token of the Hub in it, or a password in an address."""
    return bool(_TOKEN.search(text) or USER.search(text))


def presentable(text: str) -> str:
    """`text` as it may be shown: tokens and passwords are left out, and what is no printable character is spelled.

    Names and records of a stranger end up in messages, and a terminal obeys what it is shown.
    """
    text = USER.sub("://…@", _TOKEN.sub("hf_…", text))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RollCkptError(Exception):
    """Base of all errors of roll_ckpt. Its text is presentable; it may have several lines."""

    def __str__(self) -> str:
        return "\n".join(map(presentable, super().__str__().split("\n")))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ConfigError(RollCkptError, ValueError):
    """A configuration key, value or combination that cannot be meant. Nothing was touched on disk."""


class UnsupportedError(RollCkptError, NotImplementedError):
    """A feature of a framework that roll_ckpt refuses by name, with the reason."""


class RanksDisagree(RollCkptError, ValueError):
    """Ranks of one world asked for different saves, or one did not come. Nothing was touched on disk."""


class RunIsLive(RollCkptError, RuntimeError):
    """Another live run owns the output directory. Nothing was touched on disk."""


class EpochLost(RollCkptError, RuntimeError):
    """A newer run has claimed the output directory; this process may not write there any more."""


class NoRoom(RollCkptError, OSError):
    """The file system has too little room for one more checkpoint. Nothing was touched on disk."""


class SaveFailed(RollCkptError, RuntimeError):
    """A copy, write, vote, commit or upload failed. Checkpoints that were committed before are sound."""


class SourceChanged(SaveFailed):
    """A tensor was changed between a save and the end of its copy, by something that did not wait for the fence.

    `start` and `end` tell which bytes of the file are concerned.
    """

    def __init__(self, message: str, start: int, end: int) -> None:
        super().__init__(message)
        self.start = start
        self.end = end


class NotFound(RollCkptError, FileNotFoundError):
    """No complete checkpoint where one was asked for."""


class Damaged(RollCkptError, ValueError):
    """Bytes on disk are not those that were written, or a record cannot be trusted."""


class Unreadable(RollCkptError, OSError):
    """The disk does not give the bytes of a checkpoint. They may be sound, so nothing older is taken in its place."""

    checkpoint_dir: Path | None = None
    """The checkpoint, where one of several was looked at."""


BY_HAND = (
    "It may be sound, so no older checkpoint is taken in its place. Start again when the disk answers, or choose "
    "another one by hand: with resume_from_checkpoint, or the tag or path to load"
)
"""What to do about an Unreadable."""


class HubRefused(RollCkptError, OSError):
    """The Hub says no, or what was asked must not be done there; trying again alone does not help."""

    status: int | None = None
    """The HTTP status of the answer, where there was one."""


class HubUnavailable(RollCkptError, ConnectionError):
    """The Hub cannot be reached or is busy; what was asked may even have been done. Try again later."""

    status: int | None = None
    """The HTTP status of the answer, where there was one."""
    retry_after_s: float | None = None
    """The pause that the Hub asked for."""


class ModelMismatch(RollCkptError, ValueError):
    """The checkpoint holds a model with other parameter names or shapes."""
