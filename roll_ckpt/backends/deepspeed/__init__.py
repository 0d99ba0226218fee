"""DeepSpeed ZeRO: `engine.save_checkpoint()` and its kin go through us.

Stock code decides what a checkpoint holds and how its files are called. We decide where they go, how their bytes get
there, and when `latest` is written. The public module `roll_ckpt.deepspeed` imports `install`; the registry `cluster`.
"""
