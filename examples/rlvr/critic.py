"""The critic under Megatron-core: a GPTModel that says one number for each token, and what trains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from pydantic import Field

from examples import megatron_cpu
from examples.rlvr.model import VOCABULARY
from roll_ckpt import MegatronModel
from roll_ckpt.config import Section
from roll_ckpt.errors import ConfigError

if not torch.cuda.is_available():
    megatron_cpu.install()

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

LONGEST = 256
VOCABULARY_PADDED = VOCABULARY + -VOCABULARY % 8  # or else tensor parallel ranks could not share it


class CriticConfig(Section):
    """The critic's YAML file; Megatron's names."""

    tensor_model_parallel_size: int = Field(ge=1)
    """What the ranks do not share by it is data parallel."""
    distrib_optim_sharding_type: str
    """How the optimizer is saved: `dp_reshardable`, or `fully_reshardable` to change the layout afterwards."""
    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    dropout: float = Field(ge=0, lt=1)
    lr: float = Field(gt=0)
    min_lr: float = Field(ge=0)
    lr_decay_steps: int = Field(ge=1)
    clip_grad: float = Field(gt=0)

    @classmethod
    def read(cls, path: Path) -> CriticConfig:
        """Raises: ConfigError: names the file, and the wrong key or value."""
        try:
            return cls.parse(yaml.safe_load(path.read_text(encoding="utf-8")), where=str(path))
        except (OSError, yaml.YAMLError) as problem:
            raise ConfigError(f"cannot read the critic's configuration {path}: {problem}") from problem


class ValueHead(torch.nn.Linear):
    """One number in place of a distribution over the vocabulary; every tensor parallel rank has it whole."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)
        torch.nn.init.zeros_(self.weight)

    def forward(self, hidden: torch.Tensor, **_: Any) -> Any:
        return super().forward(hidden), None


class Critic:
    """The model on this rank with its distributed optimizer and scheduler; every rank makes the same calls."""

    def __init__(self, config: CriticConfig, seed: int, device: torch.device) -> None:
        tp = config.tensor_model_parallel_size
        if dist.get_world_size() % tp:
            raise ConfigError(
                f"critic: tensor_model_parallel_size {tp} does not divide the job's {dist.get_world_size()} ranks"
            )
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        torch.manual_seed(seed)
        transformer = TransformerConfig(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            attention_dropout=config.dropout,
            hidden_dropout=config.dropout,
            tensor_model_parallel_size=tp,
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
        )
        gpt = GPTModel(
            transformer,
            get_gpt_layer_local_spec(),
            VOCABULARY_PADDED,
            LONGEST,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
        )
        gpt.output_layer = ValueHead(config.hidden_size)
        reduction = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(transformer, reduction, gpt.to(device))
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                clip_grad=config.clip_grad,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=config.lr,
            min_lr=config.min_lr,
            lr_warmup_steps=1,
            lr_decay_steps=config.lr_decay_steps,
            lr_decay_style="cosine",
            start_wd=0.01,
            end_wd=0.01,
            wd_incr_steps=config.lr_decay_steps,
            wd_incr_style="constant",
        )
        self.trained = MegatronModel(
            self.model, self.optimizer, self.scheduler, sharding_type=config.distrib_optim_sharding_type
        )

    def learn(self, tokens: torch.Tensor, targets: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
        """One optimizer step towards `targets`; returns its figures and what it had expected of these tokens."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        shared = _of_tensor_parallel_ranks(targets)
        values = self._values(_of_tensor_parallel_ranks(tokens))[:, -targets.shape[1] - 1 : -1]
        loss = torch.nn.functional.mse_loss(values, shared)
        loss.backward()
        finalize_model_grads([self.model])
        self.optimizer.step()
        self.scheduler.step(increment=1)
        expected = values.detach()[self._rows(tokens)]
        return {"critic/loss": loss.item(), "critic/value": expected.mean().item()}, expected

    def _values(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        hidden = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        return self.model(tokens, positions, hidden).squeeze(-1)

    def _rows(self, tokens: torch.Tensor) -> slice:
        first = parallel_state.get_tensor_model_parallel_rank() * len(tokens)
        return slice(first, first + len(tokens))


def _of_tensor_parallel_ranks(mine: torch.Tensor) -> torch.Tensor:
    """Tensor parallel ranks compute one batch together, but each has sampled its own: all of them, in order."""
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine.contiguous(), group=group)
    return torch.cat(parts)
