"""Which versions of huggingface_hub are used, warned of, and refused by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from roll_ckpt.errors import HubUnavailable, UnsupportedError
from roll_ckpt.upload.hub import answers, version
from roll_ckpt.upload.hub.address import Remote

huggingface_hub: Any = pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What the checks remember of the version that is installed."""
    checks = (version.installed, version.check_push, version.warn_if_newer)
    for check in checks:
        check.cache_clear()
    yield
    for check in checks:
        check.cache_clear()


@pytest.mark.parametrize("number", ["0.33.5", "0.9.0", "0.33.0rc1"])
def test_an_old_version_is_refused_with_what_to_install(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", number)
    with pytest.raises(UnsupportedError, match=f"huggingface_hub {number} is too old.*pip install .*>=0.34"):
        version.installed()


@pytest.mark.parametrize("number", ["0.34.0", "1.0.0", "2.0.0rc1", "unknown"])
def test_a_version_that_has_everything_is_used_without_a_word(
    number: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", number)
    version.check_push()
    version.warn_if_newer()
    assert not caplog.records


def test_a_newer_version_that_has_everything_is_used_and_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", "3.0.1")
    version.check_push()
    with caplog.at_level(logging.WARNING):
        version.warn_if_newer()
        version.warn_if_newer()
    (told,) = [record.getMessage() for record in caplog.records]
    assert "huggingface_hub 3.0.1 is newer" in told and "0.34 to 2.x" in told


def test_what_a_push_lacks_is_named_and_a_pull_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huggingface_hub.HfApi, "list_repo_refs")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_tag", lambda self, repo_id, *, tag: None)
    version.installed()
    with pytest.raises(UnsupportedError) as caught:
        version.check_push()
    for name in ("HfApi.list_repo_refs", "HfApi.create_tag(revision=…)", huggingface_hub.__version__, "pip install"):
        assert name in str(caught.value)


def test_what_a_pull_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(huggingface_hub.HfApi, "model_info")
    with pytest.raises(UnsupportedError, match=r"has no HfApi.model_info, which roll_ckpt needs to pull"):
        version.installed()


@pytest.mark.parametrize(
    ("headers", "waits_s"),
    [
        ({"retry-after": "7", "ratelimit": '"api";r=0;t=55'}, 7),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": "soon"}, None),
        ({}, None),
    ],
)
def test_a_rate_limit_says_when_to_try_again(headers: dict[str, str], waits_s: float | None) -> None:
    session = huggingface_hub.get_session()
    http = __import__(type(session).__module__.partition(".")[0])
    answer = http.Response() if hasattr(session, "mount") else http.Response(429)
    answer.status_code = 429
    answer.headers.update(headers)
    problem = OSError("429")
    problem.response = answer  # type: ignore[attr-defined]
    translated = answers.translate(problem, Remote("dev/run"), "pushing")
    assert isinstance(translated, HubUnavailable) and translated.retry_after_s == waits_s
