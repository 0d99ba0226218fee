"""What is owed to the Hub is pushed by a process of its own, which the training process only listens to.

    python -m roll_ckpt.uploader OUTPUT_DIR [--again]      pushes what is owed, the oldest first, then ends

It tells what it does in JSON lines on stdout, runs at the lowest priority and ends when its parent does. One at a
time for an output directory. Killed at any instant, the next one goes on: see push_queue.py.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

log = logging.getLogger("roll_ckpt")

_LOG_S = 30.0


class ProgressBar:
    """Shows one push to a person: a line on a terminal that is written anew, else a line in the log now and then."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._last = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        done, total = event["done"], event["total"]
        text = f"{event['name']}: {event['doing']} {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        share = done / total if total else 1.0
        if self._tty:
            line = "#" * int(30 * share)
            print(f"\r\033[K[{line:<30}] {100 * share:3.0f} %  {text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last > _LOG_S:
            self._last = time.monotonic()
            log.info("%s (%.0f %%)", text, 100 * share)

    def end(self) -> None:
        """Take the line away."""
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
