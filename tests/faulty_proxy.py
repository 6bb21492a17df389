"""An HTTP proxy on loopback that counts, delays, damages and refuses what passes; for tests and benchmarks."""

import http.client
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("reset", "500", "short", "cut", "wrong", "hang")
"""reset: the connection is reset. 500, 403, 404: the answer has that status. short: fewer bytes than announced. cut:
fewer bytes than asked for, and announced as such. wrong: other bytes. hang: no answer, ever."""


@dataclass(frozen=True)
class Request:
    number: int
    method: str
    path: str
    range: str
    """The part of the file that it asks for, as its header says."""

    @property
    def of_shard(self) -> bool:
        return self.method == "GET" and self.path.endswith(".tar")


class FaultyProxy(ThreadingHTTPServer):
    """Passes requests on to a server on loopback, except those for which `fault` returns a fault."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, latency: float = 0.0) -> None:
        """`port` is that of the server behind the proxy; `latency` is in seconds, before each answer."""
        self.port, self.latency = port, latency
        self.fault: Callable[[Request], str | None] = lambda request: None
        self.requests: list[Request] = []
        self.ignored: tuple[str, ...] = ()
        """Request headers that are not passed on to the server."""
        self.released = threading.Event()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def note(self, method: str, path: str, asked: str) -> Request:
        with self._lock:
            self.requests.append(Request(len(self.requests), method, path.split("?")[0], asked))
            return self.requests[-1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that went away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def _pass_on(self) -> None:
        request = self.server.note(self.command, self.path, self.headers.get("Range", ""))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.latency)
        fault = self.server.fault(request)
        if fault == "hang":
            self.server.released.wait(60)
        if fault in ("hang", "reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return
        if fault and fault.isdigit():
            self._answer(int(fault), {}, b"", 0)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port)
        sent = {name: value for name, value in self.headers.items() if name.lower() not in self.server.ignored}
        upstream.request(self.command, self.path, body, sent)
        answer = upstream.getresponse()
        data = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OWN}
        length = int(answer.headers.get("Content-Length", len(data))) if self.command == "HEAD" else len(data)
        upstream.close()
        if fault == "wrong":
            data = bytes(byte ^ 0x15 for byte in data)
        elif fault == "cut" and self.command != "HEAD":
            data, length = data[: len(data) // 2], len(data) // 2
        elif fault == "short":
            data = data[: len(data) // 2]
            self.close_connection = True
        self._answer(answer.status, headers, data, length)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815 (the base class looks for them)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


_OWN = ("content-length", "transfer-encoding", "connection", "server", "date")


if __name__ == "__main__":
    with FaultyProxy(int(sys.argv[1]), float(sys.argv[2])) as proxy:
        print(proxy.server_port, flush=True)
        proxy.serve_forever()
