"""The HTTP server of the local Hub: tokens, faults and the request log. Standard library only, 127.0.0.1 only."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from hmac import compare_digest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from uuid import uuid4

from roll_ckpt.disk import reads, tree, writes
from roll_ckpt.errors import ConfigError

from .faults import Fault, Faults, parse
from .routes import ROUTES, Call, Reply, Route, Token
from .store import Refusal, Store

PART_BYTES = 64 << 20
FAULTS_PATH = "/__faults__"
REQUESTS_PATH = "/__requests__"

_BLOCK = 1 << 20
_LINE = 1 << 16


class LocalHub:
    """A local Hub that serves from threads of this process, from its construction until close().

    Without `write_token` any token may write; `read_token` may only read. Requests without a token see public
    repositories only. Files larger than `part_bytes` are uploaded in parts. `port` 0 is any free port.

    Raises:
        ConfigError: the directory or the port cannot be used.
    """

    def __init__(
        self,
        root: Path,
        *,
        port: int = 0,
        write_token: str | None = None,
        read_token: str | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self.store = Store(root)
        self.faults = Faults({route.name for route in ROUTES})
        self.part_bytes = part_bytes
        self.stopping = threading.Event()
        self._write_token = write_token
        self._read_token = read_token
        try:
            self._server = _Server(self, port)
        except (OSError, OverflowError) as error:
            self.store.close()
            raise ConfigError(f"port {port} of 127.0.0.1: {error}; choose another, or 0 for a free one") from error
        self._log = _Log(root / "log")
        self.log_path = self._log.path
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop as if killed: cut connections and drop stalled answers. Another server may use the directory then."""
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_connections()
        self._log.close()
        self.store.close()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def requests(self) -> list[dict[str, Any]]:
        """The requests that were answered or cut since the start, the oldest first."""
        return [json.loads(line) for line in reads.read_bytes(self.log_path).splitlines()]

    def token(self, authorization: str | None) -> Token:
        """What the Authorization header of a request permits."""
        if authorization is None:
            return Token.NONE
        token = authorization.removeprefix("Bearer ").encode()
        if self._read_token is not None and compare_digest(token, self._read_token.encode()):
            return Token.READ
        if self._write_token is None or compare_digest(token, self._write_token.encode()):
            return Token.WRITE
        return Token.WRONG

    def note(self, record: dict[str, Any]) -> None:
        """Write one line of the request log."""
        self._log.write(record)


class _Log:
    """The request log of one start, as JSON lines. Without headers, bodies and queries, so it never holds a token."""

    def __init__(self, folder: Path) -> None:
        starts = [int(name[:-6]) for name in tree.list_dir(folder) if name[:-6].isdecimal()]
        self.path = folder / f"{max(starts, default=0) + 1}.jsonl"
        self._descriptor = writes.create(self.path)
        self._lock = threading.Lock()
        self._open = True

    def write(self, record: dict[str, Any]) -> None:
        with self._lock:
            if self._open:
                writes.write_all(self._descriptor, json.dumps(record).encode() + b"\n", self.path)

    def close(self) -> None:
        with self._lock:
            self._open = False
            os.close(self._descriptor)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LocalHub, port: int) -> None:
        self.hub = hub
        self._connections: set[socket.socket] = set()
        self._changing = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def connected(self, connection: socket.socket) -> None:
        with self._changing:
            self._connections.add(connection)

    def disconnected(self, connection: socket.socket) -> None:
        with self._changing:
            self._connections.discard(connection)

    def cut_connections(self) -> None:
        with self._changing:
            for connection in self._connections:
                with suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may disconnect at any time
            super().handle_error(request, client_address)


class _Cut(Exception):
    """Raised to cut the connection now, without an answer."""


@dataclass
class _Exchange:
    """One request: its route, token and fault, when it began, and the id that its answer has."""

    route: str
    token: Token
    fault: Fault | None = None
    began: float = field(default_factory=time.monotonic)
    id: str = field(default_factory=lambda: uuid4().hex)


class _Body:
    """The body of a request, chunked or with a length; it can be read once."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self._file = handler.rfile
        self._chunked = "chunked" in handler.headers.get("Transfer-Encoding", "").lower()
        length = handler.headers.get("Content-Length") or "0"
        if not length.isdecimal():
            raise ConnectionError(f"Content-Length {length!r} is no number")
        self._length = int(length)
        self._begun = False
        self.nbytes = 0

    def blocks(self) -> Iterator[bytes]:
        """The whole body; nothing if it was read before. ConnectionError if the client stops in the middle."""
        if self._begun:
            return
        self._begun = True
        if not self._chunked:
            yield from self._take(self._length)
            return
        while nbytes := self._chunk_bytes():
            yield from self._take(nbytes)
            self._file.readline(_LINE)
        while self._file.readline(_LINE).strip():
            pass  # trailers

    def _chunk_bytes(self) -> int:
        line = self._file.readline(_LINE)
        digits = line.split(b";")[0].strip()
        if not digits or digits.strip(b"0123456789abcdefABCDEF"):
            raise ConnectionError("the client stopped in the middle of its request")
        return int(digits, 16)

    def _take(self, nbytes: int) -> Iterator[bytes]:
        while nbytes:
            block = self._file.read(min(nbytes, _BLOCK))
            if not block:
                raise ConnectionError("the client stopped in the middle of its request")
            nbytes -= len(block)
            self.nbytes += len(block)
            yield block

    def drain(self) -> None:
        """Read the rest: if a connection is closed with bytes unread, the answer may be lost."""
        for _ in self.blocks():
            pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connected(self.connection)

    def finish(self) -> None:
        self.server.disconnected(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: _Log is the log."""

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        if path in (FAULTS_PATH, REQUESTS_PATH):
            self._control(path)
            return
        route, args = _find(self.command, path)
        exchange = _Exchange(route.name if route else "unknown", self.server.hub.token(self.headers["Authorization"]))
        body = _Body(self)
        try:
            reply = self._decide(exchange, route, args, body)
            body.drain()
        except (_Cut, OSError):
            self._note(exchange, path, body, None)
            self._hang_up()
            return
        # Logged before the answer is sent, so that a client that has the answer finds its line in the log.
        self._note(exchange, path, body, reply)
        try:
            self._send(exchange.id, reply, exchange.fault.cut_at if exchange.fault else None)
        except (_Cut, OSError):
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _decide(self, exchange: _Exchange, route: Route | None, args: dict[str, str], body: _Body) -> Reply:
        """The answer, after what a fault does first. _Cut if the connection is to be cut without an answer."""
        fault = exchange.fault = self.server.hub.faults.hit(route.name) if route else None
        if fault is None:
            return self._answer(exchange, route, args, body)
        if fault.landed:
            reply = self._answer(exchange, route, args, body)
            return self._inject(fault) or reply
        return self._inject(fault) or self._answer(exchange, route, args, body)

    def _inject(self, fault: Fault) -> Reply | None:
        """Carry out a fault: its answer; None if the usual answer follows, which may be cut in the middle."""
        if fault.stall_s and self.server.hub.stopping.wait(fault.stall_s):
            raise _Cut
        if fault.cut_at == 0:
            raise _Cut
        if fault.status is None:
            return None
        message, code = fault.says()
        reply = _refusal_reply(Refusal(fault.status, message, code))
        if fault.retry_after_s is not None:
            reply.headers["Retry-After"] = str(fault.retry_after_s)
        return reply

    def _answer(self, exchange: _Exchange, route: Route | None, args: dict[str, str], body: _Body) -> Reply:
        hub = self.server.hub
        try:
            if route is None:
                raise Refusal(404, f"The local Hub has no route {self.command} {urlsplit(self.path).path}")
            _check_token(route, exchange.token)
            call = Call(
                store=hub.store,
                base=f"http://{self.headers['Host'] or hub.url.removeprefix('http://')}",
                token=exchange.token,
                args=args,
                query=dict(parse_qsl(urlsplit(self.path).query)),
                headers={name.lower(): value for name, value in self.headers.items()},
                body=body,
                part_bytes=hub.part_bytes,
            )
            return route.answer(call)
        except Refusal as error:
            return _refusal_reply(error)
        except ConnectionError:
            raise
        except Exception:  # the server goes on; the client gets a 500, the terminal the traceback
            traceback.print_exc()
            return _refusal_reply(Refusal(500, "The local Hub failed; see its standard error"))

    def _send(self, request_id: str, reply: Reply, cut_at: int | None = None) -> None:
        blocks = _blocks(reply)
        headers = {"X-Request-Id": request_id, "Content-Type": "application/json", **reply.headers}
        self.send_response(reply.status)
        for name, value in {**headers, "Content-Length": str(_nbytes(reply))}.items():
            self.send_header(name, value.encode("ascii", "replace").decode())
        self.end_headers()
        if self.command == "HEAD":
            return
        for block in blocks:
            if cut_at is not None and len(block) > cut_at:
                self.wfile.write(block[:cut_at])
                raise _Cut
            self.wfile.write(block)
            cut_at = None if cut_at is None else cut_at - len(block)

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _note(self, exchange: _Exchange, path: str, body: _Body, reply: Reply | None) -> None:
        record = {
            "at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": exchange.id,  # the X-Request-Id, which the client shows in its errors
            "route": exchange.route,
            "method": self.command,
            "path": path,
            "token": exchange.token.value,
            "received": body.nbytes,
            "status": reply.status if reply else None,  # null: the connection ended without an answer
            "answered": _nbytes(reply) if reply and self.command != "HEAD" else 0,
            "seconds": round(time.monotonic() - exchange.began, 3),
            "fault": exchange.fault is not None,
        }
        self.server.hub.note(record)

    def _control(self, path: str) -> None:
        """GET /__requests__; GET, POST, DELETE /__faults__. Not logged, and no token is needed."""
        hub = self.server.hub
        body = b"".join(_Body(self).blocks())
        if path == REQUESTS_PATH:
            self._send("control", Reply(hub.requests()))
            return
        try:
            if self.command == "POST":
                hub.faults.add(parse(json.loads(body)))
            elif self.command == "DELETE":
                hub.faults.clear()
            reply = Reply(hub.faults.pending())
        except ValueError as error:
            reply = Reply({"error": str(error)}, 400)
        self._send("control", reply)


def _find(method: str, path: str) -> tuple[Route | None, dict[str, str]]:
    for route in ROUTES:
        match = route.path.fullmatch(path) if route.method == method else None
        if match:
            return route, {**{name: unquote(value) for name, value in match.groupdict().items()}, "raw_path": path}
    return None, {}


def _check_token(route: Route, token: Token) -> None:
    if token is Token.WRONG:
        raise Refusal(401, "Invalid credentials in Authorization header")
    if token is Token.NONE and route.needs is not Token.NONE:
        raise Refusal(401, "Invalid username or password.")
    if token is Token.READ and route.needs is Token.WRITE:
        raise Refusal(403, "Forbidden: this token may only read; use one that may write")


def _refusal_reply(refusal: Refusal) -> Reply:
    headers = {"X-Error-Message": " ".join(refusal.message.split())}
    if refusal.code:
        headers["X-Error-Code"] = refusal.code
    return Reply({"error": refusal.message, **refusal.more}, refusal.status, headers)


def _json_bytes(reply: Reply) -> bytes:
    return b"" if reply.json is None else json.dumps(reply.json).encode()


def _nbytes(reply: Reply) -> int:
    return reply.nbytes if reply.file else len(_json_bytes(reply))


def _blocks(reply: Reply) -> Iterator[bytes]:
    if reply.file is None:
        yield _json_bytes(reply)
        return
    with open(reply.file, "rb") as file:
        file.seek(reply.start)
        rest = reply.nbytes
        while rest and (block := file.read(min(rest, _BLOCK))):
            rest -= len(block)
            yield block
