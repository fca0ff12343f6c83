"""A stand-in for the Hugging Face hub: the files of dataset repositories, as its client asks."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests.data.file_server import running

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `/datasets/REPOSITORY/resolve/REVISION/FILE`.

    Attributes:
        files: "REPOSITORY@REVISION/FILE" -> content.
        requests: how often each was asked for, by method.
    """

    daemon_threads = True

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = dict(files)
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        repository, _, rest = self.path.removeprefix("/datasets/").partition("/resolve/")
        # A branch's slashes are escaped; the commit is asked for by the download itself.
        revision, _, file = rest.partition("/")
        name = f"{repository}@{unquote(revision)}/{unquote(file)}"
        self.server.requests[f"{self.command} {name}"] += 1
        content = self.server.files.get(name)
        if content is None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving_hub(files: Mapping[str, bytes]) -> Iterator[HubServer]:
    """The hub, for the length of a `with`."""
    with running(HubServer(files)) as server:
        yield server
