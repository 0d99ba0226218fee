"""Small real engines and the steps they train, run on the ranks of a test world."""

from __future__ import annotations

import copy
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import roll_ckpt.deepspeed  # noqa: F401  (installs the backend)

WIDTH = 24


class Net(torch.nn.Module):
    """A few layers with dropout, a buffer that forward changes, a frozen and a tied parameter."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, width)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(3)])
        self.norm = torch.nn.LayerNorm(width)
        self.frozen = torch.nn.Linear(width, width).requires_grad_(False)
        self.head = torch.nn.Linear(width, 50, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = torch.nn.functional.dropout(torch.relu(layer(hidden)), 0.1, self.training)
        logits = self.head(self.norm(self.frozen(hidden)))
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), tokens.flatten())


def config(stage: int, precision: str, ours: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 100},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        **more,
    }
    if precision == "bf16":
        made["bf16"] = {"enabled": True}
    if ours is not None:
        made.setdefault("checkpoint", {})["roll_ckpt"] = ours
    return made


def engine(
    stage: int, precision: str, ours: dict[str, Any] | None, seed: int = 0, width: int = WIDTH, **more: Any
) -> Any:
    """A DeepSpeed engine around `Net`; `ours` is its `checkpoint.roll_ckpt`, None for stock DeepSpeed."""
    torch.manual_seed(seed)
    settings = config(stage, precision, copy.deepcopy(ours), **more)
    with deepspeed.zero.Init(config_dict_or_path=settings, enabled=stage == 3):
        net = Net(width)
    trained = [p for p in net.parameters() if p.requires_grad]
    return deepspeed.initialize(model=net, model_parameters=trained, config=settings)[0]


def train(trained: Any, steps: int, seed: int) -> list[float]:
    """Train `steps` steps on data that follows from `seed`, the step and the rank; losses of this rank."""
    losses = []
    for step in range(steps):
        torch.manual_seed(1000 * seed + 10 * step + dist.get_rank())
        tokens = torch.randint(0, 50, (4, 8))
        loss = trained(tokens)
        trained.backward(loss)
        trained.step()
        losses.append(float(loss))
    return losses
