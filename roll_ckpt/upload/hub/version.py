"""What differs between versions of huggingface_hub, found by what the installed one has and not by its number.

| | 0.34 to 0.36 | 1.x | 2.x |
|---|---|---|---|
| sends its requests with | requests, a session for each thread | httpx, one client for all | httpx2, like httpx |
| the process's own client is set by | `configure_http_backend` | `set_client_factory` | `set_client_factory` |
| an answer's body comes in blocks from | `get(stream=True)`, `iter_content` | `stream`, `iter_bytes` | as in 1.x |
| tries again by itself when it asks how to send files | no | from 1.16 at the latest | yes |

Everything else that `upload/hub` uses has the same names and arguments in all of them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

from roll_ckpt.errors import ConfigError, UnsupportedError

log = logging.getLogger("roll_ckpt")

OLDEST = "0.34"
NEWEST_MAJOR = 2

_INSTALL = f"pip install 'huggingface_hub>={OLDEST}'"
_PULL: dict[str, tuple[str, ...]] = {
    "HfApi.model_info": ("repo_id", "revision", "timeout"),
    "get_session": (),
    "get_token": (),
    "hf_hub_url": ("repo_id", "filename", "revision", "endpoint"),
    "utils.build_hf_headers": ("headers",),
    "utils.hf_raise_for_status": ("response",),
}
"""What a pull calls, with the parameters that it passes. A push calls these too."""
_PUSH: dict[str, tuple[str, ...]] = {
    "CommitOperationAdd": ("path_in_repo", "path_or_fileobj"),
    "CommitOperationAdd.as_file": ("with_tqdm",),
    "CommitOperationDelete": ("path_in_repo", "is_folder"),
    "HfApi.create_branch": ("repo_id", "branch", "revision", "exist_ok"),
    "HfApi.create_commit": (
        "repo_id",
        "operations",
        "commit_message",
        "commit_description",
        "revision",
        "parent_commit",
    ),
    "HfApi.create_repo": ("repo_id", "private"),
    "HfApi.create_tag": ("repo_id", "tag", "revision"),
    "HfApi.delete_branch": ("repo_id", "branch"),
    "HfApi.delete_tag": ("repo_id", "tag"),
    "HfApi.list_repo_refs": ("repo_id",),
    "HfApi.preupload_lfs_files": ("repo_id", "additions", "revision", "num_threads", "free_memory"),
    "HfApi.repo_exists": ("repo_id",),
    "_commit_api._fetch_upload_modes": (),
    "lfs.post_lfs_batch_info": (),
    "utils.disable_progress_bars": (),
    "utils.logging.set_verbosity_error": (),
}
_REQUESTS: dict[str, tuple[str, ...]] = {"configure_http_backend": (), "utils._http._default_backend_factory": ()}
_HTTPX: dict[str, tuple[str, ...]] = {"set_client_factory": (), "utils._http.default_client_factory": ()}
"""What `limit_all_calls` needs, by the HTTP library."""
_ADDITION = ("upload_info", "_should_ignore", "_remote_oid")
"""What `sending` reads and sets in a CommitOperationAdd."""


@cache
def installed() -> Any:
    """The module huggingface_hub, which has what a pull needs. Changes nothing in the process and makes no request.

    Raises:
        ConfigError: it is not installed.
        UnsupportedError: it is older than 0.34, or lacks something that a pull needs; names what, and what to install.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"the Hub needs huggingface_hub ({error}); install it: pip install 'roll-ckpt[hub]'"
        ) from None
    _refuse_old(huggingface_hub)
    _refuse_lack(huggingface_hub, _lacks(huggingface_hub, _PULL), "pull from")
    return huggingface_hub


@cache
def check_push() -> None:
    """Like `installed`, for a push. UnsupportedError names what a push needs and this version lacks."""
    hub = installed()
    for module in ("_commit_api", "lfs"):  # huggingface_hub imports its modules when they are used
        with suppress(ImportError):
            importlib.import_module(f"{hub.__name__}.{module}")
    lacks = _lacks(hub, _PUSH)
    if not lacks:
        fields = hub.CommitOperationAdd.__dataclass_fields__
        lacks = [f"CommitOperationAdd.{name}" for name in _ADDITION if name not in fields]
    lacks += _lacks(hub, _REQUESTS if _by_requests(hub) else _HTTPX)
    _refuse_lack(hub, lacks, "push to")


def _refuse_old(hub: Any) -> None:
    number = _number_of(hub.__version__)
    if number and number < _number_of(OLDEST):
        raise UnsupportedError(
            f"huggingface_hub {hub.__version__} is too old: roll_ckpt needs {OLDEST} or later for checkpoints on the "
            f"Hub; {_INSTALL}"
        )


def _refuse_lack(hub: Any, lacks: list[str], what: str) -> None:
    if lacks:
        raise UnsupportedError(
            f"huggingface_hub {hub.__version__} has no {', '.join(lacks)}, which roll_ckpt needs to {what} the Hub; "
            f"pip install 'huggingface_hub>={OLDEST},<{NEWEST_MAJOR + 1}'"
        )


@cache
def warn_if_newer() -> None:
    """Log once that the installed version is newer than those that were tried, if it is. Raises what `installed` does.

    For the process that a person starts, not for the uploader, which starts again and again.
    """
    hub = installed()
    if _number_of(hub.__version__) >= (NEWEST_MAJOR + 1,):
        log.warning(
            "huggingface_hub %s is newer than what roll_ckpt was tried with, %s to %d.x; it has everything that is "
            "needed, so it is used",
            *(hub.__version__, OLDEST, NEWEST_MAJOR),
        )


def time_limits(connect_s: float, silence_s: float) -> Any:
    """The `timeout` of a request: for connecting, and for each wait for the Hub after that."""
    if _by_requests(installed()):
        return connect_s, silence_s
    return connect_s, silence_s, silence_s, silence_s  # to connect, to read, to write, for a free connection


def get(url: str, headers: dict[str, str], limits: Any) -> Any:
    """The answer to a GET by the process's own client; redirects are followed."""
    hub = installed()
    follow = "allow_redirects" if _by_requests(hub) else "follow_redirects"
    return hub.get_session().get(url, headers=headers, timeout=limits, **{follow: True})


@contextmanager
def stream(url: str, headers: dict[str, str], limits: Any) -> Iterator[tuple[Any, Callable[[int], Iterator[bytes]]]]:
    """The answer to a GET, and a function that yields its body in blocks of that size. A refusal is read as a whole."""
    hub = installed()
    if _by_requests(hub):
        with hub.get_session().get(url, headers=headers, timeout=limits, allow_redirects=True, stream=True) as answer:
            _ = answer.status_code < 400 or answer.content
            yield answer, answer.iter_content
    else:
        session = hub.get_session()
        with session.stream("GET", url, headers=headers, timeout=limits, follow_redirects=True) as answer:
            _ = answer.status_code < 400 or answer.read()
            yield answer, answer.iter_bytes


def limit_all_calls(limits: Any) -> None:
    """Give every request of this process these time limits, also those that pass `timeout=None`, as many calls do."""
    hub = installed()
    if _by_requests(hub):
        hub.configure_http_backend(lambda: _limited_session(hub.utils._http._default_backend_factory(), limits))
    else:
        hub.set_client_factory(lambda: _limited_client(hub.utils._http.default_client_factory(), limits))


def retries_questions() -> bool:
    """Whether this version tries again by itself when the Hub fails to say how, and where to, files are sent."""
    check_push()
    hub = installed()
    asking = (hub._commit_api._fetch_upload_modes, hub.lfs.post_lfs_batch_info)
    return all("http_backoff" in inspect.unwrap(function).__code__.co_names for function in asking)


def _limited_session(session: Any, limits: Any) -> Any:
    send = session.send

    def limited(request: Any, **options: Any) -> Any:
        return send(request, **{**options, "timeout": limits})

    session.send = limited  # redirects go through it too
    return session


def _limited_client(client: Any, limits: Any) -> Any:
    timeout = dict(zip(("connect", "read", "write", "pool"), limits, strict=True))

    def limit(request: Any) -> None:
        request.extensions = {**request.extensions, "timeout": timeout}

    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
    return client


def _by_requests(hub: Any) -> bool:
    return hasattr(hub, "configure_http_backend")


def _lacks(hub: Any, calls: dict[str, tuple[str, ...]]) -> list[str]:
    """The functions, classes and parameters of `calls` that this version does not have."""
    lacks = []
    for name, parameters in calls.items():
        found = hub
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            lacks.append(name)
            continue
        taken = inspect.signature(found).parameters
        lacks += [f"{name}({parameter}=…)" for parameter in parameters if parameter not in taken]
    return lacks


def _number_of(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (1, 0) for "1.0rc2"; () if it begins with none."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[^\d.]", version)[0]))
