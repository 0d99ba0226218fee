"""How far a push or a pull has got, shown to a person: a bar on a terminal, else a line in the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("roll_ckpt")

_LOG_EVERY_S = 30.0


class ProgressBar:
    """Shows one push or pull: one line of the terminal, rewritten each time, or a log line every 30 seconds."""

    def __init__(self) -> None:
        self._tty = sys.stderr.isatty()
        self._logged_at = time.monotonic()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show an event with the keys `name`, `doing` ("sent", …), `done` and `total` (bytes)."""
        done, total = event["done"], event["total"]
        text = f"{event['name']}: {event['doing']} {done / 1e9:.2f} of {total / 1e9:.2f} GB"
        share = done / total if total else 1.0
        if self._tty:
            bar = "#" * int(30 * share)
            print(f"\r\033[K[{bar:<30}] {100 * share:3.0f} %  {text}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._logged_at > _LOG_EVERY_S:
            self._logged_at = time.monotonic()
            log.info("%s (%.0f %%)", text, 100 * share)

    def end(self) -> None:
        """Clear the line on the terminal."""
        if self._tty:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """A progress bar that is cleared at the end of the block."""
    bar = ProgressBar()
    try:
        yield bar
    finally:
        bar.end()
