"""The benchmarks that published perplexities are on: where each lies and how its text is read.

Splits are the test splits. They are fetched from the Hugging Face hub (`HF_ENDPOINT`, `HF_HOME`,
`HF_TOKEN` and `HF_HUB_OFFLINE` as its client has them); where that is out of reach, a file of one's
own takes the place of the download.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from sedd_scale.errors import DataError
from sedd_scale.evaluation import DATASETS
from sedd_scale.evaluation.text_blocks import TextSettings

_PATIENCE = 10.0  # seconds
_PARQUET_BRANCH = "refs/convert/parquet"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the literature.

    Attributes:
        repository: of the hub's datasets.
        file: in it.
        text: how its rows become documents.
        own_file: the file that --data takes in its place.
        revision: branch of the repository.
    """

    repository: str
    file: str
    text: TextSettings
    own_file: str
    revision: str = "main"


BENCHMARKS = {
    "wikitext2": Benchmark(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        TextSettings("wikitext", "joined"),
        "wiki.test.raw of WikiText-2 raw",
    ),
    "wikitext103": Benchmark(
        "Salesforce/wikitext",
        "wikitext-103-raw-v1/test-00000-of-00001.parquet",
        TextSettings("wikitext", "joined"),
        "wiki.test.raw of WikiText-103 raw",
    ),
    "ptb": Benchmark(
        "ptb-text-only/ptb_text_only",
        "penn_treebank/test/0000.parquet",
        TextSettings("ptb", "joined", field="sentence"),
        "ptb.test.txt of the Penn Treebank",
        _PARQUET_BRANCH,
    ),
    "lambada": Benchmark(
        "EleutherAI/lambada_openai",
        "data/lambada_test_en.jsonl",
        TextSettings("lambada", "rows"),
        "lambada_test.jsonl (the OpenAI variant)",
    ),
    "lm1b": Benchmark(
        "billion-word-benchmark/lm1b",
        "plain_text/test/0000.parquet",
        TextSettings("lm1b", "rows"),
        "a shard of news.en.heldout of the One Billion Word benchmark, with --documents rows",
        _PARQUET_BRANCH,
    ),
    "text8": Benchmark(
        "afmck/text8",
        "default/test/0000.parquet",
        TextSettings("none", "joined"),
        "the last 5,000,000 characters of text8",
        _PARQUET_BRANCH,
    ),
    # The whole corpus is one split, whose last 100,000 documents are held out.
    "openwebtext": Benchmark(
        "Skylion007/openwebtext",
        "plain_text/train-00079-of-00080.parquet",
        TextSettings("none", "rows", last_rows=100_000),
        "held-out documents of OpenWebText as JSONL",
    ),
}
assert tuple(BENCHMARKS) == DATASETS


def fetch_benchmark(name: str, cache_dir: Path | None = None) -> Path:
    """The benchmark's file, from the hub or its cache.

    Args:
        name: of `BENCHMARKS`.
        cache_dir: where files are kept; None: where the hub's client keeps them.

    Raises:
        DataError: the hub cannot be reached, lacks the file, or its client is not installed; says
            which file to give in its place.
    """
    benchmark = BENCHMARKS[name]
    instead = (
        f"give the text yourself: --data FILE --detokenizer {benchmark.text.detokenizer}, FILE "
        f"being {benchmark.own_file}"
    )
    try:
        import httpx2
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import disable_progress_bars, get_session
    except ImportError:
        raise DataError(
            f"--dataset {name} needs the hub's client: pip install 'sedd_scale[hub]', or {instead}"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    # The client asks six times, over half a minute, before it takes a hub to be out of reach.
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
        reachable = True
    except (OSError, httpx2.HTTPError):
        reachable = False
    try:
        return Path(
            hf_hub_download(
                benchmark.repository,
                benchmark.file,
                repo_type="dataset",
                revision=benchmark.revision,
                cache_dir=cache_dir,
                local_files_only=not reachable,
            )
        )
    except (OSError, ValueError, httpx2.HTTPError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if isinstance(error, LocalEntryNotFoundError):
            reason = "it is out of reach, and its cache lacks the file"
        raise DataError(
            f"--dataset {name}: {benchmark.repository} was not fetched from the hub: {reason}; "
            f"{instead}"
        ) from error
