"""Which framework recognises what a cluster is given, without importing one that nobody uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from roll_ckpt import Cluster, MegatronModel, PipelineConfig
from roll_ckpt.backends.backend import FRAMEWORKS
from roll_ckpt.errors import ConfigError


def test_a_megatron_model_is_recognised_by_its_framework_alone() -> None:
    model = MegatronModel(None, None)
    assert [framework.module for framework in FRAMEWORKS if framework.recognises(model)] == [
        "roll_ckpt.backends.megatron.cluster"
    ]


def test_what_no_framework_recognises_is_refused_by_its_type() -> None:
    config = PipelineConfig(output_dir="unused", save_steps=1, max_steps=1)
    with pytest.raises(
        ConfigError,
        match="trained is dict, which no supported framework recognises; give a DeepSpeed",
    ):
        Cluster("actor", {}).attach(config)


def test_to_recognise_imports_no_framework() -> None:
    code = (
        "import sys\n"
        "from roll_ckpt.backends.backend import FRAMEWORKS\n"
        "assert not any(framework.recognises(object()) for framework in FRAMEWORKS)\n"
        "assert not {'deepspeed', 'megatron'} & {name.split('.')[0] for name in sys.modules}\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
