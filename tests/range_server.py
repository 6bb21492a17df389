"""A folder behind HTTP: ranged GET and HEAD, as web servers and S3 answer them; for tests and benchmarks."""

import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class LoopbackServer(ThreadingHTTPServer):
    """A server that answers many requests at once, and whose threads end with it."""

    daemon_threads = True
    request_queue_size = 128

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that went away."""


class RangeServer(LoopbackServer):
    """Serves `folder` on loopback."""

    def __init__(self, folder: Path, latency: float = 0.0, port: int = 0) -> None:
        """`latency` is in seconds, before each answer."""
        self.folder, self.latency = folder.resolve(), latency
        super().__init__(("127.0.0.1", port), _Handler)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: RangeServer

    def do_GET(self) -> None:
        time.sleep(self.server.latency)
        path = (self.server.folder / self.path.split("?")[0].strip("/")).resolve()
        if not path.is_relative_to(self.server.folder) or not path.is_file():
            return self._answer(404, {"Content-Length": "0"})
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start, last = (int(asked[1]), min(int(asked[2] or total), total - 1)) if asked else (0, total - 1)
            if asked and start >= total:
                return self._answer(416, {"Content-Length": "0"})
            headers = {
                "Content-Length": str(last + 1 - start),
                "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True),
                "ETag": '"0"',
                "Accept-Ranges": "bytes",
            }
            if asked:
                headers["Content-Range"] = f"bytes {start}-{last}/{total}"
            self._answer(206 if asked else 200, headers)
            if self.command == "GET":
                # The kernel copies: this server must not be what a benchmark measures.
                while start <= last:
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, last + 1 - start)
        return None

    do_HEAD = do_GET  # noqa: N815 (the base class looks for it)

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[None]:
    """Run a server on a thread of its own."""
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    server = RangeServer(Path(sys.argv[1]), float(sys.argv[2]))
    print(server.server_port, flush=True)
    server.serve_forever()
