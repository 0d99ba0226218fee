"""The Hugging Face Hub: addresses, our client, its errors as ours. huggingface_hub is imported here alone.

The endpoint and the token come from where the Hub's own tools take them (HF_ENDPOINT, HF_TOKEN, `hf auth login`),
never from arguments or files of ours; what looks like a token is taken out of every message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from roll_ckpt import names
from roll_ckpt.errors import ConfigError

if TYPE_CHECKING:
    pass

_SCHEME = "hf://"
TOKENS_BELONG = "set HF_TOKEN in the environment of the job, or run `hf auth login` once on its machine"


@dataclass(frozen=True)
class Remote:
    """A revision of a model repository."""

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
        """The remote that `hf://namespace/name[@revision]` names; ConfigError for anything else."""
        if not uri.startswith(_SCHEME):
            raise ConfigError(f"{uri!r} is no address on the Hub; write {_SCHEME}namespace/name or …@revision")
        repo_id, at, revision = uri.removeprefix(_SCHEME).partition("@")
        if ":" in repo_id:
            raise ConfigError(f"{uri!r}: an address on the Hub holds no user and no token; {TOKENS_BELONG}")
        return cls(repo_id, revision) if at else cls(repo_id)
