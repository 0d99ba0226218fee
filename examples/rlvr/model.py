"""The policy, its reference and their tokenizer: small, random and the same on every machine."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BYTES = 256
SPECIALS = ("<|bos|>", "<|eos|>", "<|pad|>")
VOCABULARY = BYTES + len(SPECIALS)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without merges: the id of a byte is the byte, the three special tokens follow."""
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in _alphabet().items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def _alphabet() -> dict[int, str]:
    """The printable letter by which byte-level tokenizers write each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(BYTES) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(BYTES + i) for i, byte in enumerate(rest)}


class WideLinear(nn.Linear):
    """A bf16 layer that multiplies in fp32: most CPUs lack bf16 arithmetic and are 30 times slower in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def _widen(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear


def build_actor(seed: int) -> LlamaForCausalLM:
    """The policy: a Llama of about 10 million parameters with dropout in its attention."""
    torch.manual_seed(seed)
    actor = LlamaForCausalLM(_llama(hidden=320, layers=8, heads=5))
    _widen(actor)
    return actor


def build_reference(actor: LlamaForCausalLM) -> LlamaForCausalLM:
    """The actor as it started, frozen and without dropout: what the KL term holds the policy to."""
    reference = copy.deepcopy(actor).to(torch.bfloat16).eval()
    return reference.requires_grad_(False)


def _llama(*, hidden: int, layers: int, heads: int) -> LlamaConfig:
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 8 * hidden // 3 // 32 * 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }
    return LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        attention_dropout=0.1,
        bos_token_id=BYTES,
        eos_token_id=BYTES + 1,
        pad_token_id=BYTES + 2,
        tie_word_embeddings=False,
        **sizes,
    )
