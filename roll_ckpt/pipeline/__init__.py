"""The entry for your own training loop: `BasePipeline`, and the `Cluster`s that it checkpoints together.

`base`, `cluster` and `worker_state` are public through `roll_ckpt`; the other modules are parts of `base`. Nothing but
the root module imports this folder.
"""
