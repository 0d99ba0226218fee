"""The requests of a push other than sending files: repositories, branches, tags and history.

They change huggingface_hub for the whole process, so only the uploader's process and the command line make them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING
from urllib.parse import quote

from roll_ckpt.upload.hub import version
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.answers import hub_errors
from roll_ckpt.upload.hub.client import api, pages, time_limits

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@cache
def own_api() -> HfApi:
    """huggingface_hub's client. From now on all its calls in this process have time limits, and it prints nothing.

    The calls for a push take no limits, so the client factory is replaced for the whole process. That must not happen
    in a training process, which may have its own factory: there only the module `client` is used.
    """
    version.check_push()
    client = api()
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    version.limit_all_calls(time_limits())
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its warnings show signed addresses
    return client


def exists(remote: Remote) -> bool:
    """True if the repository exists and this token may see it."""
    with hub_errors(remote, "looking up the repository"):
        return own_api().repo_exists(remote.repo_id)


def refs(remote: Remote) -> tuple[dict[str, str], dict[str, str]]:
    """The branches and the tags of the repository, each as name -> id of its commit."""
    with hub_errors(remote, "listing branches and tags"):
        info = own_api().list_repo_refs(remote.repo_id)
    return tuple({ref.name: ref.target_commit for ref in kind} for kind in (info.branches, info.tags))  # type: ignore[return-value]


def history(remote: Remote, limit: int) -> Iterator[tuple[str, str]]:
    """The newest `limit` commits of the revision, newest first: (id, title and message). One request per page."""
    client = own_api()
    url = f"{client.endpoint}/api/models/{remote.repo_id}/commits/{quote(remote.revision, safe='')}"
    with hub_errors(remote, "reading its history"):
        for commit in islice(pages(url), limit):
            yield commit["id"], f"{commit['title']}\n{commit.get('message') or ''}"


def create(remote: Remote, *, private: bool) -> None:
    """Create the repository, unless it exists."""
    with hub_errors(remote, "creating the repository"):
        try:
            own_api().create_repo(remote.repo_id, private=private)
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) != 409:
                raise


def tag(remote: Remote, name: str, commit: str, *, instead_of: str | None) -> None:
    """Make the tag name the commit; `instead_of` is the commit that it names now, None if there is no such tag."""
    with hub_errors(remote, f"tagging {name}"):
        if instead_of is not None:
            own_api().delete_tag(remote.repo_id, tag=name)
        own_api().create_tag(remote.repo_id, tag=name, revision=commit)


def branch(remote: Remote, *, start: str) -> None:
    """Create the branch at the revision `start`, unless it exists."""
    with hub_errors(remote, "creating a branch"):
        own_api().create_branch(remote.repo_id, branch=remote.revision, revision=start, exist_ok=True)


def drop_branch(remote: Remote) -> None:
    """Remove the branch; commits that a tag names stay."""
    with hub_errors(remote, "removing a branch"):
        own_api().delete_branch(remote.repo_id, branch=remote.revision)
