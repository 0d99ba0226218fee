"""The real huggingface_hub client in a process of its own, since it reads its environment when imported.

python hub_client.py        reads {"code": ..., "names": {...}} lines, answers {"value": ...} or {"error": ...}
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Refused(Exception):
    """What the client raised: the exception's class, those that it is made of, and the HTTP status."""

    def __init__(self, kind: str, bases: list[str], status: int | None, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.bases, self.status, self.text = kind, bases, status, text


def settings(endpoint: str, home: Path) -> dict[str, str]:
    """The environment that a client of a local Hub needs before it imports huggingface_hub."""
    return {
        **{"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_TOKEN": "hf_writes", "HF_HUB_DISABLE_XET": "1"},
        **{"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        **{"HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_XET_TELEMETRY_ENABLED": "0"},
    }


class Client:
    """Runs Python code, with `api` an HfApi, and returns the value of its last line."""

    def __init__(self, endpoint: str, home: Path, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**kept, **settings(endpoint, home), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def start(self, code: str, **names: object) -> None:
        """Let it begin; finish() has what comes of it."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"code": code, "names": names}, default=str) + "\n")
        self._process.stdin.flush()

    def finish(self) -> Any:
        assert self._process.stdout
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise Refused(*answer["error"])
        return answer["value"]

    def __call__(self, code: str, **names: object) -> Any:
        self.start(code, **names)
        return self.finish()

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def close(self) -> None:
        self._process.communicate("")


def main() -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    answers = sys.stdout
    sys.stdout = sys.stderr
    known: dict[str, Any] = {"api": HfApi(), "Add": CommitOperationAdd, "Delete": CommitOperationDelete}
    for line in sys.stdin:
        given = json.loads(line)
        scope = {**known, **given["names"]}
        *before, last = ast.parse(given["code"]).body
        try:
            exec(compile(ast.Module(before, []), "<test>", "exec"), scope)
            value = None
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), "<test>", "eval"), scope)
            else:
                exec(compile(ast.Module([last], []), "<test>", "exec"), scope)
            told = {"value": value}
        except Exception as error:
            bases = [kind.__name__ for kind in type(error).__mro__]
            status = getattr(getattr(error, "response", None), "status_code", None)
            told = {"error": [type(error).__name__, bases, status, str(error)]}
        answers.write(json.dumps(told, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
