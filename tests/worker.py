"""One rank of a `worlds.World`: runs the functions that arrive until the connection ends."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
from multiprocessing.connection import Client

import deepspeed
import torch
import torch.distributed as dist


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo", dist_init_required=True)
    connection = Client(sys.argv[1], "AF_UNIX")
    connection.send(dist.get_rank())
    while True:
        try:
            call, module, name, args, kwargs = connection.recv()
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), name)(*args, **kwargs)
            connection.send((call, True, result))
        except BaseException:
            connection.send((call, False, traceback.format_exc()))


if __name__ == "__main__":
    main()
