"""Every name on disk: built here, parsed here, nowhere else; and what a path means. Does not touch the disk."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
from pathlib import Path

from .errors import ConfigError

MANIFEST = "manifest.json"
VOTES = "votes"
DECISION = "decision"
EXPECTED = "votes/expected.json"
DIGESTS = "digests"
TENSORS = "tensors"
PIPELINE = "pipeline"
WORKER_STATE = "worker_state_pipeline.json"
LATEST = "latest"
EPOCHS = ".epochs"
TRASH = ".trash"
SUPERSEDED = ".superseded"
COPIES = ".copies.json"
HUB = ".hub"
HUB_DESTINATION = ".hub/destination.json"
HUB_LOCK = ".hub/uploader.lock"
HUB_RECORDS = ".hub/records"
HUB_HASHES = ".hub/hashes"
HELD = "held"
PULL_LOCK = "lock"
PULLED = "-pulled"
LOST_AND_FOUND = "lost+found"
"""A directory that mkfs makes at the top of a file system; only root may read it."""

NAME_BYTES = 200
PATH_CHARACTERS = 4096
PATH_PARTS = 64
LARGEST_NUMBER = 10**18 - 1

NAME_PARTS = 4
"""A checkpoint's name may lie in folders (`epoch1/step5`): so many parts at most."""
BESIDE = ".roll_ckpt"
"""The end of the name of the directory beside a host's save_dir that holds our bookkeeping: `.<save_dir>.roll_ckpt`."""

_RESERVED = {
    "tag": {LATEST},
    "cluster": {LATEST, MANIFEST, VOTES, DECISION, DIGESTS, TENSORS, PIPELINE},
}
_NUMBER = r"(0|[1-9][0-9]{0,17})"
_CHECKPOINT = re.compile(rf"checkpoint-{_NUMBER}")
_NUMBERED = re.compile(r"(.*?)([0-9]+)", re.DOTALL)
_DIGITS = re.compile(r"[0-9]+")
_ATTEMPT_DIR = re.compile(rf"\.(.+)\.{_NUMBER}\.{_NUMBER}\.tmp", re.DOTALL)
_PULL_DIR = re.compile(r"\.(.+)\.([0-9a-f]{16})\.pull", re.DOTALL)
_RANK_FILE = re.compile(rf"(.+)\.{_NUMBER}\.json", re.DOTALL)
_INDEX_FILE = re.compile(rf"(.+)\.{_NUMBER}\.index", re.DOTALL)
_EPOCH_FILE = re.compile(rf"{_NUMBER}(?:\.(.+))?", re.DOTALL)
_ABORTED = re.compile(rf"aborted\.{_NUMBER}\.{_NUMBER}\.(.+)", re.DOTALL)
_TEMPORARY = re.compile(r"\.(.+)\.[0-9]+\.[0-9a-f]{8}\.[0-9]+\.new", re.DOTALL)
_OWN = (EPOCHS, TRASH, HUB)
_FIRST = re.compile(r"\.(.+)\.first", re.DOTALL)

_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_REPO_PART}/{_REPO_PART}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}")
_HUB_TAG = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{NAME_BYTES - 1}}}")
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9._-]|\.(?=\.)")
_COMMIT_ID = re.compile(r"[0-9a-f]{40}")
_NOT_TAGS = ("HEAD", "main")
_HUB_FOLDERS = (".git", "git~1", ".cache")

_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})")

_counter = itertools.count(1)


def absolute(given: str | os.PathLike[str]) -> Path:
    """The directory or file that a setting or an argument means, whatever the working directory is later.

    ConfigError as for `expand`.
    """
    return Path(expand(given)).absolute()


def expand(given: str | os.PathLike[str], *, strict: bool = True) -> str:
    """`given` with the values of `$NAME` and `${NAME}`, and the home directories of `~` and `~user`.

    A variable that is not set, and a user who does not exist, are a ConfigError that names them; unless `strict`, they
    stay as they are.
    """
    text = os.fspath(given)

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if strict and name not in os.environ:
            raise ConfigError(f"{text}: the environment variable {name} is not set; set it, or write the path out")
        return os.environ.get(name, match[0])

    expanded = os.path.expanduser(_VARIABLE.sub(value, text))
    if strict and expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise ConfigError(f"{text}: {user} is the home of no user; for a directory of that name write ./{user}")
    return expanded


def check_name(kind: str, name: str) -> str:
    """Return `name` if it can be the name of a checkpoint or cluster. ConfigError, saying why, if it cannot.

    `kind` is "tag" (a checkpoint's name: up to NAME_PARTS path components) or "cluster" (one component).
    """
    if problem := _objection(kind, name):
        raise ConfigError(f"{kind} {name!r} cannot be used as a name: {problem}; choose another {kind}")
    return name


def _objection(kind: str, name: str) -> str:
    if not name:
        return "it is empty"
    try:
        encoded = name.encode()
    except UnicodeEncodeError as error:
        return f"it is not valid Unicode ({error.reason})"
    if len(encoded) > NAME_BYTES:
        return f"it has {len(encoded)} bytes, more than {NAME_BYTES}"
    if "\\" in name:
        return "it has a backslash"
    if not name.isprintable():
        return "it has a control character or another unprintable character"
    parts = name.split("/")
    if parts[0] in _RESERVED.get(kind, _RESERVED["cluster"]):
        return "roll_ckpt uses this name itself"
    if kind != "tag":
        if len(parts) > 1:
            return "it has a slash, so it is not one path component"
        return "it starts with a dot, like the temporary names of roll_ckpt" if name.startswith(".") else ""
    if len(parts) > NAME_PARTS:
        return f"it lies in {len(parts) - 1} folders, more than {NAME_PARTS - 1}"
    return next(filter(None, map(_objection_to_part, parts)), "")


def _objection_to_part(part: str) -> str:
    if part in ("", ".", ".."):
        return f"a part of it is {part!r}, which is no name of a file"
    return f"roll_ckpt uses names like {part!r} itself" if is_own(part) else ""


def is_own(entry: str) -> bool:
    """Whether an entry of an output directory has a name that roll_ckpt gives to its bookkeeping."""
    return entry.startswith(".") and (
        entry in _OWN
        or entry.startswith(SUPERSEDED)
        or entry.endswith(BESIDE)
        or any(pattern.fullmatch(entry) for pattern in (_ATTEMPT_DIR, _PULL_DIR, _TEMPORARY))
    )


def beside(entry: str) -> str:
    """The name of the directory beside an output directory called `entry` that holds the bookkeeping for it."""
    return f".{entry}{BESIDE}"


def parse_beside(entry: str) -> str | None:
    """The name of the output directory for whose bookkeeping `beside` gave this name, None for any other entry."""
    return entry[1 : -len(BESIDE)] if entry.startswith(".") and entry.endswith(BESIDE) else None


def _flat(name: str) -> str:
    """A checkpoint's name as one path component: a backslash, which no name has, stands for each slash."""
    return name.replace("/", "\\")


def _unflat(entry: str) -> str:
    return entry.replace("\\", "/")


def checkpoint(step: int) -> str:
    """The name of a pipeline's checkpoint: `checkpoint-<step>`."""
    return f"checkpoint-{step}"


def step_of(name: str) -> int | None:
    """The step of `checkpoint-<step>`, None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else None


def pattern(name: str) -> str:
    """What names of one kind have in common: `name` with a `#` for each run of digits."""
    return _DIGITS.sub("#", name)


def differ_in_number_only(entry: str, name: str) -> bool:
    """True if `entry` and `name` differ only in their trailing number (checkpoint-9 vs checkpoint-12)."""
    first, second = _NUMBERED.fullmatch(entry), _NUMBERED.fullmatch(name)
    return first is not None and second is not None and first[1] == second[1] and first[2] != second[2]


def attempt_dir(name: str, epoch: int, attempt: int) -> str:
    """The directory in which one attempt to save `name` writes: `.<name>.<epoch>.<attempt>.tmp`."""
    return f".{_flat(name)}.{epoch}.{attempt}.tmp"


def parse_attempt_dir(entry: str) -> tuple[str, int, int] | None:
    """(name, epoch, attempt) of an attempt directory, None for any other entry."""
    match = _ATTEMPT_DIR.fullmatch(entry)
    name = _unflat(match[1]) if match else ""
    # The name is checked because ".." would lead out of the output directory.
    return (name, int(match[2]), int(match[3])) if match and not _objection("tag", name) else None


def pull_dir(name: str, manifest: str) -> str:
    """The directory into which `name` is pulled: `.<name>.<first 16 digits of its manifest's SHA-256>.pull`."""
    return f".{_flat(name)}.{manifest[:16]}.pull"


def parse_pull_dir(entry: str) -> tuple[str, str] | None:
    """(name, first 16 digits of the manifest's SHA-256) of a pull's directory, None for any other entry."""
    match = _PULL_DIR.fullmatch(entry)
    name = _unflat(match[1]) if match else ""
    return (name, match[2]) if match and not _objection("tag", name) else None


def vote_file(cluster: str, rank: int) -> str:
    """The name of one rank's vote inside votes/: `<cluster>.<rank>.json`."""
    return f"{cluster}.{rank}.json"


def parse_vote_file(entry: str) -> tuple[str, int] | None:
    """(cluster, rank) of a vote's file name, None for any other entry."""
    match = _RANK_FILE.fullmatch(entry)
    return (match[1], int(match[2])) if match else None


def digest_file(cluster: str, rank: int) -> str:
    """The path of one rank's per-block digests, relative to the checkpoint."""
    return f"{DIGESTS}/{cluster}.{rank}.json"


def parse_digest_file(path: str) -> tuple[str, int] | None:
    """(cluster, rank) of a digest file's path, None for any other path."""
    folder, _, entry = path.partition("/")
    return parse_vote_file(entry) if folder == DIGESTS else None


def tensor_file(cluster: str, rank: int) -> str:
    """The path of one rank's tensor index, relative to the checkpoint."""
    return f"{TENSORS}/{cluster}.{rank}.index"


def parse_tensor_file(path: str) -> tuple[str, int] | None:
    """(cluster, rank) of a tensor index's path, None for any other path."""
    folder, _, entry = path.partition("/")
    match = _INDEX_FILE.fullmatch(entry)
    return (match[1], int(match[2])) if match and folder == TENSORS else None


def old_tensor_file(cluster: str, rank: int) -> str:
    """The path of one rank's tensor index in a checkpoint of format 1, where it is JSON, relative to the checkpoint."""
    return f"{TENSORS}/{cluster}.{rank}.json"


def rng_file(rank: int) -> str:
    """The name of a rank's random states inside pipeline/. Rank 0's file is named after the pipeline."""
    return "rng_state_pipeline.pth" if rank == 0 else f"rng_state_rank_{rank}.pth"


def stateful_file(name: str, rank: int) -> str:
    """The name of a rank's part of a registered component inside pipeline/."""
    return f"stateful_{name}_rank_{rank}.pth"


def epoch_file(number: int, cluster: str | None = None) -> str:
    """The name inside .epochs/ of the record of the job that claimed an epoch, or that joined it with `cluster`."""
    return str(number) if cluster is None else f"{number}.{cluster}"


def parse_epoch_file(entry: str) -> tuple[int, str | None] | None:
    """(number, cluster or None) of an entry of .epochs/, None for any other entry."""
    match = _EPOCH_FILE.fullmatch(entry)
    return (int(match[1]), match[2]) if match else None


def aborted_file(name: str, epoch: int, attempt: int) -> str:
    """The name inside .epochs/ of the record that says why an attempt was aborted."""
    return f"aborted.{epoch}.{attempt}.{_flat(name)}"


def parse_aborted_file(entry: str) -> tuple[str, int, int] | None:
    """(name, epoch, attempt) of the record of an abort, None for any other entry."""
    match = _ABORTED.fullmatch(entry)
    return (_unflat(match[3]), int(match[1]), int(match[2])) if match else None


def trash_dir(epoch: int) -> str:
    """The directory for what one epoch throws away, relative to the output directory."""
    return f"{TRASH}/{epoch}"


def unique(prefix: str) -> str:
    """`prefix` with a suffix that no other call, in any thread, process or host, gives."""
    # Two hosts or containers may use the same process id; the random part tells them apart.
    return f"{prefix}.{os.getpid()}.{secrets.token_hex(4)}.{next(_counter)}"


def temporary_file(name: str) -> str:
    """A unique hidden name for a file that will be renamed or linked to `name`."""
    return unique(f".{name}") + ".new"


def parse_temporary_file(entry: str) -> str | None:
    """The final name for which a temporary file was made, None for any other entry."""
    match = _TEMPORARY.fullmatch(entry)
    return match[1] if match else None


def first_dir(name: str) -> str:
    """The hidden directory that holds the file which is to be called `name`, where nothing but directories decides."""
    return f".{name}.first"


def parse_first_dir(entry: str) -> str | None:
    """The name of the file for which such a directory was made, None for any other entry."""
    match = _FIRST.fullmatch(entry)
    return match[1] if match else None


def check_relative(path: str) -> str:
    """Return `path` if it is a plain POSIX path below a checkpoint. ValueError, saying why, if it is not."""
    if not path or path.startswith("/"):
        raise ValueError("it is empty or absolute")
    if len(path) > PATH_CHARACTERS:
        raise ValueError(f"it has {len(path)} characters, more than {PATH_CHARACTERS}")
    if "\\" in path or not path.isprintable():
        raise ValueError("it has a backslash or an unprintable character")
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError('it has an empty, "." or ".." part')
    if len(parts) > PATH_PARTS:
        raise ValueError(f"it lies in {len(parts) - 1} folders, more than {PATH_PARTS - 1}")
    return path


def check_repo_id(repo_id: str) -> str:
    """Return `repo_id` if it can name a repository on the Hub. ConfigError if it cannot."""
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith((".git", ".ipynb")):
        raise ConfigError(f"{repo_id!r} cannot be a repository on the Hub; write namespace/name")
    return repo_id


def check_revision(revision: str) -> str:
    """Return `revision` if it can name a branch, tag or commit on the Hub. ConfigError if it cannot."""
    if not is_revision(revision):
        raise ConfigError(f"{revision!r} cannot be a branch, tag or commit on the Hub; choose another")
    return revision


def is_revision(text: str) -> bool:
    """Whether a branch, tag or commit on the Hub can have this name, by the rules of git."""
    parts = text.split("/")
    return bool(
        _REVISION.fullmatch(text)
        and ".." not in text
        and not any(not part or part.startswith(".") or part.endswith((".", ".lock")) for part in parts)
    )


def hub_tag(name: str) -> str:
    """The tag of the checkpoint `name` on the Hub: the name itself, if it can be a tag there.

    Else what can be in a tag stays, all other characters become "-", and a part of the name's SHA-256 follows, so that
    two names never share a tag.
    """
    if _HUB_TAG.fullmatch(name) and is_revision(name) and name not in _NOT_TAGS and not _COMMIT_ID.fullmatch(name):
        return name
    kept = _NOT_IN_TAGS.sub("-", name).lstrip(".-")[: NAME_BYTES // 2]
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:12]
    return f"{kept or 'checkpoint'}-{digest}"


def hub_refuses(path: str) -> bool:
    """Whether the Hub takes no file of this path, relative to the checkpoint: git has folders of its own there."""
    return any(part.lower() in _HUB_FOLDERS for part in path.split("/"))


def hub_record(name: str) -> str:
    """The path of the record of a checkpoint's push, relative to the output directory."""
    return f"{HUB_RECORDS}/{_flat(name)}.json"


def parse_hub_record(entry: str) -> str | None:
    """The name of the checkpoint whose push an entry of .hub/records/ records, None for any other entry."""
    return _unflat(entry[:-5]) if entry.endswith(".json") and _TEMPORARY.fullmatch(entry) is None else None


def hub_hashes(name: str) -> str:
    """The path of the digests that a push has computed, relative to the output directory."""
    return f"{HUB_HASHES}/{_flat(name)}.json"
