"""Files of text as people have them: every text once, or one line that says what is in the way."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from sedd_scale.__main__ import main
from sedd_scale.errors import ConfigError, DataError
from sedd_scale.evaluation.text_blocks import TextSettings, read_blocks
from sedd_scale.generation.prompts_file import read_prompt_lines
from sedd_scale.generation.samples_file import quality_of_file
from sedd_scale.preparation.documents import DocumentStream
from sedd_scale.tokenizers import gpt2
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from sedd_scale.tokenizers.gpt2 import GPT2Tokenizer
from tests.repository import ROOT

TEXTS = ["the first text", "a second\nof two lines", "naïve third"]
BOM = b"\xef\xbb\xbf"


def lines(texts: list[str] = TEXTS, *, end: str = "\n", field: str = "text") -> bytes:
    return "".join(json.dumps({field: text}) + end for text in texts).encode()


def tar_of(*members: tuple[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.pax_headers = {"comment": "text of a header"}
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def texts_tar(first: int = 0, texts: list[str] = TEXTS) -> bytes:
    return tar_of(*((f"{first + k}.txt", text.encode()) for k, text in enumerate(texts)))


def zip_of(*members: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def table(column: object) -> bytes:
    return table_of([("text", column)])


def table_of(columns: list[tuple[str, object]]) -> bytes:
    stream = io.BytesIO()
    names = [name for name, _ in columns]
    parquet.write_table(pyarrow.table([pyarrow.array(c) for _, c in columns], names), stream)
    return stream.getvalue()


def long_window(content: bytes, log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


SKIPPABLE = b"\x5d\x2a\x4d\x18\x04\x00\x00\x00abcd"
APPLE = bytes.fromhex("0005160700020000") + b"Mac OS X        "
ROWS = [text.encode() for text in TEXTS]

# What a file called so is read as: the texts of all its documents.
GIVES: dict[str, tuple[str, bytes, list[str]]] = {
    "zstd with a window of 256 MiB": ("a.jsonl.zst", long_window(lines(), 28), TEXTS),
    "zstd with a window of 2 GiB": ("a.jsonl.zst", long_window(lines(), 31), TEXTS),
    "zstd frames between skippable ones": (
        "a.jsonl.zst",
        SKIPPABLE
        + zstandard.compress(lines())
        + SKIPPABLE
        + zstandard.compress(b"")
        + zstandard.compress(lines()),
        TEXTS * 2,
    ),
    "gzip members end to end": (
        "a.jsonl.gz",
        gzip.compress(lines()) + gzip.compress(lines()),
        TEXTS * 2,
    ),
    "gzip with zeros behind": ("a.jsonl.gz", gzip.compress(lines()) + b"\0" * 512, TEXTS),
    "bzip2 streams end to end": (
        "a.jsonl.bz2",
        bz2.compress(lines()) + bz2.compress(lines()),
        TEXTS * 2,
    ),
    "xz streams with padding between": (
        "a.jsonl.xz",
        lzma.compress(lines()) + b"\0" * 4 + lzma.compress(lines()),
        TEXTS * 2,
    ),
    "compressed, its name does not say so": ("a.jsonl", gzip.compress(lines()), TEXTS),
    "tars end to end": ("a.tar", texts_tar() + texts_tar(5), TEXTS * 2),
    "tars end to end, one block of zeros between": (
        "a.tar",
        texts_tar().rstrip(b"\0").ljust(len(texts_tar().rstrip(b"\0")) // 512 * 512 + 1024, b"\0")
        + texts_tar(5),
        TEXTS * 2,
    ),
    "tars of equal names end to end": (
        "a.tar",
        texts_tar(0, TEXTS[:1]) + texts_tar(0, TEXTS[1:2]),
        TEXTS[:2],
    ),
    "compressed tars end to end": (
        "a.tar.gz",
        gzip.compress(texts_tar()) + gzip.compress(texts_tar(5)),
        TEXTS * 2,
    ),
    "tgz": ("a.tgz", gzip.compress(texts_tar()), TEXTS),
    "tar called by no name": ("a", texts_tar(), TEXTS),
    "old tar without a magic word": (
        "a.tar",
        tar_of(("0.txt", ROWS[0]), format=tarfile.GNU_FORMAT),
        TEXTS[:1],
    ),
    "macOS tar": (
        "a.tar",
        tar_of(
            ("._0.txt", APPLE + b"\xa3" * 9),
            ("0.txt", ROWS[0]),
            ("d/._1.txt", APPLE),
            ("d/.DS_Store", APPLE),
            ("d/1.txt", ROWS[1]),
        ),
        TEXTS[:2],
    ),
    "macOS zip": (
        "a.zip",
        zip_of(("0.txt", ROWS[0]), ("__MACOSX/._0.txt", APPLE), ("Thumbs.db", b"x")),
        TEXTS[:1],
    ),
    "pax headers as members, copies of notebooks": (
        "a.tar",
        tar_of(
            ("PaxHeaders.77/0.txt", b"30 mtime=1700000000.123456789\n"),
            ("./PaxHeader/0.txt", b"30 mtime=1700000000.123456789\n"),
            ("d/.ipynb_checkpoints/0-checkpoint.txt", ROWS[0]),
            ("0.txt", ROWS[0]),
        ),
        TEXTS[:1],
    ),
    "samples of a text, its metadata and a picture": (
        "a.tar",
        tar_of(
            *(
                (f"{k}.{suffix}", content)
                for k, text in enumerate(TEXTS)
                for suffix, content in (
                    ("json", b'{"url": "x", "text": null}'),
                    ("txt", text.encode()),
                    ("jpg", b"\xff\xd8"),
                )
            )
        ),
        TEXTS,
    ),
    "samples of a text and JSON with the same text": (
        "a.tar",
        tar_of(("0.txt", ROWS[0]), ("0.json", lines(TEXTS[:1]))),
        TEXTS[:1],
    ),
    "samples of JSON, and JSON about it": (
        "a.tar",
        tar_of(("0.json", b'{"text": "x"}'), ("0.meta.json", b'{"url": 1}')),
        ["x"],
    ),
    "metadata behind several texts' names": (
        "a.tar",
        tar_of(("0.txt", ROWS[0]), ("1.json", lines(TEXTS[1:2])), ("1.txt", b" \n")),
        [TEXTS[0], " \n", TEXTS[1]],
    ),
    "names with many dots": (
        "a.tar",
        tar_of(("wiki.train.tokens", ROWS[0]), ("wiki.valid.tokens", ROWS[1])),
        TEXTS[:2],
    ),
    "lines of JSON and compressed texts in a tar": (
        "a.tar",
        tar_of(("a.jsonl", lines()), ("b.txt.gz", gzip.compress(ROWS[0])), ("c.MD", ROWS[1])),
        [*TEXTS, *TEXTS[:2]],
    ),
    "table in a tar": ("a.tar", tar_of(("a.parquet", table(TEXTS))), TEXTS),
    "zip": ("a.zip", zip_of(*((f"{k}.txt", row) for k, row in enumerate(ROWS))), TEXTS),
    "byte order mark before lines of JSON": ("a.jsonl", BOM + lines(end="\r\n"), TEXTS),
    "byte order mark in a line by itself": ("a.jsonl", BOM + b"\n" + lines(), TEXTS),
    "byte order marks of joined files": ("a.jsonl", BOM + lines() + BOM + lines(), TEXTS * 2),
    "byte order mark before a text": ("a.txt", BOM + ROWS[0], TEXTS[:1]),
    "byte order mark before an array": ("a.json", BOM + b'[{"text": "x"}]', ["x"]),
    "text of Windows": ("a.txt", b"one\r\ntwo\r\n", ["one\ntwo\n"]),
    "text of an old Macintosh": ("a.txt", b"one\rtwo\r", ["one\ntwo\n"]),
    "line ends within JSON stay": ("a.jsonl", lines(["one\r\ntwo"]), ["one\r\ntwo"]),
    "nulls in lines of JSON": ("a.jsonl", lines([TEXTS[0]]) + b'{"text": null}\n', TEXTS[:1]),
    "nulls in a table": ("a.parquet", table([TEXTS[0], None, TEXTS[1]]), TEXTS[:2]),
    "bytes in a table": ("a.parquet", table(pyarrow.array(ROWS, pyarrow.binary())), TEXTS),
    "large strings": ("a.parquet", table(pyarrow.array(TEXTS, pyarrow.large_string())), TEXTS),
    "dictionary of strings": ("a.pq", table(pyarrow.array(TEXTS).dictionary_encode()), TEXTS),
    "table without its name": ("blob", table(TEXTS), TEXTS),
    "JSON array": ("a.json", json.dumps([{"text": t} for t in TEXTS], indent=1).encode(), TEXTS),
    "JSON array in one line": ("a.json", json.dumps([{"text": t} for t in TEXTS]).encode(), TEXTS),
    "JSON lines called .json": ("a.json.gz", gzip.compress(lines()), TEXTS),
    "one JSON object over lines": ("a.json", json.dumps({"text": "x"}, indent=1).encode(), ["x"]),
    "JSON objects end to end": (
        "a.json",
        json.dumps({"text": "x"}, indent=1).encode() + json.dumps({"text": "y"}, indent=1).encode(),
        ["x", "y"],
    ),
    "JSON arrays end to end": ("a.json", b'[{"text": "x"}]\n[{"text": "y"}]\n', ["x", "y"]),
    "JSON lines behind blank ones": ("a.json", b"\n\n" + lines(), TEXTS),
    "ndjson": ("a.ndjson", lines(), TEXTS),
    "jl": ("a.jl", lines(), TEXTS),
    "JSONL in capitals": ("a.JSONL", lines(), TEXTS),
    **{
        f"text called {name}": (name, b"as it is", ["as it is"])
        for name in (
            "a.tokens",
            "a.raw",
            "a.md",
            "a.py",
            "a.text",
            "a",
            "a.TXT",
            "a.b.c",
            "ä b.tex",
        )
    },
    "text compressed, called .raw.gz": ("a.raw.gz", gzip.compress(b"as it is"), ["as it is"]),
    "characters of several bytes at odd places": ("a.txt", "é字😀".encode(), ["é字😀"]),
}


def texts_of(path: Path, **options: str) -> list[str]:
    return [document.text for document in DocumentStream([str(path)], **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("situation", GIVES)
def test_every_text_is_read_once(tmp_path: Path, situation: str) -> None:
    name, content, texts = GIVES[situation]
    path = tmp_path / name
    path.write_bytes(content)
    stream = DocumentStream([str(path)])
    documents = list(stream)
    assert [document.text for document in documents] == texts
    for number, document in enumerate(documents):
        rest = [later.text for later in stream.documents_after(document.after)]
        assert rest == texts[number + 1 :], "a resumed preparation goes on behind any document"
    # Evaluation reads the very same: documents with an EOS behind each.
    found = read_blocks(path, BytesTokenizer(), 1, TextSettings())
    assert len(found.blocks_nL) == sum(len(text.encode()) + 1 for text in texts if text.strip())


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "zstd cut within a frame": (
        "a.txt.zst",
        zstandard.compress(b"line\n" * 9999)[:-1],
        r"a\.txt\.zst is cut short or not a \.zst file",
    ),
    "zstd cut between lines": (
        "a.txt.zst",
        zstandard.compress(os.urandom(99).hex().encode()) + zstandard.compress(b"x" * 300_000)[:9],
        "is cut short",
    ),
    "zstd with garbage behind": (
        "a.txt.zst",
        zstandard.compress(b"x") + b"garbage",
        "cut short or",
    ),
    "gzip with garbage behind": ("a.txt.gz", gzip.compress(b"x") + b"garbage", "cut short or not"),
    "gzip cut short": ("a.txt.gz", gzip.compress(b"xyz" * 999)[:-9], "cut short or not"),
    "bzip2 cut short": ("a.txt.bz2", bz2.compress(b"xyz" * 999)[:-9], "cut short or not"),
    "plain text called .gz": ("a.txt.gz", b"plain", "cut short or not a .gz file"),
    "tar cut in its second archive": ("a.tar", texts_tar() + texts_tar()[:700], "cut short or not"),
    "tar with a damaged header": (
        "a.tar",
        tar_of(("0.txt", ROWS[0]), ("1.txt", ROWS[1])).replace(b"1.txt", b"2.txt"),
        "cut short or not a tar file",
    ),
    "JSON lines called .txt": ("a.txt", lines(), "may be text or JSON: say which with --format"),
    "tar with garbage behind": ("a.tar", texts_tar() + b"garbage" * 99, "cut short or not a tar"),
    "tar of pictures": ("a.tar", tar_of(("0.jpg", b"\xff")), r"holds no member.* --members SUFFIX"),
    "two texts in each sample": (
        "a.tar",
        tar_of(*((f"{k}.{what}.txt", ROWS[0]) for k in range(3) for what in ("caption", "title"))),
        r"several texts in a sample \(\.caption\.txt, \.title\.txt of 1\): name one with --members",
    ),
    "two texts in one sample with a picture": (
        "a.tar",
        tar_of(("0.jpg", b"\xff"), ("0.txt", ROWS[0]), ("0.caption.txt", ROWS[1])),
        r"several texts in a sample \(\.caption\.txt, \.txt of 0\)",
    ),
    "a text and another kind of text in each sample": (
        "a.tar",
        tar_of(*((f"{k}.{what}", ROWS[0]) for k in range(3) for what in ("md", "txt"))),
        r"several texts in a sample \(\.md, \.txt of 1\): name one with --members \.md$",
    ),
    "JSON about the archive beside its texts": (
        "a.tar",
        tar_of(("info.json", b'{"n": 3}'), ("0.txt", ROWS[0])),
        r"info\.json:1 has no field 'text': .* or name the documents with --members SUFFIX",
    ),
    "a text and JSON of another text": (
        "a.tar",
        tar_of(("0.txt", ROWS[0]), ("0.json", lines(TEXTS[1:2]))),
        r"a\.tar:0\.json:1 has the field 'text', and a text beside it: .* --members \.txt",
    ),
    "zips end to end": (
        "a.zip",
        zip_of(("0.txt", ROWS[0])) + zip_of(("1.txt", ROWS[1])),
        "begins before its zip file, as several end to end do",
    ),
    "zip with a password": (
        "a.zip",
        zip_of(("0.txt", ROWS[0])).replace(
            b"PK\1\2\x14\x03\x14\0\0\0\x08\0", b"PK\1\2\x14\x03\x14\0\1\0\x08\0"
        ),
        r"a\.zip:\S+ is encrypted: unpack it",
    ),
    "zip that unpacks itself": (
        "a.zip",
        b"#!/bin/sh\nunzip $0\n" + zip_of(("0.txt", ROWS[0])),
        "begins before its zip file",
    ),
    "compressed twice": ("a.txt.gz", gzip.compress(gzip.compress(ROWS[0])), "is compressed twice"),
    "compressed twice, in two ways": (
        "a.jsonl.gz.xz",
        lzma.compress(gzip.compress(lines())),
        "is compressed twice: unpack it once",
    ),
    "a picture": ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8: it is no text, so leave"),
    "tensors": ("model", b"\x80\x04\x95\x0e\0\0text", "not UTF-8: it is no text, so leave"),
    "two columns of one name": (
        "a.parquet",
        table_of([("text", ["one"]), ("text", ["two"])]),
        "several columns 'text': give each its own name",
    ),
    "zip cut short": ("a.zip", zip_of(("0.txt", ROWS[0]))[:-5], "cut short or not a zip file"),
    "tables end to end": (
        "a.parquet",
        table(TEXTS) + table(TEXTS[:1]),
        "several parquet files end to end",
    ),
    "table of another encoding": (
        "a.parquet",
        table(pyarrow.array([b"ok"] * 20 + [b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())),
        r"a\.parquet:21: column 'text' is not UTF-8",
    ),
    "bytes of another encoding": (
        "a.parquet",
        table(pyarrow.array([b"ok", b"caf\xe9"], pyarrow.binary())),
        r"a\.parquet:2: column 'text' is not UTF-8",
    ),
    "numbers in a table": ("a.parquet", table([1, 2]), "column 'text' is a int: name a column"),
    "lists in a table": ("a.parquet", table([["a"], ["b"]]), "column 'text' is a list"),
    "text of Latin-1": ("a.txt", b"caf\xe9", r"byte 0xe9 at offset 3 .*iconv -f ISO-8859-1"),
    "text of UTF-16": ("a.txt", "caf".encode("utf-16"), r"not UTF-8: .*iconv -f UTF-16"),
    "text of UTF-32": ("a.txt", "caf".encode("utf-32"), r"not UTF-8: .*iconv -f UTF-32"),
    "text of UTF-16 without a mark": ("a.txt", "café".encode("utf-16-le"), "mostly zeros and no"),
    "an empty file": ("a.txt", b"", "a.txt is empty"),
    "lines of an old Macintosh": ("a.jsonl", lines(end="\r"), r"a\.jsonl:1 is not JSON.*CR alone"),
    "an array called .jsonl": ("a.jsonl", b'[{"text": "x"}]', r"with --format json"),
    "JSON that no name tells": ("data", lines(), "say which with --format text, jsonl"),
    "JSON array that no name tells": ("a.out", b'[\n {"text": "x"}]', "say which with --format"),
    "broken JSON": ("a.json", b'[{"text": "x"},', r"a\.json is not JSON"),
    "numbers in an array": ("a.json", b"[1, 2]", r"a\.json \(entry 1\) is a JSON int"),
    "a table of commas": ("a.csv", b"text\nx\n", r"no format that is read.* --format text"),
    "another compression": ("a.txt", b"\x04\x22\x4d\x18" + b"x" * 99, "packed by lz4.*unpack it"),
    "metadata of macOS": ("._a.txt", b"some text", "metadata of another system and no text"),
    "metadata of Windows": ("desktop.ini", b"[.ShellClassInfo]", "metadata of another system"),
}


@pytest.mark.parametrize("situation", REFUSED)
def test_what_is_in_the_way_is_one_line(
    tmp_path: Path, situation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, content, message = REFUSED[situation]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_blocks(path, BytesTokenizer(), 1, TextSettings())
    words = ["--tokenizer", "bytes", "--block-length", "2", "--output", str(tmp_path / "out")]
    assert main(["prepare_data", "--input", str(path), *words, "--valid-fraction", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and name in error
    assert not (tmp_path / "out").exists(), "nothing is left behind"


CONTAINERS = {
    "a.txt.gz": gzip.compress(ROWS[0]) + gzip.compress(ROWS[1]),
    "a.txt.bz2": bz2.compress(ROWS[0]) + bz2.compress(ROWS[1]),
    "a.txt.xz": lzma.compress(ROWS[0]) + lzma.compress(ROWS[1]),
    "a.txt.zst": zstandard.compress(ROWS[0]) + zstandard.compress(ROWS[1]),
    "a.tar": texts_tar(),
    "a.tar.gz": gzip.compress(texts_tar()),
    "a.zip": zip_of(("0.txt", ROWS[0]), ("1.txt", ROWS[1])),
    "a.parquet": table(TEXTS),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_file_cut_anywhere_is_whole_or_refused(tmp_path: Path, name: str) -> None:
    content = CONTAINERS[name]
    path = tmp_path / name
    path.write_bytes(content)
    whole = texts_of(path)
    second = name.startswith("a.txt") and next(
        len(first)
        for first in (
            gzip.compress(ROWS[0]),
            bz2.compress(ROWS[0]),
            lzma.compress(ROWS[0]),
            zstandard.compress(ROWS[0]),
        )
        if content.startswith(first[:2])
    )
    for length in range(1, len(content), max(1, len(content) // 120)):
        if length == second:
            continue  # a whole file by itself
        path.write_bytes(content[:length])
        try:
            assert texts_of(path) == whole, f"cut at {length}"
        except DataError as error:
            assert name in str(error)


@pytest.mark.parametrize("name", [*CONTAINERS, "a.json", "a.jsonl"])
def test_damage_anywhere_is_no_traceback(tmp_path: Path, name: str) -> None:
    rng = random.Random(0)
    path = tmp_path / name
    content = CONTAINERS.get(name, lines())
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(damaged))
            damaged[place : place + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
        path.write_bytes(damaged or b"x")
        try:
            texts_of(path)
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("lines", {"format": "jsonl"}, TEXTS),
        ("lines", {"format": "text"}, [lines().decode()]),
        ("words.csv", {"format": "text"}, [lines().decode()]),
        ("lines.txt", {"format": "json"}, TEXTS),
    ],
)
def test_format_says_what_a_name_does_not(
    tmp_path: Path, name: str, options: dict[str, str], texts: list[str]
) -> None:
    (tmp_path / name).write_bytes(lines())
    assert texts_of(tmp_path / name, **options) == texts


@pytest.mark.parametrize("suffix", [".txt", ".json", ".py"])
@pytest.mark.parametrize("made", [tar_of, zip_of])
def test_members_says_which_of_an_archive(
    tmp_path: Path, suffix: str, made: Callable[..., bytes]
) -> None:
    members = (("0.txt", ROWS[0]), ("0.json", lines(TEXTS[1:2])), ("0.py", ROWS[2]))
    (tmp_path / "a").write_bytes(made(*members))
    expected = dict(zip((".txt", ".json", ".py"), TEXTS))[suffix]
    assert texts_of(tmp_path / "a", members=suffix) == [expected]


@pytest.mark.parametrize("inner", [tar_of, zip_of])
@pytest.mark.parametrize("outer", [tar_of, zip_of])
def test_an_archive_within_one_is_read_where_it_is_named(
    tmp_path: Path, outer: Callable[..., bytes], inner: Callable[..., bytes]
) -> None:
    packed = [(f"{k}.pack.gz", gzip.compress(inner((f"{k}.txt", ROWS[k])))) for k in range(2)]
    named = [(name.replace("pack", inner.__name__[:3]), content) for name, content in packed]
    (tmp_path / "a").write_bytes(outer(*named, ("2.txt", ROWS[2])))
    assert texts_of(tmp_path / "a") == TEXTS[2:]
    assert texts_of(tmp_path / "a", members=f".{inner.__name__[:3]}.gz") == TEXTS[:2]
    (tmp_path / "a").write_bytes(outer((named[0][0], gzip.compress(ROWS[0] * 999))))
    with pytest.raises(DataError, match=r"0\.(tar|zip)\.gz is cut short or not a (tar|zip) file"):
        texts_of(tmp_path / "a", members=".gz")


@pytest.mark.parametrize("words", [["--members", ".txt"], ["--field", "body"]])
def test_an_option_that_no_file_is_for_is_refused(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(ROWS[0])
    given = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out")]
    given += ["--tokenizer", "bytes", "--block-length", "2", *words]
    assert main(["prepare_data", *given]) == 2
    assert "leave " in capsys.readouterr().err
    settings = TextSettings(**{words[0].removeprefix("--"): words[1]})
    with pytest.raises(ConfigError):
        read_blocks(tmp_path / "a.txt", BytesTokenizer(), 1, settings)


def test_one_file_by_many_names_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/a.jsonl").write_bytes(lines())
    Path("data/b.jsonl").symlink_to("a.jsonl")
    os.link("data/a.jsonl", "data/c.jsonl")
    Path("other").symlink_to("data")
    names = ["data/a.jsonl", "./data/a.jsonl", "data/../data/a.jsonl", "data/*.jsonl"]
    names += [str(tmp_path / "data/a.jsonl"), "other/a.jsonl", "data/b.jsonl", "data/c.jsonl"]
    for first in names:
        assert [document.text for document in DocumentStream([first, *names])] == TEXTS
    lone = DocumentStream(["data/a.jsonl", str(tmp_path / "data/b.jsonl")])
    assert len(lone.files) == 1


def test_a_pipe_and_a_link_to_nothing_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to("nowhere.txt")
    with pytest.raises(DataError, match=r"link\.txt is a link to nothing"):
        DocumentStream([str(tmp_path / "*.txt")])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="as a pipe cannot: save it to a file"):
        DocumentStream([str(tmp_path / "pipe")])
    with pytest.raises(DataError, match="as a pipe cannot"):
        read_prompt_lines(tmp_path / "pipe")


def test_what_is_left_out_is_counted_and_said_also_when_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [None if k % 7 == 3 else "  " if k % 7 == 5 else f"row {k} " * 40 for k in range(70)]
    kept = sum(bool(row and row.strip()) for row in rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / "a.parquet").write_bytes(table(rows))
    (tmp_path / "b.txt").write_bytes(b"of Windows\r\n" * 40)
    fingerprints = set()
    monkeypatch.setattr("sedd_scale.preparation.prepare.BATCH_DOCUMENTS", 5)
    for name in ("a.jsonl", "a.parquet"):
        words = ["prepare_data", "--input", str(tmp_path / name), str(tmp_path / "b.txt")]
        words += ["--output", str(tmp_path / f"of {name}"), "--tokenizer", "bytes"]
        words += ["--block-length", "64", "--valid-fraction", "0", "--blocks-per-shard", "40"]
        from sedd_scale.preparation import prepare

        stops = iter(range(6))

        def stop(*_: object, stops: object = stops, add: object = prepare._Run.add) -> None:
            add(*_)  # type: ignore[operator]
            if next(stops, None) == 4:  # type: ignore[call-overload]
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(prepare._Run, "add", stop)
            assert main(words) == 130
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert f"\ndocuments {kept + 1:>26}\n" in shown
        assert "\n10 null rows, left out\n" in shown
        assert "\n10 blank documents, left out\n" in shown
        assert "\n1 documents with line ends CRLF or CR, read as LF\n" in shown
        index = json.loads((tmp_path / f"of {name}" / "index.json").read_text())
        assert sorted(index["notes"].values()) == [1, 10, 10]
        fingerprints.add(index["fingerprint"])
        found = read_blocks(tmp_path / name, BytesTokenizer(), 64, TextSettings())
        assert sorted(found.notes.values()) == [10, 10]
    assert len(fingerprints) == 1


def test_a_cut_of_a_long_text_keeps_indentation(tmp_path: Path) -> None:
    text = "def f():\n" + "    x = 1\n" * 400 + "\n  \n    return x\n" + "\ty = 2\n" * 3000
    for ends in ("\n", "\r\n", "\r"):
        (tmp_path / "code.py").write_bytes(text.replace("\n", ends).encode())
        pieces = texts_of(tmp_path / "code.py")
        assert pieces[1].startswith("    return x\n\ty = 2\n")
        assert all(piece.startswith("\ty = 2") for piece in pieces[2:])
        assert "\n".join(pieces) == text.replace("\n\n  \n", "\n")


@pytest.mark.parametrize("run", [" " * 1_000_000, "\n" * 1_500_000, " \t\u3000" * 400_000])
@pytest.mark.parametrize("behind", ["", "b"])
def test_gpt2_reads_any_run_of_white_space(run: str, behind: str) -> None:
    tokenizer = GPT2Tokenizer.open(ROOT / "tests/data/tokenizer")
    text = "a" + run + behind
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text


def test_gpt2_cuts_long_runs_as_its_pattern_does(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = GPT2Tokenizer.open(ROOT / "tests/data/tokenizer")
    runs = re.compile(gpt2._LONG_RUN.pattern.replace(str(gpt2.LONG_RUN), "3"))
    rng = random.Random(0)
    parts = [" ", " ", "\n", "\t", "\x1c", "\u3000", "\r", "a", "b1", "!", "'s"]
    for _ in range(2000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 25)))
        with monkeypatch.context() as patch:
            patch.setattr(gpt2, "_LONG_RUN", runs)
            patch.setattr(gpt2, "LONG_RUN", 1)
            apart = tokenizer.encode(text)
        assert apart.tolist() == tokenizer.encode(text).tolist(), repr(text)


def test_prompts_are_read_by_the_same_reader(tmp_path: Path) -> None:
    rows = [{"text": "It was [blank:3].", "id": "x"}, {"prefix": "He", "suffix": "is"}]
    text = "".join(json.dumps(row) + "\r\n" for row in rows).encode()
    files = {
        "a.jsonl": BOM + text,
        "b.jsonl.gz": gzip.compress(text[:40]) + gzip.compress(text[40:]),
        "c.jsonl.zst": long_window(text, 28),
        "d.json": json.dumps(rows, indent=1).encode(),
        "e.ndjson.bz2": bz2.compress(text),
        "f.txt": text,
        "g": text,
        "h.zip": zip_of(("a.jsonl", text), ("__MACOSX/._a.jsonl", APPLE)),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        found = read_prompt_lines(tmp_path / name)
        assert found[0].record["id"] == "x", name
        assert [line.record.get("text") for line in found] == [rows[0]["text"], None], name
    skipped: list[DataError] = []
    (tmp_path / "bad.jsonl").write_bytes(BOM + text + b'{"text": "\xe9____"}\n{"prefix": "a"}\n')
    found = read_prompt_lines(tmp_path / "bad.jsonl", on_bad=skipped.append)
    assert len(found) == 3 and "bad.jsonl:3: byte 0xe9" in str(skipped[0])


def test_samples_are_read_by_the_same_reader(tmp_path: Path) -> None:
    text = b"".join(b'{"id": %d, "tokens": [1, 2, 2]}\r\n' % k for k in range(4))
    reports = []
    for name, content in (
        ("a.jsonl", text),
        ("b.jsonl", BOM + text),
        ("c.jsonl.gz", gzip.compress(text)),
        ("d.jsonl.zst", long_window(text, 28)),
        ("e.json", b"[" + text.strip().replace(b"\r\n", b",") + b"]"),
    ):
        (tmp_path / name).write_bytes(content)
        reports.append(quality_of_file(tmp_path / name))
    assert reports[0]["samples"] == 4 and all(report == reports[0] for report in reports)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(DataError, match=r"f\.jsonl\.gz is cut short or not a \.gz file"):
        quality_of_file(tmp_path / "f.jsonl.gz")
    for token in ("-1", "9" * 20, "1.5", "true"):
        (tmp_path / "g.jsonl").write_text(f'{{"id": 1, "tokens": [1, {token}]}}\n')
        with pytest.raises(DataError, match=r"g\.jsonl:1 holds no list of token ids"):
            quality_of_file(tmp_path / "g.jsonl")
