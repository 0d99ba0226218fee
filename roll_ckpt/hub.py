"""The Hugging Face Hub: addresses, our client, its errors as ours. huggingface_hub is imported here alone.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of ours; what looks like a token is taken out of every message.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from . import names
from .errors import TOKEN, USER, ConfigError, Damaged, HubRefused, HubUnavailable, NotFound, RollCkptError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONNECT_S = 10.0
_SILENCE_S = 60.0
_GROUP_BYTES = 8 << 30
_TIMEOUT = "ROLL_CKPT_HUB_TIMEOUT_S"  # for tests: another limit in the place of both

_PASSING = (408, 409, 412, 423, 425, 429)  # the refusals that time may change; so may every 5xx
_SCHEME = "hf://"
_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{8,}")
_LONG_TOKEN = re.compile(TOKEN.encode())
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # signed addresses are secrets for a while

_TOKENS_BELONG = "set HF_TOKEN in the environment of the job, or run `hf auth login` once on its machine"


@dataclass(frozen=True)
class Remote:
    """A revision of a model repository."""

    repo_id: str
    revision: str = "main"

    def __post_init__(self) -> None:
        names.check_repo_id(self.repo_id)
        names.check_revision(self.revision)

    @property
    def uri(self) -> str:
        """`hf://namespace/name@revision`."""
        return f"{_SCHEME}{self.repo_id}@{self.revision}"

    @classmethod
    def parse(cls, uri: str) -> Remote:
        """The remote that `hf://namespace/name[@revision]` names; ConfigError for anything else."""
        if not uri.startswith(_SCHEME):
            raise ConfigError(f"{uri!r} is no address on the Hub; write {_SCHEME}namespace/name or …@revision")
        repo_id, at, revision = uri.removeprefix(_SCHEME).partition("@")
        if ":" in repo_id:
            raise ConfigError(f"{uri!r}: an address on the Hub holds no user and no token; {_TOKENS_BELONG}")
        return cls(repo_id, revision) if at else cls(repo_id)


@cache
def api() -> HfApi:
    """The Hub's client, with time limits. It is huggingface_hub's own, shared by the whole process.

    ConfigError if huggingface_hub is not installed. No request is made.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]
    except ImportError as error:
        raise ConfigError(
            f"the Hub needs huggingface_hub ({error}); install it: pip install 'roll-ckpt[hub]'"
        ) from None
    import httpx2

    limit = os.environ.get(_TIMEOUT)
    connect, silence = (float(limit), float(limit)) if limit else (_CONNECT_S, _SILENCE_S)
    timeout = httpx2.Timeout(silence, connect=connect).as_dict()
    usual = huggingface_hub.utils._http.default_client_factory

    def limit_time(request: httpx2.Request) -> None:
        # Here and not as the client's default: many of its calls ask for `timeout=None` by themselves.
        request.extensions = {**request.extensions, "timeout": timeout}

    def client() -> httpx2.Client:
        made = usual()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit_time]}
        return made

    huggingface_hub.set_client_factory(client)
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings show signed addresses
    return huggingface_hub.HfApi()


@contextmanager
def speaking(remote: Remote, doing: str) -> Iterator[None]:
    """Raise what the Hub's client raises inside the block as HubRefused or HubUnavailable.

    `doing` stands in the message: "pushing checkpoint-9". Problems of the local disk go through as they are.
    """
    try:
        yield
    except RollCkptError:
        raise
    except Exception as problem:  # narrowed at once: what is no problem of the Hub goes on unchanged
        ours = translate(problem, remote, doing)
        if ours is None:
            raise
        raise ours from None  # the original's text may hold secrets


def translate(problem: BaseException, remote: Remote, doing: str) -> HubRefused | HubUnavailable | None:
    """What the Hub's client raised, as one of our errors; None if it is no problem of the Hub."""
    where = f"{doing}: {remote.uri}"
    for found in _causes(problem):
        status = getattr(getattr(found, "response", None), "status_code", None)
        if isinstance(status, int):
            return _of_status(found, status, where)
    for found in _causes(problem):
        ours = _of_kind(found, where)
        if ours is not None:
            return ours
    return None


def redact(text: str) -> str:
    """`text` without the token in use and what looks like one, and without users and queries of addresses."""
    token = _token()
    if token:
        text = text.replace(token, "hf_…")
    return USER.sub("://…@", _QUERY.sub(r"\1?…", _TOKEN.sub("hf_…", text)))


def holds_token(data: bytes) -> bool:
    """Whether `data` holds what looks like a token of the Hub, or the one that is in use."""
    token = _token()
    return _LONG_TOKEN.search(data) is not None or (token is not None and token.encode() in data)


def _token() -> str | None:
    """The token in use, if it is long enough not to be found everywhere."""
    from huggingface_hub import get_token

    token = get_token()
    return token if token and len(token) > 7 else None


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What a revision is just now."""

    commit: str
    private: bool
    files: frozenset[str]


def head(remote: Remote) -> str:
    """The id of the commit that the revision names now. HubRefused: no such repository or revision."""
    return look(remote).commit


def look(remote: Remote) -> Head:
    """What the revision is now. HubRefused: no such repository or revision."""
    with speaking(remote, "looking up the newest commit"):
        told = api().model_info(remote.repo_id, revision=remote.revision)
    assert told.sha is not None and told.private is not None  # missing only where `expand` is asked for
    return Head(told.sha, told.private, frozenset(file.rfilename for file in told.siblings or ()))


def exists(remote: Remote) -> bool:
    """Whether there is such a repository that this token may see."""
    with speaking(remote, "looking it up"):
        return api().repo_exists(remote.repo_id)


def refs(remote: Remote) -> tuple[dict[str, str], dict[str, str]]:
    """The branches and the tags of the repository, each with its commit."""
    with speaking(remote, "listing branches and tags"):
        told = api().list_repo_refs(remote.repo_id)
    return tuple({ref.name: ref.target_commit for ref in kind} for kind in (told.branches, told.tags))  # type: ignore[return-value]


def history(remote: Remote, limit: int) -> Iterator[tuple[str, str]]:
    """The newest `limit` commits of the revision, newest first: id and whole message. Asks page by page."""
    client = api()
    from huggingface_hub.utils import build_hf_headers, paginate  # type: ignore[attr-defined]

    url = f"{client.endpoint}/api/models/{remote.repo_id}/commits/{quote(remote.revision, safe='')}"
    with speaking(remote, "reading its history"):
        for told in islice(paginate(url, params={}, headers=build_hf_headers()), limit):
            yield told["id"], f"{told['title']}\n{told.get('message') or ''}"


@contextmanager
def stream(remote: Remote, path: str, commit: str, *, start: int = 0) -> Iterator[Iterator[bytes]]:
    """The blocks of a file of a commit, from byte `start` on. They end early if the connection does: count.

    NotFound: the commit holds no such file. HubRefused, status 416: `start` lies beyond its end.
    """
    client = api()
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(remote.repo_id, path, revision=commit, endpoint=client.endpoint)
    headers = build_hf_headers(headers={"Range": f"bytes={start}-"} if start else None)
    # Blocks as they are stored: a compressed answer would have another length.
    headers["Accept-Encoding"] = "identity"
    with speaking(remote, f"reading {path}"), get_session().stream("GET", url, headers=headers) as answer:
        if answer.status_code >= 400:
            answer.read()
        if answer.headers.get("X-Error-Code") == "EntryNotFound":
            raise NotFound(f"reading {path}: {remote.uri} holds no such file (commit {commit})")
        hf_raise_for_status(answer)
        if start and answer.status_code != 206:
            raise HubUnavailable(f"reading {path}: {remote.uri}: {_endpoint()} does not send parts of files")
        yield answer.iter_bytes(1 << 20)


def read_file(remote: Remote, path: str, commit: str, *, limit: int = 256 << 20) -> bytes | None:
    """All bytes of a small file of a commit, None if the commit has none of this name.

    HubRefused: it is larger than `limit`.
    """
    parts: list[bytes] = []
    nbytes = 0
    try:
        with stream(remote, path, commit) as blocks:
            for block in blocks:
                parts.append(block)
                nbytes += len(block)
                if nbytes > limit:
                    raise HubRefused(f"reading {path}: {remote.uri}: it has more than {limit} bytes")
    except NotFound:
        return None
    return b"".join(parts)


# --- writing ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Upload:
    """One file of a commit: its path there, and its bytes or where they lie, with their digest."""

    path: str
    source: bytes | Path
    nbytes: int
    sha256: str


def create(remote: Remote, *, private: bool) -> None:
    """Make the repository, unless it is there."""
    with speaking(remote, "creating the repository"):
        try:
            api().create_repo(remote.repo_id, private=private)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) != 409:
                raise


class Sending:
    """Files on their way into one commit. The large ones go first, by themselves; then the commit is one request."""

    def __init__(self, remote: Remote, uploads: Iterable[Upload], sent: Callable[[int], None]) -> None:
        """`sent` is told of bytes as they leave: several threads call it, and a second try counts once."""
        api()
        self._remote = remote
        self._operations = [_addition(upload, sent) for upload in uploads]

    def send(self) -> None:
        """Send what goes by itself; what the Hub has is not sent again. Blocks.

        HubRefused: a `.gitignore` of the repository keeps files out.
        """
        with speaking(self._remote, "sending files"):
            for group in _groups(self._operations):
                api().preupload_lfs_files(
                    self._remote.repo_id, group, revision=self._remote.revision, free_memory=False, num_threads=4
                )
                for operation in group:
                    operation.arrived()
        if ignored := [op.path_in_repo for op in self._operations if op._should_ignore]:
            raise HubRefused(
                f"sending files: {self._remote.uri}: its .gitignore keeps out {ignored[0]} and "
                f"{len(ignored) - 1} more; take those patterns out of it"
            )

    def commit(self, more: Iterable[Upload], deleted: Iterable[str], title: str, message: str, parent: str) -> str:
        """One commit of all files and of `more`, without `deleted`, on `parent`; its id. All or nothing.

        HubUnavailable: it may have been made all the same; with status 412, `parent` is not the newest any more.
        """
        from huggingface_hub import CommitOperationDelete

        for operation in self._operations:
            # What the Hub had at that path when the file was sent may have changed since: none is left out.
            operation._remote_oid = None
        additions = [*self._operations, *(_addition(upload, lambda _: None) for upload in more)]
        deletions = [CommitOperationDelete(path, is_folder=False) for path in deleted]
        with speaking(self._remote, f"committing {title}"):
            made = api().create_commit(
                self._remote.repo_id,
                [*additions, *deletions],
                commit_message=title,
                commit_description=message,
                revision=self._remote.revision,
                parent_commit=parent,
            )
        return made.oid


def tag(remote: Remote, name: str, commit: str, *, instead_of: str | None) -> None:
    """Let the tag name the commit; `instead_of` is the commit that it names now."""
    with speaking(remote, f"tagging {name}"):
        if instead_of is not None:
            api().delete_tag(remote.repo_id, tag=name)
        api().create_tag(remote.repo_id, tag=name, revision=commit)


def branch(remote: Remote, *, start: str) -> None:
    """Make the branch where `start` is, unless it is there."""
    with speaking(remote, "making a branch"):
        api().create_branch(remote.repo_id, branch=remote.revision, revision=start, exist_ok=True)


def drop_branch(remote: Remote) -> None:
    """Remove the branch; its commits stay where a tag names them."""
    with speaking(remote, "removing a branch"):
        api().delete_branch(remote.repo_id, branch=remote.revision)


def _groups(operations: list[Any]) -> Iterator[list[Any]]:
    """Few at a time: what a group has brought over need not be sent again by whoever comes after a kill."""
    group: list[Any] = []
    for operation in operations:
        if group and (len(group) == 256 or sum(op.upload_info.size for op in group) > _GROUP_BYTES):
            yield group
            group = []
        group.append(operation)
    if group:
        yield group


def _addition(upload: Upload, sent: Callable[[int], None]) -> Any:
    source = upload.source if isinstance(upload.source, bytes) else str(upload.source)
    made = _addition_class()(upload.path, source)
    if made.upload_info.size != upload.nbytes:
        raise Damaged(f"{upload.source!r}: it changed after it was checked")
    made.upload_info.sha256 = bytes.fromhex(upload.sha256)  # or else the client reads the whole file for it
    made.sent = sent
    return made


@cache
def _addition_class() -> Any:
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        """Tells how much of it has left."""

        sent: Callable[[int], None]
        _furthest = 0

        def reached(self, position: int) -> None:
            if position > self._furthest:
                self.sent(position - self._furthest)
                self._furthest = position

        def arrived(self) -> None:
            self.reached(self.upload_info.size)

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if isinstance(self.path_or_fileobj, bytes):
                yield io.BytesIO(self.path_or_fileobj)
            else:
                with _Counted(str(self.path_or_fileobj), self.reached) as file:
                    yield file

    return Addition


class _Counted(io.FileIO):
    """A file that tells how far it was read."""

    def __init__(self, path: str, reached: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._reached = reached

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._reached(self.tell())
        return data


def _endpoint() -> str:
    return redact(api().endpoint)


# --- errors -------------------------------------------------------------------------------------------------


def _causes(problem: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = problem
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _of_status(problem: BaseException, status: int, where: str) -> HubRefused | HubUnavailable:
    said = getattr(problem, "server_message", None) or type(problem).__name__
    request = getattr(problem, "request_id", None)
    text = redact(
        f"{where}: the Hub says {status}: {' '.join(str(said).split())}" + (f" [{request}]" if request else "")
    )
    if status >= 500 or status in _PASSING:
        passing = HubUnavailable(f"{text}; it may pass, try again later")
        passing.status, passing.retry_after_s = status, _retry_after_s(problem)
        return passing
    refused = HubRefused(f"{text}; {_advice(problem, status)}")
    refused.status = status
    return refused


def _advice(problem: BaseException, status: int) -> str:
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    if "RevisionNotFoundError" in kinds:
        return "make that branch first (`hf repos branch create`), or name another revision"
    if status == 401:
        return f"the token is missing, wrong, or may not see the repository; {_TOKENS_BELONG}"
    if status == 403:
        return "the token may not do this, or the storage is used up; take one that may write to this repository"
    if status == 402:
        return "the plan or the storage of this account does not allow it"
    if status == 404:
        return "check the name, whether the token may see it, and HF_ENDPOINT"
    if status == 413:
        return "a file is larger than the Hub takes"
    return "it will say so again until something changes there or here"


def _retry_after_s(problem: BaseException) -> float | None:
    headers: Any = getattr(getattr(problem, "response", None), "headers", {})
    asked = str(headers.get("retry-after", "")).strip()
    return float(asked) if asked.isdecimal() else None


def _of_kind(problem: BaseException, where: str) -> HubRefused | HubUnavailable | None:
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(problem).__mro__}
    text = redact(" ".join(str(problem).split()))
    if "huggingface_hub.OfflineModeIsEnabled" in kinds:
        return HubUnavailable(f"{where}: HF_HUB_OFFLINE is set; unset it when there is a network again")
    if "huggingface_hub.LocalTokenNotFoundError" in kinds:
        return HubRefused(f"{where}: there is no token; {_TOKENS_BELONG}")
    if "hf_xet.XetAuthenticationError" in kinds:
        return HubRefused(f"{where}: the Hub's storage refuses the token ({text}); {_TOKENS_BELONG}")
    if kinds & {"httpx2.HTTPError", "httpx2.StreamError", "builtins.ConnectionError", "builtins.TimeoutError"}:
        return HubUnavailable(
            f"{where}: no answer from {_endpoint()} ({type(problem).__name__}: {text}); "
            "check the network and HF_ENDPOINT"
        )
    if isinstance(problem, JSONDecodeError | LookupError | TypeError | AttributeError | RecursionError):
        return HubUnavailable(f"{where}: {_endpoint()} answered what is not the Hub's; is a proxy in between?")
    if kinds & {"huggingface_hub.HFValidationError", "httpx2.InvalidURL"}:
        return HubRefused(f"{where}: {text}; check repo_id, revision and HF_ENDPOINT")
    if isinstance(problem, ValueError) and text.startswith(("LFS batch API", "Malformed", "Invalid")):
        return HubRefused(f"{where}: the Hub does not take it: {text}")
    if isinstance(problem, RuntimeError) or (isinstance(problem, OSError) and problem.errno is None):
        # hf_xet has no errors of its own for the network.
        return HubUnavailable(f"{where}: {type(problem).__name__}: {text}; try again later")
    return None
