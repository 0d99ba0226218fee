"""Megatron-core: what `dist_checkpointing` saves goes through roll_ckpt, and stock `dist_checkpointing` can load it.

Megatron plans which rank writes which shard; we move the bytes. The public module `roll_ckpt.megatron` imports
`handle`, `load`, `save` and `strategy`; `backend.FRAMEWORKS` names `cluster`.
"""
