"""Encoding batches of documents, in this process or in several others.

Worker processes are spawned, never forked, and end by themselves when this process dies. Batches
come back in the order they went in, and only a few are in flight, so that memory is bounded.
"""

import contextlib
import multiprocessing
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from sedd_scale.data.tar_blocks import token_dtype
from sedd_scale.preparation.splits import document_hash
from sedd_scale.tokenizers.base import Tokenizer

Tag = TypeVar("Tag")
# Batches on their way for each worker: one at work, one waiting.
IN_FLIGHT = 2


class Encoded(NamedTuple):
    """A batch of documents as ids.

    Attributes:
        ids: of all documents one after the other, without EOS, in the dataset's dtype.
        lengths: tokens of each document.
        digests: `document_hash` of each document.
        characters, utf8_bytes: of each document, as the tokenizer spells it.
        respelled: how many documents the tokenizer spells otherwise than they were.
    """

    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    digests: list[bytes]
    characters: npt.NDArray[np.int64]
    utf8_bytes: npt.NDArray[np.int64]
    respelled: int


def encode_documents(codec: Tokenizer, texts: list[str]) -> Encoded:
    """Encode one batch."""
    ids = codec.encode_batch(texts)
    dtype = token_dtype(codec.vocab_size)
    spelled = codec.spellings(texts, ids)
    return Encoded(
        ids=np.concatenate([part.astype(dtype) for part in ids]) if ids else np.empty(0, dtype),
        lengths=np.array([len(part) for part in ids], dtype=np.int64),
        digests=[document_hash(text) for text in texts],
        characters=np.array([len(text) for text in spelled], dtype=np.int64),
        utf8_bytes=np.array([len(text.encode()) for text in spelled], dtype=np.int64),
        respelled=sum(before != after for before, after in zip(texts, spelled)),
    )


class Encoder(Generic[Tag]):
    """Encodes a stream of batches; use it in a `with`.

    Args:
        codec: the tokenizer.
        processes: worker processes; 1: none, this process does the work.
    """

    def __init__(self, codec: Tokenizer, *, processes: int) -> None:
        self._codec = codec
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._free: deque[Connection] = deque()
        if processes == 1:
            return
        context = multiprocessing.get_context("spawn")
        for _ in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, codec.kind, codec.files()))
            with _interrupts_ignored():
                process.start()
            there.close()
            self._processes.append(process)
            self._free.append(here)
        self._connections = list(self._free)
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="encode")

    def run(self, batches: Iterable[tuple[list[str], Tag]]) -> Iterator[tuple[Encoded, Tag]]:
        """Each batch encoded, with the tag it came with, in order."""
        if not self._processes:
            for texts, tag in batches:
                yield encode_documents(self._codec, texts), tag
            return
        pending: deque[tuple[Future[Encoded], Tag]] = deque()
        for texts, tag in batches:
            pending.append((self._threads.submit(self._ask, texts), tag))
            if len(pending) >= IN_FLIGHT * len(self._processes):
                future, first_tag = pending.popleft()
                yield future.result(), first_tag
        while pending:
            future, first_tag = pending.popleft()
            yield future.result(), first_tag

    def _ask(self, texts: list[str]) -> Encoded:
        """Have a free worker do a batch; as many threads come here as there are workers."""
        connection = self._free.popleft()
        try:
            connection.send(texts)
            answer = connection.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError("a worker process ended; its own message stands above") from error
        self._free.append(connection)
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Encoded)
        return answer

    def __enter__(self) -> "Encoder[Tag]":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._processes:
            return
        self._threads.shutdown(wait=True, cancel_futures=True)
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes started within leave Ctrl-C to this one, and end when it does."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may change what signals do
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, kind: str, files: dict[str, bytes]) -> None:
    """What a worker does: encode what comes, until the other end is closed or dies."""
    from sedd_scale.tokenizers.opening import TOKENIZERS

    codec = TOKENIZERS[kind].of_files(files)
    while True:
        try:
            texts = connection.recv()
        except EOFError:
            return
        try:
            answer: Encoded | Exception = encode_documents(codec, texts)
        except (ValueError, RuntimeError, MemoryError) as error:
            answer = error
        try:
            connection.send(answer)
        except BrokenPipeError:  # the other end was killed meanwhile
            return
