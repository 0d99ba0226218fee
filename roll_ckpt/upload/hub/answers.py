"""The Hugging Face Hub: addresses, our client, its errors as ours. huggingface_hub is imported here alone.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of ours; what looks like a token is taken out of every message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING, Any

from roll_ckpt.errors import TOKEN, USER, HubRefused, HubUnavailable, RollCkptError
from roll_ckpt.upload.hub.address import TOKENS_BELONG, Remote

if TYPE_CHECKING:
    pass

_PASSING = (408, 409, 412, 423, 425, 429)  # the refusals that time may change; so may every 5xx
_TOKEN = re.compile(r"(?:hf|api_org)_[A-Za-z0-9]{8,}")
_LONG_TOKEN = re.compile(TOKEN.encode())
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")  # signed addresses are secrets for a while


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


def endpoint() -> str:
    """The Hub's address, without secrets."""
    from huggingface_hub import constants

    return redact(constants.ENDPOINT)


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
        return f"the token is missing, wrong, or may not see the repository; {TOKENS_BELONG}"
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
        return HubRefused(f"{where}: there is no token; {TOKENS_BELONG}")
    if "hf_xet.XetAuthenticationError" in kinds:
        return HubRefused(f"{where}: the Hub's storage refuses the token ({text}); {TOKENS_BELONG}")
    if kinds & {"httpx2.HTTPError", "httpx2.StreamError", "builtins.ConnectionError", "builtins.TimeoutError"}:
        return HubUnavailable(
            f"{where}: no answer from {endpoint()} ({type(problem).__name__}: {text}); "
            "check the network and HF_ENDPOINT"
        )
    if isinstance(problem, JSONDecodeError | LookupError | TypeError | AttributeError | RecursionError):
        return HubUnavailable(f"{where}: {endpoint()} answered what is not the Hub's; is a proxy in between?")
    if kinds & {"huggingface_hub.HFValidationError", "httpx2.InvalidURL"}:
        return HubRefused(f"{where}: {text}; check repo_id, revision and HF_ENDPOINT")
    if isinstance(problem, ValueError) and text.startswith(("LFS batch API", "Malformed", "Invalid")):
        return HubRefused(f"{where}: the Hub does not take it: {text}")
    if isinstance(problem, RuntimeError) or (isinstance(problem, OSError) and problem.errno is None):
        # hf_xet has no errors of its own for the network.
        return HubUnavailable(f"{where}: {type(problem).__name__}: {text}; try again later")
    return None
