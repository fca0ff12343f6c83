"""Formats: each gives the text that was written, and goes on behind any document."""

import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sedd_scale.errors import DataError
from sedd_scale.preparation.documents import DocumentStream
from tests.data.corpus import make_texts, write_jsonl

TEXTS = make_texts(23)


def zstd(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    half = len(content) // 2
    # Two frames, as parallel compressors write them.
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


def jsonl(directory: Path) -> bytes:
    return write_jsonl(directory / "made", TEXTS).read_bytes()


def tar_of(directory: Path) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for number, text in enumerate(TEXTS):
            name, content = f"{number:05d}.txt", text.encode()
            if number % 2:
                name, content = f"{number:05d}.json", json.dumps({"text": text}).encode()
            for member, data in ((name, content), (f"{number:05d}.jpg", b"\xff\xd8")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def parquet(directory: Path) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet as files

    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    files.write_table(table, directory / "made", row_group_size=7)
    return (directory / "made").read_bytes()


FORMATS: dict[str, Callable[[Path], bytes]] = {
    "a.jsonl": jsonl,
    "a.jsonl.gz": lambda directory: gzip.compress(jsonl(directory)),
    "a.jsonl.xz": lambda directory: lzma.compress(jsonl(directory)),
    "a.jsonl.zst": lambda directory: zstd(jsonl(directory)),
    "a.tar": tar_of,
    "a.tar.gz": lambda directory: gzip.compress(tar_of(directory)),
    "a.parquet": parquet,
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_its_texts_and_goes_on_anywhere(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name](tmp_path))
    (tmp_path / "b.txt").write_text("the last one", encoding="utf-8")
    stream = DocumentStream([str(path), str(tmp_path / "b.txt")])
    documents = list(stream)
    assert [document.text for document in documents] == [*TEXTS, "the last one"]
    for number, document in enumerate(documents):
        rest = [later.text for later in stream.documents_after(document.after)]
        assert rest == [later.text for later in documents[number + 1 :]]


def test_a_lone_text_and_the_builtin_text_go_on_anywhere(tmp_path: Path) -> None:
    (tmp_path / "lone.txt").write_text("\n\n".join(make_texts(60)), encoding="utf-8")
    for inputs in ([str(tmp_path / "lone.txt")], ["builtin:python", str(tmp_path / "lone.txt")]):
        stream = DocumentStream(inputs)
        documents = list(stream)
        for number in range(0, len(documents), 1 + len(documents) // 12):
            rest = [later.text for later in stream.documents_after(documents[number].after)]
            assert rest == [later.text for later in documents[number + 1 :]]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.jsonl.zst", lambda content: content[: len(content) // 2], "cut short|is not JSON"),
        ("a.jsonl.zst", lambda content: b"not zstd at all", "cut short or not a .zst"),
        ("a.tar", lambda content: content[: len(content) // 2], "cut short or not a tar"),
        ("a.tar", lambda content: b"x" * 5000, "cut short or not a tar"),
        ("a.parquet", lambda content: content[:-20], "is not a whole parquet file"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(damage(FORMATS[name](tmp_path)))
    with pytest.raises(DataError, match=message):
        list(DocumentStream([str(path)]))


def test_columns_and_members_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path))
    with pytest.raises(DataError, match=r"has no column 'body': name one with --field \(id, text"):
        list(DocumentStream([str(tmp_path / "a.parquet")], field="body"))
    with pytest.raises(DataError, match="column 'id' is a int"):
        list(DocumentStream([str(tmp_path / "a.parquet")], field="id"))
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("picture.jpg"))
    with pytest.raises(DataError, match=r"holds no member that ends in \.txt or \.json"):
        list(DocumentStream([str(tmp_path / "b.tar")]))
