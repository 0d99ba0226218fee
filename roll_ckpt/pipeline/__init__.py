"""The way in for a training loop of one's own: `BasePipeline` and the clusters that it checkpoints.

`base`, `cluster` and `worker_state` are public through `roll_ckpt`; the others are parts of `base`.
"""
