"""Where experience comes from: prompts of real text, sampled answers, a reward that a program checks."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from examples.rlvr.model import BYTES


def text_of_python() -> bytes:
    """The language reference that every CPython carries for `help()`: about 700 kB of English."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


class TextCursor:
    """Where a rank is in its share of the text; a checkpoint keeps it, so that a resumed run reads on.

    The hops between two pieces come from Python's own random numbers, which are in the checkpoint too.
    """

    def __init__(self, text: bytes, *, rank: int, world_size: int) -> None:
        share = len(text) // world_size
        self._text = text[rank * share : (rank + 1) * share]
        self._offset = rank
        self._pieces = 0

    def take(self, count: int, nbytes: int) -> torch.Tensor:
        """The next `count` pieces of `nbytes` bytes each, as a (count, nbytes) tensor of byte tokens."""
        return torch.tensor([list(self._piece(nbytes)) for _ in range(count)])

    def _piece(self, nbytes: int) -> bytes:
        self._offset = (self._offset + random.randrange(nbytes, 8 * nbytes)) % (len(self._text) - nbytes)
        self._pieces += 1
        return self._text[self._offset : self._offset + nbytes]

    def state_dict(self) -> dict[str, Any]:
        return {"offset": self._offset, "pieces": self._pieces}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._offset, self._pieces = state["offset"], state["pieces"]


_PROSE = torch.zeros(BYTES + 3, dtype=torch.float32)
_PROSE[list(b"abcdefghijklmnopqrstuvwxyz ")] = 1.0


def prose(tokens: torch.Tensor) -> torch.Tensor:
    """The verifiable reward: 1 for a byte of plain prose (a-z or a space), 0 for every other token."""
    return _PROSE[tokens]


def returns(rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """What each token earned: its own reward and the discounted rewards of those after it."""
    total = torch.zeros_like(rewards[:, 0])
    columns = []
    for column in reversed(rewards.unbind(dim=1)):
        total = column + discount * total
        columns.append(total)
    return torch.stack(columns[::-1], dim=1)


@dataclass(frozen=True)
class Rollout:
    """`tokens` are prompt and answer together; the others have one column for each token of the answer."""

    tokens: torch.Tensor
    logprobs: torch.Tensor
    rewards: torch.Tensor
    returns: torch.Tensor


@torch.no_grad()
def sample(actor: LlamaForCausalLM, prompts: torch.Tensor, *, answer_bytes: int, discount: float) -> Rollout:
    """Draw one answer for each prompt from the policy as it stands, without dropout."""
    actor.eval()
    tokens, step, cache, logprobs = prompts, prompts, None, []
    for _ in range(answer_bytes):
        output = actor(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        distribution = output.logits[:, -1].float().log_softmax(dim=-1)
        step = torch.multinomial(distribution.exp(), 1)
        tokens = torch.cat([tokens, step], dim=1)
        logprobs.append(distribution.gather(1, step))
    actor.train()
    rewards = prose(tokens[:, -answer_bytes:])
    return Rollout(tokens, torch.cat(logprobs, dim=1), rewards, returns(rewards, discount))
