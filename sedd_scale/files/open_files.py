"""Some of many files, open for reading."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import BinaryIO


class OpenFiles:
    """Files by number, opened when they are asked for; threads may share it.

    Args:
        open_file: opens the file of a number.
        most: as many stay open. The one unused for longest is dropped, and so closed once no thread
            reads from it.
    """

    def __init__(self, open_file: Callable[[int], BinaryIO], *, most: int) -> None:
        self._open_file, self._most = open_file, most
        self._streams: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._streams)

    def __getitem__(self, number: int) -> BinaryIO:
        with self._lock:
            if number not in self._streams:
                self._streams[number] = self._open_file(number)
                if len(self._streams) > self._most:
                    self._streams.popitem(last=False)
            self._streams.move_to_end(number)
            return self._streams[number]
