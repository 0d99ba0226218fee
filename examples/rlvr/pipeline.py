"""The pipeline: which models it trains, one step of it, and what a checkpoint of it holds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator

from examples.rlvr.critic import Critic, CriticConfig
from examples.rlvr.learn import learn_policy
from examples.rlvr.model import build_actor, build_reference, byte_tokenizer
from examples.rlvr.rollout import TextCursor, prose, returns, sample, text_of_python
from examples.rlvr.settings import RlvrConfig
from roll_ckpt import BasePipeline, Cluster


class RlvrPipeline(BasePipeline):
    """Reinforcement learning with a verifiable reward. With `only`, this world trains that one cluster."""

    def __init__(self, config: RlvrConfig, *, only: str | None = None) -> None:
        super().__init__(config)
        self.training = config.training
        self.actor = self.critic = None
        _be_exact()
        deepspeed.init_distributed(verbose=False)
        rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = torch.device(get_accelerator().current_device_name())

        clusters = []
        if only in (None, "actor_train"):
            actor = build_actor(self.training.seed)
            self.reference = build_reference(actor).to(self.device)
            self.actor = _start(actor, config.clusters["actor_train"])
            tokenizer = byte_tokenizer()
            clusters.append(Cluster("actor_train", self.actor, tokenizer=tokenizer, config=actor.config))
        if only in (None, "critic"):
            self.critic = Critic(CriticConfig.read(config.clusters["critic"]), self.training.seed + 1, self.device)
            clusters.append(Cluster("critic", self.critic.trained))
        self.set_checkpoint_clusters(*clusters)

        self.cursor = TextCursor(text_of_python(), rank=rank, world_size=world_size)
        self.register_stateful("text_cursor", self.cursor)
        seed = self.training.seed + rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def train_step(self) -> dict[str, float]:
        """One optimizer step of every cluster of this world; returns its losses on this rank."""
        if self.actor is None:
            return self._learn_values_of_text()
        settings = self.training
        rollout = sample(
            self.actor.module,
            self._text(settings.prompt_bytes),
            answer_bytes=settings.answer_bytes,
            discount=settings.discount,
        )
        figures: dict[str, float] = {}
        baseline = rollout.returns.mean()
        if self.critic is not None:
            figures, baseline = self.critic.learn(rollout.tokens, rollout.returns)
        return figures | learn_policy(self.actor, self.reference, rollout, baseline, kl_weight=settings.kl_weight)

    def _learn_values_of_text(self) -> dict[str, float]:
        """A critic on its own judges text that people wrote, by the same rule."""
        settings = self.training
        tokens = self._text(settings.prompt_bytes + settings.answer_bytes)
        earned = returns(prose(tokens[:, -settings.answer_bytes :]), settings.discount)
        return self.critic.learn(tokens, earned)[0]

    def _text(self, nbytes: int) -> torch.Tensor:
        return self.cursor.take(self.training.prompts_per_rank, nbytes).to(self.device)


def _start(model: torch.nn.Module, config: Path) -> Any:
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=str(config))
    return engine


def _be_exact() -> None:
    """The same seeds give the same bits, so that a resumed run can be compared with an unbroken one."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
