"""Where the files of a dataset lie when not on this machine: http(s), object stores, any command.

| location | read by |
|---|---|
| `http://...`, `https://...` | Python's own client, going on in the middle after a failure |
| `s3://bucket/...` and others | fsspec with s3fs (or the package of that store) |
| `pipe:COMMAND {name}` | the output of a shell command, with the file's name in place of {name} |

Each file is read from a byte offset where the source can do that. A failure that another attempt
may cure is an OSError; one that it cannot cure is a DataError.
"""

import contextlib
import http.client
import re
import shlex
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from sedd_scale.errors import DataError

READ_BYTES = 1 << 20
OBJECT_READ_BYTES = 8 << 20
TIMEOUT_SECONDS = 60.0
# Statuses that pass: asked to wait, too many requests, and the server's own trouble.
_PASSING = {408, 425, 429, 500, 502, 503, 504}

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
PIPE = "pipe:"


def is_remote(location: str) -> bool:
    """Whether a dataset's location is a URL or a command, and not a path."""
    return location.startswith(PIPE) or _URL.match(location) is not None


class Source(ABC):
    """Files by name; several threads may read at once.

    Attributes:
        location: what errors call the place.
    """

    location: str

    @abstractmethod
    def read(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        """Where reading really begins (`offset` or 0), and the bytes from there to the end.

        Raises:
            OSError: now or while iterating, a failure that may pass.
            DataError: the file is not there, or may not be read.
        """

    def describe(self, name: str) -> str:
        """What errors call a file."""
        return f"{self.location.rstrip('/')}/{name}"


def open_source(location: str) -> Source:
    """The source of a remote location; DataError for a scheme that no installed package reads."""
    if location.startswith(PIPE):
        return PipeSource(location)
    if location.startswith(("http://", "https://")):
        return HttpSource(location)
    return ObjectSource(location)


class HttpSource(Source):
    """Files below a URL."""

    def __init__(self, location: str) -> None:
        self.location = location

    def read(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        url = f"{self.location.rstrip('/')}/{urllib.parse.quote(name)}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        request = urllib.request.Request(url, headers=headers)
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # it ends before the offset: another file is there now
                return self.read(name, 0)
            if error.code in _PASSING:
                raise OSError(f"{url} answers {error.code} {error.reason}") from error
            raise DataError(
                f"{url} answers {error.code} {error.reason}: check the address and the access"
            ) from error
        except http.client.HTTPException as error:
            raise OSError(f"{url}: {type(error).__name__} {error}") from error
        return (offset if response.status == 206 else 0), _response_bytes(response, url)


def _response_bytes(response: Any, url: str) -> Iterator[bytes]:
    try:
        with response:
            while content := response.read(READ_BYTES):
                yield content
            if response.length:  # what is still missing of the length that was announced
                raise OSError(f"{url} ended {response.length} bytes early")
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {type(error).__name__}") from error


class ObjectSource(Source):
    """Objects below a URL that fsspec knows, such as s3://bucket/prefix."""

    def __init__(self, location: str) -> None:
        self.location = location
        scheme = location.split("://")[0]
        try:
            from fsspec.core import url_to_fs

            self._store, self._prefix = url_to_fs(location)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{location} needs a package that reads {scheme}:// ({error}): "
                "pip install 'sedd_scale[remote]'"
            ) from error
        except OSError as error:
            raise DataError(f"{location} cannot be reached ({error}): check data.path") from error

    def read(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        path = f"{self._prefix.rstrip('/')}/{name}"
        try:
            with _errors_of_clients():
                size = self._store.info(path, refresh=True)["size"]
        except FileNotFoundError as error:
            raise DataError(f"{self.describe(name)} does not exist: check data.path") from error
        except PermissionError as error:
            raise DataError(
                f"{self.describe(name)} may not be read ({error}): check the credentials"
            ) from error
        return offset, self._parts(path, offset, size)

    def _parts(self, path: str, offset: int, size: int) -> Iterator[bytes]:
        while offset < size:
            end = min(size, offset + OBJECT_READ_BYTES)
            with _errors_of_clients():
                content: bytes = self._store.cat_file(path, start=offset, end=end)
            if not content:
                raise OSError(f"{path} ends at byte {offset} of {size}")
            offset += len(content)
            yield content


@contextlib.contextmanager
def _errors_of_clients() -> Iterator[None]:
    """Stores' clients have errors of their own: of access, which stay, and others, which pass."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        refused = "Credentials" in type(error).__name__
        raise (PermissionError if refused else OSError)(f"{error}") from error


class PipeSource(Source):
    """The output of a shell command in which {name} stands for the file's name."""

    def __init__(self, location: str) -> None:
        self.location = location
        self._command = location.removeprefix(PIPE)
        if "{name}" not in self._command:
            raise DataError(
                f"data.path={location} does not say where the file's name goes: write {{name}}, "
                "as in pipe:ssh host cat data/{name}"
            )

    def describe(self, name: str) -> str:
        return PIPE + self._command.replace("{name}", name)

    def read(self, name: str, offset: int) -> tuple[int, Iterator[bytes]]:
        return 0, self._output(self._command.replace("{name}", shlex.quote(name)))

    def _output(self, command: str) -> Iterator[bytes]:
        with subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            while content := process.stdout.read(READ_BYTES):
                yield content
        if process.returncode:
            raise OSError(f"`{command}` ended with exit code {process.returncode}")
