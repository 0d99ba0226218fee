"""The Hugging Face Hub: addresses, our client, its errors as ours. huggingface_hub is imported here alone.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of ours; what looks like a token is taken out of every message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from roll_ckpt.errors import ConfigError, HubRefused, HubUnavailable, NotFound
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import endpoint, speaking

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONNECT_S = 10.0
_SILENCE_S = 60.0
_TIMEOUT = "ROLL_CKPT_HUB_TIMEOUT_S"  # for tests: another limit in the place of both


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
            raise HubUnavailable(f"reading {path}: {remote.uri}: {endpoint()} does not send parts of files")
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


def create(remote: Remote, *, private: bool) -> None:
    """Make the repository, unless it is there."""
    with speaking(remote, "creating the repository"):
        try:
            api().create_repo(remote.repo_id, private=private)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) != 409:
                raise


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
