"""Documents: each format gives the text that was written, and damage is named with its place."""

import gzip
import lzma
from pathlib import Path

import pytest

from sedd_scale.errors import DataError
from sedd_scale.preparation import document_formats
from sedd_scale.preparation.builtin_text import LARGEST_TOTAL_BYTES, builtin_python_documents
from sedd_scale.preparation.documents import DocumentStream
from tests.data.corpus import make_texts, write_jsonl


def texts_of(*inputs: object, field: str = "text") -> list[str]:
    return [document.text for document in DocumentStream([*map(str, inputs)], field=field)]


def test_jsonl_plain_and_compressed(tmp_path: Path) -> None:
    texts = make_texts(9)
    plain = write_jsonl(tmp_path / "a.jsonl", texts, field="body")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(plain.read_bytes()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        stream = DocumentStream([str(tmp_path / name)], field="body")
        assert [document.text for document in stream] == texts
        assert [document.text for document in stream] == texts, "a second pass"
        assert stream.bytes_read == stream.total_bytes == (tmp_path / name).stat().st_size
    assert texts_of(tmp_path / "*.jsonl*", field="body") == texts * 3


def test_text_files_are_whole_documents_in_order(tmp_path: Path) -> None:
    for name, text in (("b.txt", "second\n\n\nstill"), ("a.txt", "\ufefffirst"), ("c.txt", "c")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert texts_of(tmp_path / "*.txt") == ["first", "second\n\n\nstill", "c"]
    assert texts_of(tmp_path / "c.txt", tmp_path / "*.txt")[0] == "c"
    assert len(texts_of(tmp_path / "c.txt", tmp_path / "*.txt")) == 3, "each file once"


def test_a_lone_text_file_is_cut_at_blank_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "\n\n".join(make_texts(80))
    path = tmp_path / "lone.txt"
    path.write_text(text, encoding="utf-8")
    pieces = texts_of(path)
    assert len(pieces) > 10
    assert all(len(piece) >= document_formats.PIECE_CHARACTERS for piece in pieces[:-1])
    assert "\n\n".join(pieces) == text
    # Cuts depend neither on the size of a read nor on where it splits a character.
    for size in (1, 977, 30_001):
        monkeypatch.setattr(document_formats, "READ_SIZE", size)
        assert texts_of(path) == pieces


@pytest.mark.parametrize(
    ("separator", "unit"), [("\n", "line of text"), (" ", "word"), ("", "字")], ids=repr
)
def test_a_lone_text_file_without_blank_lines(tmp_path: Path, separator: str, unit: str) -> None:
    text = separator.join([unit] * 60_000)
    path = tmp_path / "lone.txt"
    path.write_text(text, encoding="utf-8")
    pieces = texts_of(path)
    assert separator.join(pieces) == text
    assert max(map(len, pieces)) <= document_formats.LONGEST_PIECE_CHARACTERS
    assert len(pieces) < len(text) / document_formats.PIECE_CHARACTERS


def test_builtin_text() -> None:
    rows = builtin_python_documents()
    texts = [row["text"] for row in rows]
    assert texts_of("builtin:python") == texts
    total = sum(len(text.encode()) for text in texts)
    assert 2_000_000 < total <= LARGEST_TOTAL_BYTES
    assert len(texts) > 200
    # A docstring is in one document only, so that validation does not see training text.
    assert sum("Simple JSON <https://json.org> decoder" in text for text in texts) == 1
    assert sum("def raw_decode(self, s, idx=0):" in text for text in texts) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.csv", b"x,y", r"a\.csv has no format that is read: .* --format text"),
        ("a.txt", "né".encode() + b"\xff!", r"a\.txt: byte 0xff at offset 3 is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}', r"byte 0xe9 at offset 25 is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'\n["text"]\n', r"a\.jsonl:2 is a JSON list"),
        ("a.jsonl", b'{"title": 1, "body": 2}', r"a\.jsonl:1 has no field 'text'.*\(title, body\)"),
        ("a.jsonl", b'{"text": 7}', r"a\.jsonl:1: field 'text' is a int"),
        ("a.jsonl", b'{"text": "a\\ud800"}', r"half of a surrogate pair at character 1"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 99, mtime=0)[:-9], r"gz is cut short"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}' * 99)[:-9], r"xz is cut short"),
        ("a.jsonl.xz", b"not xz at all", r"xz is cut short or not a \.xz"),
        (
            "a.txt.gz",
            gzip.compress(b"ok\xff", mtime=0),
            r"byte 0xff at offset 2 of the decompressed text",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(path)


def test_an_undecodable_byte_far_into_a_lone_file(tmp_path: Path) -> None:
    text = "\n\n".join(make_texts(300)).encode() * 6
    assert len(text) > document_formats.READ_SIZE
    path = tmp_path / "a.txt"
    path.write_bytes(text + b"\xe6\x9d")
    with pytest.raises(DataError, match=f"offset {len(text)} is not UTF-8"):
        texts_of(path)


def test_brackets_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "[x] text.txt").write_text("named")
    assert texts_of(tmp_path / "[x] text.txt") == ["named"]


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.txt matches no file"):
        texts_of(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="is a directory: give files, such as"):
        texts_of(tmp_path)
