"""The Hugging Face Trainer, which makes and rotates its directories itself, with our section in its config."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import environment

from roll_ckpt.transaction import verification

SCRIPT = """
import json, sys
import torch, transformers
import roll_ckpt.deepspeed
from roll_ckpt.backends.deepspeed.install import attached

out, steps, keep, resume = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "resume"
config = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "fp16": {"enabled": False},  # or else transformers 4 casts what goes into the model to fp16
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "checkpoint": {"roll_ckpt": {"staging": {"check": "full"}}},
}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 1))

    def forward(self, x, labels=None):
        y = self.net(x).squeeze(-1)
        return {"loss": torch.nn.functional.mse_loss(y, labels), "logits": y}


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        g = torch.Generator().manual_seed(i)
        return {"x": torch.randn(16, generator=g), "labels": torch.randn((), generator=g)}


transformers.set_seed(3)
arguments = transformers.TrainingArguments(
    output_dir=out, max_steps=steps, save_steps=2, save_total_limit=keep, logging_steps=1, deepspeed=config,
    per_device_train_batch_size=4, report_to=[], disable_tqdm=True, seed=3, learning_rate=1e-2,
    lr_scheduler_type="constant", save_strategy="steps", optim="adamw_torch",
)
trainer = transformers.Trainer(model=Model(), args=arguments, train_dataset=Data())
trainer.train(resume_from_checkpoint=resume or None)
assert attached(trainer.model_wrapped) is not None, "the Trainer's engine is not ours"
losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
print("RESULT", json.dumps(losses))
"""


def run(tmp_path: Path, out: str, steps: int, *, keep: int, resume: bool = False) -> dict[str, float]:
    """Train until `steps` in a process of its own; the loss of each step it made."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / out), str(steps), str(keep), "resume" if resume else "-"],
        env=environment(ACCELERATE_USE_DEEPSPEED="true", **alone),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    told: dict[str, float] = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    return told


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint-"))


def assert_sound(folder: Path, step: int) -> None:
    made = folder / f"checkpoint-{step}"
    assert verification.verify(made / f"global_step{step}") == []
    assert (made / "latest").read_text() == f"global_step{step}"
    assert not list(made.glob(".*.tmp"))


@pytest.mark.long
@pytest.mark.core("transformers")
def test_a_resumed_trainer_repeats_its_losses_and_its_rotation_leaves_the_newest(tmp_path: Path) -> None:
    unbroken = run(tmp_path, "run", 6, keep=2)
    assert list(unbroken) == ["1", "2", "3", "4", "5", "6"] and len(set(unbroken.values())) == 6
    assert checkpoints(tmp_path / "run") == ["checkpoint-4", "checkpoint-6"]
    for step in (4, 6):
        assert_sound(tmp_path / "run", step)

    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    again = run(tmp_path, "run", 6, keep=1, resume=True)
    assert again == {step: unbroken[step] for step in unbroken if step in again} and {"5", "6"} <= set(again)
    assert checkpoints(tmp_path / "run") == ["checkpoint-6"]
    assert_sound(tmp_path / "run", 6)
