"""Every error that a caller of roll_ckpt can meet.

    RollCkptError
    ├── ConfigError (ValueError)          a key, value or combination of settings or arguments that is not valid
    ├── UnsupportedError (NotImplementedError)   a feature, or a saved object, that roll_ckpt refuses by name
    ├── RanksDisagree (ValueError)        the ranks of one job ask for different things, or one did not come
    ├── RunIsLive (RuntimeError)          another live run owns the output directory
    ├── EpochLost (RuntimeError)          a newer run has taken over the output directory
    ├── NoRoom (OSError)                  the file system has no room for one more checkpoint
    ├── SaveFailed (RuntimeError)         a copy, write, vote, commit or upload failed; older checkpoints are sound
    │   └── SourceChanged                 a tensor was changed before it was copied
    ├── NotFound (FileNotFoundError)      no complete checkpoint where one was asked for
    ├── Damaged (ValueError)              bytes on disk are not the bytes that were written
    ├── Unreadable (OSError)              the disk does not return the bytes, which may be sound
    ├── HubRefused (OSError)              the Hub refuses, and will refuse again until something is changed
    ├── HubUnavailable (ConnectionError)  the Hub cannot be reached or is busy; a later attempt may succeed
    └── ModelMismatch (ValueError)        the checkpoint holds another model

Each class also derives from the builtin exception in brackets, which a caller may already catch. Whatever is
raised, roll_ckpt has not changed the checkpoints that were committed before.
"""

from __future__ import annotations

import re
from pathlib import Path

TOKEN = r"(?:hf|api_org)_[A-Za-z0-9]{30,}"
"""Pattern of a Hub token."""
USER = re.compile(r"://[^/\s'\"]+@")
"""The user name and password before the host in a URL."""
_TOKEN = re.compile(TOKEN)


def holds_secret(text: str) -> bool:
    """Whether `text` contains a Hub token, or a URL with a user name or password."""
    return bool(_TOKEN.search(text) or USER.search(text))


def presentable(text: str) -> str:
    """`text` made safe to print: tokens and passwords are replaced, unprintable characters are escaped.

    Messages quote names and records from files that anyone may have written, and a terminal obeys escape sequences.
    """
    text = USER.sub("://…@", _TOKEN.sub("hf_…", text))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class RollCkptError(Exception):
    """Base class of all errors of roll_ckpt. Its text went through `presentable`; it may have several lines."""

    def __str__(self) -> str:
        return "\n".join(map(presentable, super().__str__().split("\n")))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class ConfigError(RollCkptError, ValueError):
    """A setting, an argument, or a combination of them is not valid. The message names it and what to give instead.

    Raised before anything is written: the disk is unchanged.
    """


class UnsupportedError(RollCkptError, NotImplementedError):
    """The model or the checkpoint uses a feature that roll_ckpt does not support, or the checkpoint holds objects that
    only `load.allow` may allow; the message gives the reason, or the setting.

    Raised before anything is written. Also before anything is loaded, except for an object in a file that DeepSpeed
    reads by itself: what it had loaded by then stays loaded. No older checkpoint is taken in its place.
    """


class RanksDisagree(RollCkptError, ValueError):
    """The ranks of one job ask for different things, or a rank did not reach a rendezvous in time.

    The message says which ranks and what. If a save could not begin: this call wrote no file of a checkpoint, and an
    attempt that rank 0 may already have made is discarded at the next start. If a load could not begin: nothing was
    loaded. If ranks were waiting for the outcome of a save: that save goes on in the background.
    """


class RunIsLive(RollCkptError, RuntimeError):
    """Another live run owns the output directory. Stop that run, use another directory, or set `take_over: true`.

    Raised before anything is written: the disk is unchanged.
    """


class EpochLost(RollCkptError, RuntimeError):
    """A newer run has claimed the output directory, and this process may no longer write there.

    Committed checkpoints stay. The newer run finishes or discards the save that was under way. End this run.
    """


class NoRoom(RollCkptError, OSError):
    """The file system has too little room for one more checkpoint; the message gives the path and the bytes.

    Raised while a save or a download begins: no checkpoint was changed or removed. A run that has saved in this
    directory before goes on training, and its next save tries again.
    """


class SaveFailed(RollCkptError, RuntimeError):
    """A copy, write, vote, commit, or what follows a commit (upload, pruning) failed; the message says which, and why.

    Checkpoints that were committed before are sound. Unless the message says that this one is committed, the save was
    abandoned: there is no directory under its name, and what is left of it is removed by the next save or the next
    start. A save that was committed and whose upload failed stays on the local disk.
    """


class SourceChanged(SaveFailed):
    """A tensor was changed after a save began and before it was copied, by code that did not call `roll_ckpt.fence()`.

    The save was abandoned, as for every `SaveFailed`. Bytes `start` (inclusive) to `end` (exclusive) of the file that
    the message names hold the tensor.
    """

    def __init__(self, message: str, start: int, end: int) -> None:
        super().__init__(message)
        self.start = start
        self.end = end


class NotFound(RollCkptError, FileNotFoundError):
    """There is no complete checkpoint at the path that was asked for, or it lacks a part that this job needs.

    Nothing was loaded; the disk is unchanged.
    """


class Damaged(RollCkptError, ValueError):
    """Bytes on disk are not the bytes that were written, or a record or a pickle does not parse. The message names the
    file. A sound pickle that holds what is not allowed is no damage: that is an UnsupportedError.

    A load changes nothing on disk: the damaged checkpoint stays for inspection with `roll-ckpt verify`.
    """


class Unreadable(RollCkptError, OSError):
    """The disk returns an error instead of the bytes of a checkpoint, which may be sound. The disk is unchanged.

    No older checkpoint is loaded in its place: a mount that is away for a minute must not cost training progress.
    """

    checkpoint_dir: Path | None = None
    """The directory of the checkpoint, where several were read; else None."""


BY_HAND = (
    "It may be sound, so no older checkpoint is taken in its place. Start again when the disk answers, or choose "
    "another one by hand: with resume_from_checkpoint, or the tag or path to load"
)
"""Advice that ends the message of an Unreadable."""


class HubRefused(RollCkptError, OSError):
    """The Hub refuses the request, or roll_ckpt refuses to make it; repeating it unchanged does not help.

    Local checkpoints are unchanged. A checkpoint that could not be pushed stays on the local disk and stays owed.
    """

    status: int | None = None
    """The HTTP status of the answer; None if there was no answer."""


class HubUnavailable(RollCkptError, ConnectionError):
    """The Hub cannot be reached or is busy. The request may have been carried out all the same; try again later.

    Local checkpoints are unchanged. A checkpoint that could not be pushed stays on the local disk and stays owed.
    """

    status: int | None = None
    """The HTTP status of the answer; None if there was no answer."""
    retry_after_s: float | None = None
    """The pause in seconds that the Hub asked for; None if it asked for none."""


class ModelMismatch(RollCkptError, ValueError):
    """The checkpoint holds a model with other parameter names or shapes, of another framework, or another optimizer.

    The message lists the differences. Nothing was loaded; the disk is unchanged.
    """
