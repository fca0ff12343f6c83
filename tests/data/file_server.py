"""A web server on the loopback address that fails as real ones do, on request."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

Server = TypeVar("Server", bound=ThreadingHTTPServer)


class FileServer(ThreadingHTTPServer):
    """Serves a directory.

    Attributes:
        faults: file name -> what its next answers do: 503, 404, "drop", "truncate", "garble".
        requests: how often each file was asked for.
        sent: bytes of content sent.
    """

    daemon_threads = True

    def __init__(self, directory: Path, *, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.ranges = ranges
        self.faults: dict[str, list[int | str]] = {}
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        with self.server.lock:
            self.server.requests[name] += 1
            faults = self.server.faults.get(name, [])
            fault = faults.pop(0) if faults else None
        path = self.server.directory / name
        self.close_connection = True
        if fault == "drop":
            self.connection.close()
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range")
        begin = 0
        if asked is not None and self.server.ranges:
            begin = int(asked.removeprefix("bytes=").rstrip("-"))
            if begin >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[begin:]
        if fault == "garble":
            body = bytes(byte ^ 1 for byte in body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncate":
            body = body[: len(body) // 2]
        with self.server.lock:  # before the client has it and looks at the count
            self.server.sent += len(body)
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(directory: Path, *, ranges: bool = True) -> Iterator[FileServer]:
    """A server of a directory, for the length of a `with`."""
    with running(FileServer(directory, ranges=ranges)) as server:
        yield server


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Any server, answering in a thread of its own, for the length of a `with`."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
