"""A local Hub for development and tests without internet: model repositories on 127.0.0.1, never for production.

The real huggingface_hub client pushes to it and pulls from it when HF_ENDPOINT is its address. `store` keeps the
repositories on disk, `routes` answers requests, `faults` injects failures, `server` serves HTTP. Installed as the
package roll_ckpt_hub_dev with the command `roll-ckpt hub-dev`; roll_ckpt itself never imports it.

    with LocalHub(root) as hub:
        hub.faults.add(Fault("commit", status=500, landed=True))
        run_with(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1")
        hub.requests()

Not supported: Xet (the client must run with HF_HUB_DISABLE_XET=1), datasets, spaces, buckets, pull requests, squashing.
"""

from __future__ import annotations

from .faults import Fault as Fault
from .server import LocalHub as LocalHub
