"""roll-ckpt hub-dev: serves a local Hub until a signal ends it."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from .server import LocalHub

_ABOUT = """\
Serve a local Hugging Face Hub for development and tests without internet: model
repositories in DIR, on 127.0.0.1 only. Never for production. The first line on
stdout is its address; Ctrl-C or SIGTERM ends it, and DIR stays for the next start.

  roll-ckpt hub-dev --root runs/hub --port 8600
  export HF_ENDPOINT=http://127.0.0.1:8600 HF_HUB_DISABLE_XET=1 HF_TOKEN=anything

It has no Xet storage: set HF_HUB_DISABLE_XET=1 before the client starts, so that large
files are uploaded with LFS; without it their upload ends with an error that says so.
Datasets, spaces, buckets and pull requests are not supported.

Any token may write, unless --token-env names a variable with the only one that may.
Private repositories are visible with a token only. Requests are logged in DIR/log, one
JSON object a line, and shown at GET /__requests__; tokens are never logged. To make the
second commit from now on fail after it was made, and to remove all faults again:

  curl -d '{"route": "commit", "call": 2, "status": 500, "landed": true}' \\
      http://127.0.0.1:8600/__faults__
  curl -X DELETE http://127.0.0.1:8600/__faults__

Keys of a fault: route (a name from the log, or "*"), call (the first call from now on
that fails; 1), times (how many fail; 1, or 0 for all), status with message, code
(X-Error-Code) and retry_after_s, stall_s (seconds to wait first), cut_at (cut the
connection after so many bytes of the answer; 0 for no answer at all), landed (carry out
the request, then fail).
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until Ctrl-C or SIGTERM; return 0. SystemExit: 2 on wrong usage, 1 if the variable of a token is empty."""
    args = _parser().parse_args(argv)
    write_token, read_token = _token(args.token_env), _token(args.read_token_env)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = args.part_mib << 20
    serving = LocalHub(args.root, port=args.port, write_token=write_token, read_token=read_token, part_bytes=parts)
    with suppress(KeyboardInterrupt), serving as hub:
        document = {"url": hub.url, "root": str(args.root), "log": str(hub.log_path)}
        print(json.dumps(document) if args.json else hub.url, flush=True)
        _say(f"a local Hub, for tests only; requests are logged in {hub.log_path}. Set for its clients:")
        print(f"  export HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1", file=sys.stderr)
        threading.Event().wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="roll-ckpt hub-dev", description=_ABOUT, formatter_class=raw)
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="its repositories; made if missing")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: 0, any free port")
    parser.add_argument("--token-env", metavar="NAME", help="variable with the only token that may write")
    parser.add_argument("--read-token-env", metavar="NAME", help="variable with a token that may only read")
    parser.add_argument(
        "--part-mib", type=_positive_mib, default=64, metavar="N", help="larger files are uploaded in parts (64)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the address")
    return parser


def _say(text: str) -> None:
    print(f"roll-ckpt: {text}", file=sys.stderr)


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if token := os.environ.get(variable):
        return token
    _say(f"the environment variable {variable}, which should hold a token, is not set or is empty")
    raise SystemExit(1)


def _positive_mib(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of MiB")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
