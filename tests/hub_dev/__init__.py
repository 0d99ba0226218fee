"""A local Hub for development and tests without internet: model repositories on 127.0.0.1, never for production.

The real huggingface_hub client pushes to it and pulls from it with HF_ENDPOINT set to its address. `store` keeps
repositories on disk, `faults` says how to misbehave, `routes` are the answers, `server` speaks HTTP.

    with LocalHub(root) as hub:
        hub.faults.add(Fault("commit", status=500, landed=True))
        run_with(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
        hub.requests()

Left out: Xet (the client must run with HF_HUB_DISABLE_XET=1), datasets, spaces, buckets, pull requests, squashing.
"""

from __future__ import annotations

from .faults import Fault as Fault
from .server import LocalHub as LocalHub
