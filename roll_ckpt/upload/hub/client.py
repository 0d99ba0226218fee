"""The requests of a pull, made with huggingface_hub's shared client; each call carries its own time limits.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of roll_ckpt. A pull runs in a training process, so nothing of that process is changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from operator import index
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from roll_ckpt.errors import HubRefused, HubUnavailable, NotFound
from roll_ckpt.upload.hub import version
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import endpoint, hub_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger("roll_ckpt")

_CONNECT_S = 10.0
_SILENCE_S = 60.0
_TIMEOUT = "ROLL_CKPT_HUB_TIMEOUT_S"  # for tests: replaces both limits


@cache
def api() -> HfApi:
    """huggingface_hub's own client. Changes nothing in the process and makes no request.

    Raises:
        ConfigError: huggingface_hub is not installed. UnsupportedError: this version cannot be used.
    """
    client: HfApi = version.installed().HfApi()
    return client


def time_limits() -> Any:
    """How long a call may take to connect (10 s), and how long the Hub may then be silent (60 s)."""
    limit = os.environ.get(_TIMEOUT)
    return version.time_limits(*((float(limit), float(limit)) if limit else (_CONNECT_S, _SILENCE_S)))


@dataclass(frozen=True)
class Head:
    """What a revision names now: its commit, the paths of its files, and whether its repository is private."""

    commit: str
    private: bool
    files: frozenset[str]


def head(remote: Remote) -> str:
    """The id of the commit that the revision names now. HubRefused: no such repository or revision."""
    return look(remote).commit


def look(remote: Remote) -> Head:
    """What the revision names now. HubRefused: no such repository or revision."""
    with hub_errors(remote, "looking up the newest commit"):
        info = api().model_info(remote.repo_id, revision=remote.revision, timeout=time_limits())
    assert info.sha is not None and info.private is not None  # missing only if a call passes `expand`
    return Head(info.sha, info.private, frozenset(file.rfilename for file in info.siblings or ()))


def sizes(remote: Remote, commit: str) -> dict[str, int]:
    """The path and the size in bytes of every file of a commit."""
    with hub_errors(remote, "listing its files"):
        entries = pages(f"{api().endpoint}/api/models/{remote.repo_id}/tree/{quote(commit, safe='')}?recursive=true")
        return {entry["path"]: index(entry["size"]) for entry in entries if entry["type"] == "file"}


def pages(url: str) -> Iterator[Any]:
    """The entries of a list that comes page by page. The caller translates errors.

    huggingface_hub's `paginate` would retry for minutes, and log addresses with the secrets in them.
    """
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    while url:
        answer = version.get(url, build_hf_headers(), time_limits())
        hf_raise_for_status(answer)
        yield from answer.json()
        url = answer.links.get("next", {}).get("url", "")


@contextmanager
def stream(remote: Remote, path: str, commit: str, *, start: int = 0) -> Iterator[Iterator[bytes]]:
    """The blocks of a file of a commit, from byte `start` on.

    They end early, without an error, where the connection ends: the caller counts the bytes.

    NotFound: the commit holds no such file. HubRefused, status 416: `start` lies beyond its end.
    """
    client = api()
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    url = hf_hub_url(remote.repo_id, path, revision=commit, endpoint=client.endpoint)
    headers = build_hf_headers(headers={"Range": f"bytes={start}-"} if start else None)
    # A compressed answer would have another length than the file.
    headers["Accept-Encoding"] = "identity"
    with (
        hub_errors(remote, f"reading {path}"),
        version.stream(url, headers, time_limits()) as (answer, blocks),
    ):
        if answer.headers.get("X-Error-Code") == "EntryNotFound":
            raise NotFound(f"reading {path}: {remote.uri} holds no such file (commit {commit})")
        hf_raise_for_status(answer)
        if start and answer.status_code != 206:
            raise HubUnavailable(f"reading {path}: {remote.uri}: {endpoint()} does not send parts of files")
        yield blocks(1 << 20)


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
    except NotFound as absent:
        log.debug("%s", absent)
        return None
    return b"".join(parts)
