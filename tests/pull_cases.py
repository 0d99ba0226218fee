"""What a process with the real client does in tests/test_pull.py; free of torch, so that it may fork."""

from __future__ import annotations

import importlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runs import ended, forked

from roll_ckpt.disk import failpoints, tree
from roll_ckpt.errors import RollCkptError
from roll_ckpt.upload.hub import remote_checkpoint
from roll_ckpt.upload.hub.address import Remote
from roll_ckpt.upload.hub.pull import pull

remote_checkpoint._FIRST_PAUSE_S = 0.01


def pulled(uri: str, to: str) -> str:
    return str(pull(Remote.parse(uri), Path(to)))


def told_of(uri: str, to: str) -> list[tuple[int, int]]:
    """What a progress bar would hear."""
    heard: list[tuple[int, int]] = []
    pull(Remote.parse(uri), Path(to), lambda here, of: heard.append((here, of)))
    return heard


def with_a_client_of_the_users_own(uri: str, to: str) -> dict[str, object]:
    """Pull where the user has set a client factory; what the user finds in the process afterwards."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    asked = set_a_client_factory()
    client, verbosity = huggingface_hub.get_session(), logging.get_verbosity()
    pulled(uri, to)
    told = {
        "the same client": huggingface_hub.get_session() is client,
        "the same verbosity": logging.get_verbosity() == verbosity,
        "every request went through it": asked,
    }
    in_a_new_thread: list[object] = []
    thread = threading.Thread(target=lambda: in_a_new_thread.append(huggingface_hub.get_session()))
    thread.start()
    thread.join()
    if hasattr(huggingface_hub, "close_session"):
        huggingface_hub.close_session()
        in_a_new_thread.append(huggingface_hub.get_session())
    return {**told, "the same factory": all(hasattr(session, "of_the_user") for session in in_a_new_thread)}


def set_a_client_factory() -> list[str]:
    """As a user might who needs a proxy: without time limits, and following no redirects. The paths that it is asked
    for from now on."""
    import huggingface_hub

    asked: list[str] = []
    if hasattr(huggingface_hub, "configure_http_backend"):
        requests = importlib.import_module("requests")

        class Session(requests.Session):  # type: ignore[misc, name-defined]
            of_the_user = True

            def send(self, request: Any, **options: Any) -> Any:
                asked.append(urlsplit(request.url).path)
                return super().send(request, **options)

        huggingface_hub.configure_http_backend(Session)
        return asked
    httpx = importlib.import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])

    class Client(httpx.Client):  # type: ignore[misc, name-defined]
        of_the_user = True

    def hook(request: Any) -> None:
        asked.append(request.url.path)

    huggingface_hub.set_client_factory(lambda: Client(event_hooks={"request": [hook]}, timeout=None))
    return asked


def how_long(uri: str, to: str) -> dict[str, object]:
    """Pull from a Hub that fails, with a client of the user's own; how it ended, and after how many seconds."""
    set_a_client_factory()
    began = time.monotonic()
    try:
        pulled(uri, to)
    except RollCkptError as problem:
        return {"kind": type(problem).__name__, "text": str(problem), "seconds": time.monotonic() - began}
    return {"kind": None}


def with_little_room(uri: str, to: str) -> str:
    real, tree.free_bytes = tree.free_bytes, lambda path: 1000
    try:
        return pulled(uri, to)
    finally:
        tree.free_bytes = real


def on_a_disk_that_fills_up(uri: str, to: str, nbytes: int) -> str:
    """No file may get longer than `nbytes`, as if the file system were full."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        return pulled(uri, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def killed_at(operation: int, uri: str, to: str) -> bool:
    """Pull in a child that is killed before its nth operation on the disk; whether it came to that."""

    def work() -> None:
        left = operation

        def observe(name: str, paths: tuple[str, ...]) -> None:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        failpoints.observer = observe
        pulled(uri, to)

    return in_child(work) == -signal.SIGKILL


def killed_at_block(block: int, uri: str, to: str) -> int:
    """Pull in a child that is killed before it writes its nth block; return how many bytes lie there."""

    def work() -> None:
        left = block

        def observe(name: str, paths: tuple[str, ...]) -> None:
            nonlocal left
            left -= name == "write"
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

        failpoints.observer = observe
        pulled(uri, to)

    assert in_child(work) == -signal.SIGKILL
    return sum(path.stat().st_size for path in Path(to).rglob("*") if path.is_file())


def pulled_in_child(uri: str, to: str) -> None:
    assert in_child(lambda: pulled(uri, to)) == 0


def in_child(work: Callable[[], object]) -> int:
    return ended(forked(work))


def all_at_once(uri: str, to: str, processes: int) -> list[int]:
    def work() -> None:
        import huggingface_hub

        if hasattr(huggingface_hub, "close_session"):
            huggingface_hub.close_session()  # in older clients a child shares its parent's connections
        pulled(uri, to)

    return [ended(pid) for pid in [forked(work) for _ in range(processes)]]
