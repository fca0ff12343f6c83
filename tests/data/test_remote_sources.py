"""Remote datasets: every failure is outlived or named, each file is downloaded once for a node."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sedd_scale.data.cache import ATTEMPTS, FileCache
from sedd_scale.data.loader import TrainLoader
from sedd_scale.data.remote_sources import ObjectSource, is_remote, open_source
from sedd_scale.data.shards import BadShardError, Dataset
from sedd_scale.errors import DataError
from tests.data.file_server import FileServer, serving
from tests.datasets import dataset_of_words

LIMIT = 10**9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("remote") / "d"
    choices = {"tokenizer": "sentencepiece", "vocab_size": 400, "blocks_per_shard": 30}
    return dataset_of_words(output, 60, block_length=64, **choices)


@pytest.fixture
def server(prepared: Path) -> Iterator[FileServer]:
    with serving(prepared) as running:
        yield running


def cache_in(directory: Path, limit: int = LIMIT) -> FileCache:
    return FileCache(directory / "cache", limit, first_pause=0.01)


def all_blocks(dataset: Dataset) -> np.ndarray:
    reader = dataset.reader("train")
    return reader.read(np.arange(len(reader)))


def test_http_gives_what_the_directory_holds(
    server: FileServer, prepared: Path, tmp_path: Path
) -> None:
    local = Dataset(prepared)
    remote = Dataset(server.url, cache=cache_in(tmp_path))
    assert remote.fingerprint == local.fingerprint
    assert remote.load_tokenizer().fingerprint == local.load_tokenizer().fingerprint
    assert np.array_equal(all_blocks(remote), all_blocks(local))
    assert remote.verify() == local.verify()
    assert max(server.requests.values()) == 1
    again = Dataset(server.url, cache=cache_in(tmp_path))
    assert np.array_equal(all_blocks(again), all_blocks(local))
    assert server.requests["train-000000.tar"] == 1, "it was in the cache"


@pytest.mark.parametrize("ranges", [True, False])
def test_failures_that_pass_are_outlived(prepared: Path, tmp_path: Path, ranges: bool) -> None:
    with serving(prepared, ranges=ranges) as server:
        server.faults = {
            "index.json": [503, "drop", "truncate"],
            "tokenizer/sentencepiece.model": ["truncate", 429],
            "train-000000.tar": ["truncate", 503, "truncate", "drop"],
            "train-000001.tar": ["garble", "garble", "truncate"],
            "train-000002.tar": [500, 502, 504, 408, 429],
        }
        remote = Dataset(server.url, cache=cache_in(tmp_path))
        assert np.array_equal(all_blocks(remote), all_blocks(Dataset(prepared)))
        assert not any(server.faults.values()), "every fault was met"


def test_a_download_goes_on_where_it_ended(
    server: FileServer, prepared: Path, tmp_path: Path
) -> None:
    remote = Dataset(server.url, cache=cache_in(tmp_path))
    size = remote.splits["train"]["shards"][0]["bytes"]
    server.faults = {"train-000000.tar": ["truncate", "truncate", "truncate"]}
    server.sent = 0
    remote.reader("train").read([0])
    assert server.requests["train-000000.tar"] == 4
    assert server.sent == size


@pytest.mark.parametrize(
    ("faults", "error", "message"),
    [
        ([503] * 99, DataError, "train-000000.tar cannot be read after 6 attempts .*answers 503"),
        (["truncate"] * 3 + ["drop"] * 9, DataError, "cannot be read after 6 attempts"),
        ([403], DataError, "answers 403 Forbidden: check the address and the access"),
        (["garble"] * 99, BadShardError, "train-000000.tar has SHA-256 .* the index says"),
    ],
    ids=["503", "drop", "403", "garble"],
)
def test_failures_that_stay_are_named(
    server: FileServer, tmp_path: Path, faults: list[int | str], error: type, message: str
) -> None:
    remote = Dataset(server.url, cache=cache_in(tmp_path))
    server.faults = {"train-000000.tar": list(faults)}
    with pytest.raises(error, match=message):
        remote.reader("train").read([0])
    assert server.requests["train-000000.tar"] == (1 if faults == [403] else ATTEMPTS)
    assert not list((tmp_path / "cache/files").glob("*.part"))


def test_no_server_and_no_dataset(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere/index\.json answers 404"):
        Dataset(f"{server.url}/nowhere", cache=cache_in(tmp_path))
    with pytest.raises(DataError, match="cannot be read after 6 attempts"):
        Dataset("http://127.0.0.1:9", cache=cache_in(tmp_path))


def test_the_cache_is_bounded(server: FileServer, prepared: Path, tmp_path: Path) -> None:
    local = Dataset(prepared)
    shards = local.splits["train"]["shards"]
    assert len(shards) >= 5
    limit = 3 * shards[0]["bytes"]
    cache = cache_in(tmp_path, limit)
    remote = Dataset(server.url, cache=cache)
    reader, expected = remote.reader("train"), all_blocks(local)
    for _ in range(2):
        for begin in range(0, len(reader), 30):
            wanted = np.arange(begin, min(begin + 30, len(reader)))
            assert np.array_equal(remote.reader("train").read(wanted), expected[wanted])
            held = sum(path.stat().st_size for path in (tmp_path / "cache/files").iterdir())
            assert held <= limit
    assert server.requests["train-000000.tar"] == 2, "it had to make room meanwhile"
    with pytest.raises(DataError, match=r"more than the whole cache: raise data\.cache_gb"):
        Dataset(server.url, cache=cache_in(tmp_path / "small", 1000)).reader("train").read([0])


def test_processes_of_a_node_download_once(
    server: FileServer, prepared: Path, tmp_path: Path
) -> None:
    server.faults = {"train-000003.tar": ["truncate", 503]}
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        sums = pool.starmap(sum_of_blocks, [(server.url, tmp_path)] * 4, chunksize=1)
    assert sums == [int(all_blocks(Dataset(prepared)).sum())] * 4
    for name, count in server.requests.items():
        if name.startswith("train"):
            assert count == (3 if name == "train-000003.tar" else 1), name


def sum_of_blocks(url: str, directory: Path) -> int:
    return int(all_blocks(Dataset(url, cache=cache_in(directory))).sum())


def test_the_next_window_is_fetched_ahead(server: FileServer, tmp_path: Path) -> None:
    remote = Dataset(server.url, cache=cache_in(tmp_path))
    loader = TrainLoader(remote.reader("train"), seed=0, global_batch=4, window=30)
    loader.batch(0, range(4))
    wanted = {
        remote.splits["train"]["shards"][shard]["sha256"]
        for shard in loader.orders[0].shards_of_window(0, ahead=1).tolist()
    }
    deadline = time.monotonic() + 20
    while not all((tmp_path / "cache/files" / name).exists() for name in wanted):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_command_as_a_source(prepared: Path, tmp_path: Path) -> None:
    location = f"pipe:cat {prepared}/{{name}}"
    remote = Dataset(location, cache=cache_in(tmp_path))
    assert np.array_equal(all_blocks(remote), all_blocks(Dataset(prepared)))
    with pytest.raises(DataError, match="ended with exit code 1"):
        Dataset(f"pipe:cat {tmp_path}/none/{{name}} 2>/dev/null", cache=cache_in(tmp_path))
    with pytest.raises(DataError, match=r"write \{name\}"):
        Dataset("pipe:cat file", cache=cache_in(tmp_path))


def test_locations() -> None:
    assert is_remote("s3://bucket/data") and is_remote("https://host/data")
    assert is_remote("pipe:cat {name}")
    assert not is_remote("data/books") and not is_remote("/data/http:/x") and not is_remote("C:x")
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    with pytest.raises(DataError, match=r"nosuch://host/x needs a package that reads nosuch://"):
        open_source("nosuch://host/x")


@pytest.fixture
def bucket(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The dataset in a bucket of moto's S3 server, which runs as a process of its own."""
    pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    program = (
        "from moto.server import ThreadedMotoServer as Server\n"
        "import time\n"
        "server = Server(ip_address='127.0.0.1', port=0)\n"
        "server.start()\n"
        "print('port', server.get_host_and_port()[1], flush=True)\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "MOTO_ALLOW_NONEXISTENT_REGION": "true"},
    )
    assert process.stdout is not None
    try:
        port = next(line.split()[1] for line in process.stdout if line.startswith("port"))
        endpoint = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        import s3fs

        store = s3fs.S3FileSystem(skip_instance_cache=True)
        store.mkdir("corpora")
        store.put(str(prepared), "corpora/books", recursive=True)
        yield "s3://corpora/books"
        urllib.request.urlopen(f"{endpoint}/moto-api/reset", data=b"", timeout=10).close()
    finally:
        process.kill()
        process.wait()


def test_s3(bucket: str, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sedd_scale.data.remote_sources.OBJECT_READ_BYTES", 10_000)
    remote = Dataset(bucket, cache=cache_in(tmp_path))
    assert np.array_equal(all_blocks(remote), all_blocks(Dataset(prepared)))
    with pytest.raises(DataError, match=r"nothing/index\.json does not exist: check data\.path"):
        Dataset("s3://corpora/nothing", cache=cache_in(tmp_path))
    assert json.loads((remote.path / "index.json").read_text())["version"] == 2


def test_errors_of_a_store_s_own_kind_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    source = ObjectSource("memory://corpora")
    for error, kind, message in (
        (NoCredentialsError("Unable to locate credentials"), DataError, "check the credentials"),
        (RuntimeError("try later"), OSError, "try later"),
    ):

        def refuse(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(source._store, "info", refuse)
        with pytest.raises(kind, match=message):
            source.read("index.json", 0)
