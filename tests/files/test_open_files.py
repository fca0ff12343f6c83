"""Few files are open at once, and each is the one asked for."""

from pathlib import Path
from typing import BinaryIO

from sedd_scale.files.open_files import OpenFiles


def test_the_one_unused_for_longest_is_opened_anew(tmp_path: Path) -> None:
    opened = []

    def open_file(number: int) -> BinaryIO:
        opened.append(number)
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]))
        return path.open("rb")

    files = OpenFiles(open_file, most=2)
    for number in (0, 1, 0, 2, 0, 1):
        stream = files[number]
        stream.seek(0)
        assert stream.read() == bytes([number]) and len(files) <= 2
    assert opened == [0, 1, 2, 1]
