"""Benchmarks by name: fetched by the hub's own client, kept, and what to do without the hub.

The client reads where the hub is when it is imported, so it runs in a process of its own.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
from pyarrow import parquet

from sedd_scale.evaluation import DATASETS
from sedd_scale.evaluation.benchmarks import BENCHMARKS
from sedd_scale.evaluation.corpora import open_corpus
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.evaluation.hub_server import serving_hub
from tests.repository import ROOT

ROWS = {
    "wikitext": ["", " = A @-@ title = \n", "", " Text , of it . \n"],
    "ptb": ["the <unk> does n't", "rose N N"],
    "lm1b": ["One sentence , this one .", "Another ?"],
    "lambada": [" “ Well , ” he said "],
    "none": ["plain  text , as it is", "more"],
}
FETCH = """
import json, sys
from pathlib import Path
from sedd_scale.errors import DataError
from sedd_scale.evaluation.benchmarks import fetch_benchmark
for name in sys.argv[2:]:
    try:
        print(json.dumps([name, str(fetch_benchmark(name, Path(sys.argv[1])))]))
    except DataError as error:
        print(json.dumps([name, f"error: {error}"]))
"""


def files_of_the_hub() -> dict[str, bytes]:
    """Every benchmark's file, in the format its name says."""
    files = {}
    for benchmark in BENCHMARKS.values():
        rows = ROWS[benchmark.text.detokenizer]
        if benchmark.file.endswith(".jsonl"):
            content = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
        else:
            buffer = io.BytesIO()
            parquet.write_table(pyarrow.table({benchmark.text.field or "text": rows}), buffer)
            content = buffer.getvalue()
        files[f"{benchmark.repository}@{benchmark.revision}/{benchmark.file}"] = content
    return files


def fetch(cache: Path, endpoint: str, *names: str) -> dict[str, str]:
    """What each name became, with the hub at `endpoint`."""
    finished = subprocess.run(
        [sys.executable, "-c", FETCH, str(cache), *names],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return dict(json.loads(line) for line in finished.stdout.splitlines())


def test_every_benchmark_is_fetched_once_and_read_as_the_literature_does(tmp_path: Path) -> None:
    with serving_hub(files_of_the_hub()) as hub:
        found = fetch(tmp_path, hub.url, *DATASETS)
        for benchmark in BENCHMARKS.values():
            assert any(
                f"{benchmark.repository}@" in asked and asked.startswith("GET")
                for asked in hub.requests
            ), benchmark
        hub.files.pop(
            f"{BENCHMARKS['ptb'].repository}@refs/convert/parquet/{BENCHMARKS['ptb'].file}"
        )
        gone = fetch(tmp_path / "other", hub.url, "ptb")
    assert "was not fetched from the hub" in gone["ptb"] and "ptb.test.txt" in gone["ptb"]
    expected = {
        "wikitext2": "\n = A-title =\n\n Text, of it.\n|",
        "wikitext103": "\n = A-title =\n\n Text, of it.\n|",
        "ptb": "the ? doesn't\nrose 1 N\n|",
        "lambada": '\n" Well , " he said|',
        "lm1b": "One sentence, this one.|Another?|",
        "text8": "plain  text , as it is\nmore\n|",
        "openwebtext": "plain  text , as it is|more|",
    }
    for name, text in expected.items():
        corpus = open_corpus(
            found[name],
            tokenizer=BytesTokenizer(),
            num_tokens=257,
            block_length=len(text),
            text=BENCHMARKS[name].text,
            name=name,
        )
        (block,) = corpus.blocks_nL.tolist()
        assert "".join("|" if i == 256 else chr(i) for i in block) == text, name
        assert corpus.name == name and corpus.dropped_tokens == 0

    # Out of reach: what is there is used, for the rest the file to give is named.
    without = fetch(tmp_path, "http://127.0.0.1:9", "lm1b")
    assert without == {"lm1b": found["lm1b"]}
    nothing = fetch(tmp_path / "empty", "http://127.0.0.1:9", *DATASETS)
    for name, error in nothing.items():
        detokenizer = BENCHMARKS[name].text.detokenizer
        assert error.startswith(f"error: --dataset {name}: {BENCHMARKS[name].repository} was not")
        assert f"--data FILE --detokenizer {detokenizer}" in error and "\n" not in error
