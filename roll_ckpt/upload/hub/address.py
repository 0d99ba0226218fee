"""Addresses on the Hugging Face Hub: a repository and one of its revisions."""

from __future__ import annotations

from dataclasses import dataclass

from roll_ckpt import names
from roll_ckpt.errors import ConfigError, holds_secret

_SCHEME = "hf://"
TOKENS_BELONG = "set HF_TOKEN in the environment of the job, or run `hf auth login` once on its machine"
"""Where a token comes from; it ends messages about tokens."""


@dataclass(frozen=True)
class Remote:
    """A revision of a model repository: a branch, a tag or a commit. ConfigError if either cannot be a name."""

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
        """The remote that `hf://namespace/name[@revision]` names; ConfigError for anything else.

        The revision may also be the name of a checkpoint that cannot be a tag: then its tag is meant.
        """
        if not uri.startswith(_SCHEME):
            raise ConfigError(f"{uri!r} is no address on the Hub; write {_SCHEME}namespace/name or …@revision")
        repo_id, at, revision = uri.removeprefix(_SCHEME).partition("@")
        if ":" in repo_id:
            raise ConfigError(f"{uri!r}: an address on the Hub holds no user and no token; {TOKENS_BELONG}")
        if revision.isprintable() and revision and not names.is_revision(revision) and not holds_secret(revision):
            revision = names.hub_tag(revision)
        return cls(repo_id, revision) if at else cls(repo_id)
