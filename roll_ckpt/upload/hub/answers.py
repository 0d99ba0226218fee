"""Translates what huggingface_hub and its HTTP client raise into HubRefused or HubUnavailable, without secrets.

HubRefused: the Hub says no, and will again. HubUnavailable: a later try may succeed. What looks like a token, the user
part of an address and the query of a signed address are taken out of every message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import Any

from roll_ckpt.errors import TOKEN, USER, HubRefused, HubUnavailable, RollCkptError
from roll_ckpt.upload.hub.address import TOKENS_BELONG, Remote

_PASSING = (408, 409, 412, 423, 425, 429)  # refusals that may pass with time, as may every 5xx
_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{8,}")
_LONG_TOKEN = re.compile(TOKEN.encode())
# By name: which of the HTTP libraries huggingface_hub uses depends on its version.
_NO_ANSWER = {
    *("requests.RequestException", "httpx.HTTPError", "httpx.StreamError", "httpx2.HTTPError", "httpx2.StreamError"),
    *("builtins.ConnectionError", "builtins.TimeoutError"),
}
_NO_ADDRESS = {
    *("huggingface_hub.HFValidationError", "httpx.InvalidURL", "httpx2.InvalidURL"),
    *("requests.InvalidURL", "requests.InvalidSchema", "requests.MissingSchema"),
}
_OF_ANOTHER_ANSWER = (JSONDecodeError, LookupError, TypeError, AttributeError, RecursionError)
_NOT_ACCEPTED = ("LFS batch", "Malformed", "Invalid", "Fast uploading")
_WINDOW = re.compile(r";\s*t=(\d+)")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # signed addresses are secrets for a while


@contextmanager
def hub_errors(remote: Remote, doing: str) -> Iterator[None]:
    """Inside the block, turn what the Hub's client raises into HubRefused or HubUnavailable.

    `doing` begins the message: "pushing checkpoint-9". Problems of the local disk go through unchanged.
    """
    try:
        yield
    except RollCkptError:
        raise
    except Exception as problem:  # narrowed at once: what is no problem of the Hub is raised unchanged
        translated = translate(problem, remote, doing)
        if translated is None:
            raise
        raise translated from None  # the text of the original may hold secrets


def translate(problem: BaseException, remote: Remote, doing: str) -> HubRefused | HubUnavailable | None:
    """HubRefused or HubUnavailable for what the Hub's client raised; None if it is no problem of the Hub.

    A cause with an HTTP status decides, wherever it stands in the chain of causes; else the first known kind of error.
    """
    where = f"{doing}: {remote.uri}"
    for cause in _causes(problem):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return _of_status(cause, status, where)
    for cause in _causes(problem):
        translated = _of_kind(cause, where)
        if translated is not None:
            return translated
    return None


def redact(text: str) -> str:
    """`text` without the token in use, without what looks like a token, and without users and queries of addresses."""
    token = _token()
    if token:
        text = text.replace(token, "hf_…")
    return USER.sub("://…@", _QUERY.sub(r"\1?…", _TOKEN.sub("hf_…", text)))


def holds_token(data: bytes) -> bool:
    """True if `data` holds the token in use, or what looks like a token of the Hub."""
    token = _token()
    return _LONG_TOKEN.search(data) is not None or (token is not None and token.encode() in data)


def _token() -> str | None:
    """The token in use; None if there is none, or if it is so short that ordinary text would contain it."""
    from huggingface_hub import get_token

    token = get_token()
    return token if token and len(token) > 7 else None


def endpoint() -> str:
    """The address of the Hub (HF_ENDPOINT), without secrets."""
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


def _causes(problem: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = problem
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _of_status(problem: BaseException, status: int, where: str) -> HubRefused | HubUnavailable:
    message = getattr(problem, "server_message", None) or type(problem).__name__
    request = getattr(problem, "request_id", None)
    text = redact(
        f"{where}: the Hub says {status}: {' '.join(str(message).split())}" + (f" [{request}]" if request else "")
    )
    if status >= 500 or status in _PASSING:
        unavailable = HubUnavailable(f"{text}; it may pass, try again later")
        unavailable.status, unavailable.retry_after_s = status, _retry_after_s(problem)
        return unavailable
    refused = HubRefused(f"{text}; {_advice(problem, status)}")
    refused.status = status
    return refused


def _advice(problem: BaseException, status: int) -> str:
    kinds = {kind.__name__ for kind in type(problem).__mro__}
    if "RevisionNotFoundError" in kinds:
        return (
            "there is no such tag or branch; name one that exists, or create the branch before you push to it: on the "
            "Hub, or by `huggingface_hub.HfApi().create_branch('namespace/name', branch=…)`"
        )
    if status == 401:
        return f"the token is missing, wrong, or may not see the repository; {TOKENS_BELONG}"
    if status == 403:
        return "the token may not do this, or the storage is used up; use a token that may write to this repository"
    if status == 402:
        return "the plan or the storage of this account does not allow it"
    if status == 404:
        return "check the name, whether the token may see it, and HF_ENDPOINT"
    if status == 413:
        return "a file is larger than the Hub accepts"
    return "the Hub will refuse it again until something is changed on the Hub or here"


def _retry_after_s(problem: BaseException) -> float | None:
    """What `Retry-After` says, or else when the rate limit's window ends: `RateLimit: "api";r=0;t=55`."""
    headers: Any = getattr(getattr(problem, "response", None), "headers", {})
    seconds = str(headers.get("retry-after", "")).strip()
    if not seconds and (window := _WINDOW.search(str(headers.get("ratelimit", "")))):
        seconds = window[1]
    return float(seconds) if seconds.isdecimal() else None


def _of_kind(problem: BaseException, where: str) -> HubRefused | HubUnavailable | None:
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(problem).__mro__}
    text = redact(" ".join(str(problem).split()))
    if "huggingface_hub.OfflineModeIsEnabled" in kinds:
        return HubUnavailable(f"{where}: HF_HUB_OFFLINE is set; unset it when there is a network again")
    if "huggingface_hub.LocalTokenNotFoundError" in kinds:
        return HubRefused(f"{where}: there is no token; {TOKENS_BELONG}")
    if "hf_xet.XetAuthenticationError" in kinds:
        return HubRefused(f"{where}: the Hub's storage refuses the token ({text}); {TOKENS_BELONG}")
    if kinds & _NO_ADDRESS:
        return HubRefused(f"{where}: {text}; check repo_id, revision and HF_ENDPOINT")
    if isinstance(problem, _OF_ANOTHER_ANSWER) or text.endswith("improperly formatted"):
        return HubUnavailable(
            f"{where}: {endpoint()} sent an answer that is not the Hub's; is there a proxy in between?"
        )
    if kinds & _NO_ANSWER:
        return HubUnavailable(
            f"{where}: no answer from {endpoint()} ({type(problem).__name__}: {text}); "
            "check the network and HF_ENDPOINT"
        )
    if isinstance(problem, ValueError) and text.startswith(_NOT_ACCEPTED):
        return HubRefused(f"{where}: the Hub does not accept it: {text}")
    if isinstance(problem, RuntimeError) or (isinstance(problem, OSError) and problem.errno is None):
        # hf_xet raises these for network problems.
        return HubUnavailable(f"{where}: {type(problem).__name__}: {text}; try again later")
    return None
