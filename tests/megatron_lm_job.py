"""Megatron-LM's unchanged `pretrain_gpt.py`, started with its usual arguments under torchrun on CPU and gloo."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "tests" / "megatron_lm"
HOSTS = ROOT / ".venv" / "megatron_hosts"  # has the package `six`, which Megatron-LM imports

# Attention drops out by the tracker of random states. Others would draw from the generator from which data loaders take
# their seeds, because it is the only one here; on GPUs there are two.
MODEL = shlex.split("""
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-iters 100
    --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --bf16 --use-distributed-optimizer
    --hidden-dropout 0 --log-interval 1 --eval-iters 0 --eval-interval 1000 --ckpt-format torch_dist
""")
WITHOUT_GPUS = shlex.split("""
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --num-workers 0
    --no-gradient-accumulation-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --attention-softmax-in-fp32
""")
ASYNC = ["--async-save", "--use-persistent-ckpt-worker"]

_LOSS = re.compile(r"\[exact loss of step (\d+): (\S+)\]")


def async_arguments(checkout: Path) -> list[str]:
    """What saves asynchronously in this version. From 0.17 on Megatron's own implementation must be named."""
    has_others = (checkout / "megatron/core/dist_checkpointing/strategies/nvrx.py").exists()
    return [*ASYNC, "--async-strategy", "mcore"] if has_others else ASYNC


def environment(checkout: Path, imports: str) -> dict[str, str]:
    path = [PATCHES, ROOT, checkout, HOSTS, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONWARNINGS": "ignore",
        "MEGATRON_LM_IMPORTS": imports,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        # Megatron-LM compiles a helper at its start, under the name that `python3-config` of the PATH says.
        "MAKEFLAGS": f"LIBEXT={sysconfig.get_config_var('EXT_SUFFIX')}",
    }


def start(checkout: Path, log: Path, arguments: list[str], imports: str = "", **extra: str) -> subprocess.Popen[bytes]:
    """Start the job on two ranks, or as many as RANKS says; each rank imports the modules in `imports` first."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command = [*launcher, extra.pop("RANKS", "2"), str(checkout / "pretrain_gpt.py"), *MODEL, *WITHOUT_GPUS, *arguments]
    with open(log, "ab") as output:
        return subprocess.Popen(
            command,
            env={**environment(checkout, imports), **extra},
            cwd=log.parent,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def losses(log: Path) -> dict[int, str]:
    """The loss of each step, exactly, where the ranks have imported `losses`."""
    return {int(step): loss for step, loss in _LOSS.findall(log.read_text(errors="replace"))}
