"""The schema of all settings: YAML for pipelines, JSON inside a DeepSpeed config, `Settings(...)` for Megatron.

`Settings` holds the keys that all of them share; `DeepSpeedConfig` and `PipelineConfig` add their own. An unknown key
is refused, and the message suggests the nearest known one. Names end in their unit, and each default is written once,
here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from roll_ckpt import errors, names

Parsed = TypeVar("Parsed", bound="Section")

Directory = Annotated[Path, AfterValidator(names.absolute)]
"""Absolute from the start, so that a later change of the working directory changes nothing."""

HubUri = Annotated[str, Field(pattern="^hf://")]  # not a Path, which would turn the two slashes into one

Check = Annotated[Literal["off", "sample", "full"], BeforeValidator(lambda value: "off" if value is False else value)]
"""False means "off": that is how YAML reads a bare `off`."""

SMALLEST_BLOCK_BYTES = 64 << 10

_SECRET = re.compile("token|secret|password|api_?key|credential", re.IGNORECASE)


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused, and values cannot be changed once it is made."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @classmethod
    def parse(cls: type[Parsed], values: Any, where: str) -> Parsed:
        """Check `values` and return them as this section. `where` (a file, say) begins each message.

        Raises:
            ConfigError: names every wrong key and value, and for an unknown key the nearest known one.
        """
        if not isinstance(values, dict):
            raise errors.ConfigError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
        not_text = [key for key in values if not isinstance(key, str)]
        if not_text:
            raise errors.ConfigError(f"{where}: the key {not_text[0]!r} is not a string; put it in quotes")
        if secret := _key_of_secret(values):
            raise errors.ConfigError(f"{where}: {_no_token_in(secret)}")
        try:
            return cls(**values)
        except errors.ConfigError as problem:
            raise errors.ConfigError(f"{where}: {problem}") from None
        except ValidationError as problem:
            raise errors.ConfigError(f"{where}: {_explain_all(cls, problem)}") from None


def _key_of_secret(values: dict[str, Any]) -> str:
    """The dotted key of a value that looks like a Hub token or holds a password; "" if there is none."""
    pending: list[tuple[str, Any]] = [("", values)]
    seen = set()
    while pending:
        key, value = pending.pop()
        if isinstance(value, str) and errors.holds_secret(value):
            return key
        if isinstance(value, dict | list) and id(value) not in seen:  # a YAML alias repeats an object
            seen.add(id(value))
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            pending += [(f"{key}.{name}".lstrip("."), part) for name, part in inner]
    return ""


def _no_token_in(key: str) -> str:
    return (
        f"{key}: do not put a token into a configuration, which is copied into logs and checkpoints; set HF_TOKEN in "
        "the environment of the job, or run `hf auth login` once on its machine"
    )


def _explain_all(section: type[BaseModel], problem: ValidationError) -> str:
    return "; ".join(_explain(section, item["loc"], item["type"], item["msg"]) for item in problem.errors())


def _explain(section: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    path, options = [], [section]
    for part in location:
        if len(options) > 1:  # this part of the location is the `type` that selects one option
            options = [option for option in options if part in get_args(option.model_fields["type"].annotation)]
            continue
        path.append(str(part))
        section = options[0] if options else section
        field = section.model_fields.get(str(part))
        options = list(_sections(field.annotation)) if field is not None else []
    key = ".".join(path) or "settings"
    if kind.startswith("union_tag"):
        known = [repr(name) for option in options for name in get_args(option.model_fields["type"].annotation)]
        return f"{key}.type: give one of {', '.join(known)}"
    if kind != "extra_forbidden":
        return f"{key}: {message.removeprefix('Value error, ')}"
    if _SECRET.search(path[-1]):
        return _no_token_in(key)
    known = list(section.model_fields)
    near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(sorted(known))}"
    return f"{key}: unknown key; {hint}"


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The section classes that appear in a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


class Staging(Section):
    """How bytes leave the training tensors. All engines of a process give the same values."""

    arena_bytes: ByteSize | None = Field(default=None, ge=2 * SMALLEST_BLOCK_BYTES)
    """Cap of the staging memory on one host, shared by the job's ranks there. Unset: a quarter of the memory of the
    host, or of the container where that has less."""
    overlap: bool = True
    """True: what only the optimizer changes is copied during the next forward and backward pass. False: everything is
    copied before the save returns."""
    check: Check = "sample"
    """How to detect that a tensor was changed between the save and its copy, which fails the save. `off`: not at all.
    `sample`: by its version counter, and by 512 bytes of each tensor in each block, at other places in every save;
    where a block holds many small tensors, of a random part of them. `full`: by the counter and every byte, for tests
    and debugging."""


class IO(Section):
    """How bytes reach the disk. All engines of a process give the same values."""

    direct: bool = True
    """Direct I/O. Where the file system refuses it, files are written through the page cache."""
    threads: int = Field(default=2, ge=1, le=64)
    """Writes in flight on each rank; a load keeps at least 4 reads in flight."""
    block_bytes: ByteSize = Field(default=ByteSize(4 << 20), ge=SMALLEST_BLOCK_BYTES)
    """Bytes of one write and of one digest; a multiple of 4096."""

    @model_validator(mode="after")
    def _aligned(self) -> IO:
        if self.block_bytes % 4096:
            raise ValueError(f"io.block_bytes is {int(self.block_bytes)}; give a multiple of 4096")
        return self


class Load(Section):
    """What loading trusts."""

    allow: tuple[str, ...] = ()
    """Qualified names (`package.module.Name`) that a checkpoint's pickles may refer to, beside the built-in list. A
    load calls what is named here, so name only what you trust with any argument."""


class Settings(Section):
    """What every way in shares."""

    async_save: bool | None = None
    """True: a save returns as soon as training may go on. False: it returns when the checkpoint is committed.
    Unset: true in a pipeline; false in a DeepSpeed script and in `roll_ckpt.megatron`, where the program around them
    may rotate directories and would miss one that has no name yet."""
    commit_timeout_s: float = Field(default=600, gt=0)
    """Longest wait of one rank for another: to begin a save, and for the votes; then the save is abandoned. For a rank
    that verifies or uploads, it counts from its last sign of life."""
    exit_timeout_s: float = Field(default=600, ge=0)
    """Longest wait at the interpreter's exit for each pending save, and for each upload that makes progress."""
    fail_training: bool = False
    """Raise the failure of a background save at the next optimizer step, and on all ranks at the next save. False: log
    it, report it in the metrics, and go on training."""
    run_id: str | None = None
    """Names the run. Unset: `default`. Jobs that commit together give the same one."""
    take_over: bool = False
    """Claim the output directory although another run seems alive. Set it only if that run is known to be dead."""
    max_ckpt_to_keep: int = Field(
        default=0, ge=0, validation_alias=AliasChoices("max_ckpt_to_keep", "save_total_limit")
    )
    """How many committed checkpoints of a series stay on the local disk; 0 keeps all. A series is what an engine or a
    pipeline saves under names that differ in numbers only. Branches that a run has abandoned by going back go first."""
    staging: Staging = Staging()
    """How bytes leave the training tensors."""
    io: IO = IO()
    """How bytes reach the disk."""
    load: Load = Load()
    """What loading trusts."""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise errors.ConfigError(_explain_all(type(self), problem)) from None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and {"max_ckpt_to_keep", "save_total_limit"} <= values.keys():
            raise ValueError("max_ckpt_to_keep and save_total_limit are one setting; give one of them")
        return values

    @model_validator(mode="after")
    def _arena_holds_blocks(self) -> Settings:
        if self.staging.arena_bytes is not None and self.staging.arena_bytes < 2 * self.io.block_bytes:
            raise ValueError(
                f"staging.arena_bytes is {int(self.staging.arena_bytes)}, less than two blocks; "
                f"raise it, or lower io.block_bytes ({int(self.io.block_bytes)})"
            )
        return self


class DeepSpeedConfig(Settings):
    """The object `checkpoint.roll_ckpt` of a DeepSpeed config. It lands in every checkpoint: no secrets."""

    cluster: str = "model"
    """Name of this engine in the manifest and in messages."""


class Upload(Section):
    """Committed checkpoints are copied to a directory."""

    type: Literal["file_system"]
    output_dir: Directory
    """The directory that receives `checkpoint-N`; never the run's own output directory, or one inside it. Give each run
    its own: where another run has uploaded a checkpoint of the same name, it stays, and the upload is refused."""
    async_upload: bool = True
    """True: upload in the background. False: `do_checkpoint` returns when the upload is done."""


class HubUpload(Section):
    """Committed checkpoints are pushed to a repository of the Hugging Face Hub.

    The token comes from HF_TOKEN or `hf auth login`, the Hub's address from HF_ENDPOINT; neither stands here.
    """

    type: Literal["hub"]
    repo_id: str
    """The repository, `namespace/name`; created if it is missing."""
    private: bool = True
    """Create it as private, and refuse one that is public."""
    revision: str = "main"
    """The branch that gets one commit for each checkpoint. A branch other than `main` must exist."""
    async_upload: bool = True
    """True: push in the background. False: `do_checkpoint` returns when the checkpoint is on the Hub."""

    @model_validator(mode="after")
    def _names(self) -> HubUpload:
        names.check_repo_id(self.repo_id)
        names.check_revision(self.revision)
        return self


class PipelineConfig(Settings):
    """The settings of a `BasePipeline`."""

    output_dir: Directory
    """The directory of the run, which gets `checkpoint-N`. Keep logs and uploads out of it. In every path here,
    `~`, `~user`, `$NAME` and `${NAME}` are expanded; a relative one starts at the present working directory."""
    save_steps: int = Field(ge=1)
    """Save at every step that is a positive multiple of this, and at the last step."""
    max_steps: int = Field(ge=1)
    """How many steps the run has. Steps count from 0, so the last one is `max_steps - 1`."""
    resume_from_checkpoint: bool | HubUri | Path = True
    """True: resume from the newest sound checkpoint. False: from none. A path: from that checkpoint; a relative one may
    also be a name in `output_dir`.
    `hf://namespace/name[@revision]`: from that one on the Hub, which rank 0 pulls to `<output_dir>-pulled`."""
    expected_clusters: dict[str, int] | None = None
    """The number of ranks of every cluster of the run, where several torchrun jobs commit together; needs `run_id`."""
    checkpoint_config: Annotated[Upload | HubUpload, Field(discriminator="type")] | None = None
    """Where committed checkpoints are sent; its `type` decides which keys it has. Unset: nowhere."""

    _in_output_dir: Path | None = PrivateAttr(None)

    @property
    def resume_paths(self) -> list[Path]:
        """Where the checkpoint may lie if `resume_from_checkpoint` is a path: there, or in `output_dir`."""
        given = self.resume_from_checkpoint
        return [path for path in (given, self._in_output_dir) if isinstance(path, Path)]

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> PipelineConfig:
        """Read a YAML file; keyword arguments replace its top-level keys.

        Raises:
            ConfigError: the file cannot be read, is not YAML, or holds a wrong key or value. All are named.
        """
        try:
            values = yaml.safe_load(names.absolute(path).read_text(encoding="utf-8")) or {}
        except OSError as problem:
            raise errors.ConfigError(f"cannot read the configuration {path}: {problem.strerror}") from problem
        except (yaml.YAMLError, ValueError, RecursionError) as problem:  # a ValueError: an impossible date, say
            raise errors.ConfigError(f"{path} is not YAML: {problem}") from problem
        if not isinstance(values, dict):
            raise errors.ConfigError(f"{path}: expected a mapping of settings at the top level")
        return cls.parse({**values, **overrides}, where=str(path))

    @model_validator(mode="after")
    def _sound(self) -> PipelineConfig:
        if self.expected_clusters is not None and not self.run_id:
            raise ValueError("expected_clusters needs run_id, the same in the configuration of every job")
        if isinstance(self.resume_from_checkpoint, Path):
            path = Path(names.expand(self.resume_from_checkpoint))
            self._in_output_dir = self.output_dir / path
            self.__dict__["resume_from_checkpoint"] = path.absolute()
        upload = self.checkpoint_config
        if isinstance(upload, Upload):
            output_dir, destination = self.output_dir.resolve(), upload.output_dir.resolve()
            if destination == output_dir or output_dir in destination.parents:
                raise ValueError(
                    f"checkpoint_config.output_dir {upload.output_dir} lies in output_dir {self.output_dir}; "
                    "give a directory outside it"
                )
        return self
