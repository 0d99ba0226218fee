"""What a push asks the Hub, beside sending files. It runs in a process of ours: the uploader's or the command line's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import speaking
from roll_ckpt.upload.hub.client import api, time_limits

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi


@cache
def own_api() -> HfApi:
    """huggingface_hub's client; every call of it in this process gets time limits, and it is silent from now on.

    Its calls for a push take no limits, so its client factory is replaced for the whole process. That must not happen
    in a training process, which may have a factory of its own: there only `client` is used.
    """
    client = api()
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    timeout = time_limits().as_dict()

    def limit_time(request: httpx2.Request) -> None:
        # Here and not as the client's default: many calls ask for `timeout=None` by themselves.
        request.extensions = {**request.extensions, "timeout": timeout}

    def limited() -> httpx2.Client:
        made = huggingface_hub.utils._http.default_client_factory()
        made.event_hooks = {**made.event_hooks, "request": [*made.event_hooks["request"], limit_time]}
        return made

    huggingface_hub.set_client_factory(limited)
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings show signed addresses
    return client


def exists(remote: Remote) -> bool:
    """Whether there is such a repository that this token may see."""
    with speaking(remote, "looking it up"):
        return own_api().repo_exists(remote.repo_id)


def refs(remote: Remote) -> tuple[dict[str, str], dict[str, str]]:
    """The branches and the tags of the repository, each with its commit."""
    with speaking(remote, "listing branches and tags"):
        told = own_api().list_repo_refs(remote.repo_id)
    return tuple({ref.name: ref.target_commit for ref in kind} for kind in (told.branches, told.tags))  # type: ignore[return-value]


def history(remote: Remote, limit: int) -> Iterator[tuple[str, str]]:
    """The newest `limit` commits of the revision, newest first: id and whole message. Asks page by page."""
    client = own_api()
    from huggingface_hub.utils import build_hf_headers, paginate  # type: ignore[attr-defined]

    url = f"{client.endpoint}/api/models/{remote.repo_id}/commits/{quote(remote.revision, safe='')}"
    with speaking(remote, "reading its history"):
        for told in islice(paginate(url, params={}, headers=build_hf_headers()), limit):
            yield told["id"], f"{told['title']}\n{told.get('message') or ''}"


def create(remote: Remote, *, private: bool) -> None:
    """Make the repository, unless it is there."""
    with speaking(remote, "creating the repository"):
        try:
            own_api().create_repo(remote.repo_id, private=private)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) != 409:
                raise


def tag(remote: Remote, name: str, commit: str, *, instead_of: str | None) -> None:
    """Let the tag name the commit; `instead_of` is the commit that it names now."""
    with speaking(remote, f"tagging {name}"):
        if instead_of is not None:
            own_api().delete_tag(remote.repo_id, tag=name)
        own_api().create_tag(remote.repo_id, tag=name, revision=commit)


def branch(remote: Remote, *, start: str) -> None:
    """Make the branch where `start` is, unless it is there."""
    with speaking(remote, "making a branch"):
        own_api().create_branch(remote.repo_id, branch=remote.revision, revision=start, exist_ok=True)


def drop_branch(remote: Remote) -> None:
    """Remove the branch; its commits stay where a tag names them."""
    with speaking(remote, "removing a branch"):
        own_api().delete_branch(remote.repo_id, branch=remote.revision)
