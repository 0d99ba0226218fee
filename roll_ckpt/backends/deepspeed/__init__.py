"""DeepSpeed ZeRO: `engine.save_checkpoint()` and its relatives write through roll_ckpt.

DeepSpeed decides what a checkpoint holds and what its files are called. We decide where the files go, how their bytes
get there, and when `latest` is written. The public module `roll_ckpt.deepspeed` imports `install`; `backend.FRAMEWORKS`
names `cluster`.
"""

from roll_ckpt.backends.deepspeed import version

version.check()
