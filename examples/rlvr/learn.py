"""How the actor learns: a clipped policy gradient held near the reference."""

from __future__ import annotations

from typing import Any

import torch

from examples.rlvr.rollout import Rollout

CLIP = 0.2


def learn_policy(
    engine: Any, reference: torch.nn.Module, rollout: Rollout, baseline: torch.Tensor, *, kl_weight: float
) -> dict[str, float]:
    """One optimizer step of the actor on what it sampled; returns the figures of this rank."""
    answer = rollout.rewards.shape[1]
    picked = rollout.tokens[:, -answer:].unsqueeze(-1)
    policy = _log_distribution(engine, rollout.tokens, answer)
    with torch.no_grad():
        start = _log_distribution(reference, rollout.tokens, answer)

    advantage = rollout.returns - baseline
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    ratio = (policy.gather(2, picked).squeeze(-1) - rollout.logprobs).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    kl = (policy.exp() * (policy - start)).sum(dim=-1).mean()
    loss = kl_weight * kl - gain

    engine.backward(loss)
    engine.step()
    return {"actor/loss": loss.item(), "actor/kl": kl.item(), "actor/reward": rollout.rewards.mean().item()}


def _log_distribution(model: Any, tokens: torch.Tensor, answer: int) -> torch.Tensor:
    """log p(token | everything before it) over the vocabulary, for each token of the answer."""
    logits = model(input_ids=tokens, use_cache=False).logits[:, -answer - 1 : -1]
    return logits.float().log_softmax(dim=-1)
