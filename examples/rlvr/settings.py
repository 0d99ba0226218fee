"""The job's settings: a `PipelineConfig` with a section of its own, read from YAML and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from examples.rlvr.journal import work_dir_of
from roll_ckpt.config import PipelineConfig, Section
from roll_ckpt.errors import ConfigError


class Training(Section):
    """What is sampled and how it is weighed."""

    seed: int
    """Of the initial weights, and with the rank added of all sampling and dropout."""
    prompts_per_rank: int = Field(ge=1)
    prompt_bytes: int = Field(ge=1)
    answer_bytes: int = Field(ge=1)
    discount: float = Field(ge=0, lt=1)
    """Weight of the next byte's reward in what a byte earned."""
    kl_weight: float = Field(ge=0)
    """Weight of the distance to the reference in the actor's loss."""


class RlvrConfig(PipelineConfig):
    """The whole YAML file."""

    clusters: dict[str, Path]
    """Configuration of each: the actor's for DeepSpeed, the critic's for Megatron-core."""
    training: Training


def read_settings(path: Path, output_dir: Path | None, assignments: list[str]) -> RlvrConfig:
    """The settings of `path`, with `output_dir` (and the uploads beside it) and `KEY=VALUE`s in their place.

    Raises:
        ConfigError: names the wrong key or value.
    """
    changes: dict[str, Any] = {}
    if output_dir is not None:
        uploads = work_dir_of(output_dir) / "uploads"
        changes |= {
            "output_dir": output_dir,
            "checkpoint_config": {"type": "file_system", "output_dir": uploads},
        }
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"{assignment!r}: expected KEY=VALUE, for example max_steps=20")
        changes[key] = yaml.safe_load(value)
    config = RlvrConfig.from_yaml(path, **changes)
    assert isinstance(config, RlvrConfig)
    return config
