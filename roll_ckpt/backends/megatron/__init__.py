"""Megatron-core: what `dist_checkpointing` saves goes through us, and stays what stock reads.

Stock code plans who writes which shard, we move the bytes. The public module `roll_ckpt.megatron` imports `handle`,
`load`, `save` and `strategy`; the registry imports `cluster`.
"""
