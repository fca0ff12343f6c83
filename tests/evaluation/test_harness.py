"""The lm-evaluation-harness model class, through the harness itself, on tasks of local files."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedd_scale.errors import DataError
from sedd_scale.evaluation.harness import SeddScaleLM
from sedd_scale.interop.pretrained import load_pretrained, save_pretrained
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.evaluation.enumeration import tiny_model
from tests.interop.tiny_checkpoints import write_checkpoint
from tests.repository import ROOT
from tests.tolerance import NETWORK

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
""",
    "local_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


class Request:
    """What the harness calls an instance: its arguments."""

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    write_checkpoint(folder / "absorb")
    write_checkpoint(folder / "uniform", graph="uniform")
    model = tiny_model(
        "absorb", "loglinear", num_tokens=257, block_length=32, objective="autoregressive"
    )
    model.tokenizer = BytesTokenizer()
    save_pretrained(model, folder / "autoregressive", format="native")
    model = tiny_model(
        "absorb", "loglinear", num_tokens=257, objective="autoregressive", shift=True
    )
    model.tokenizer, model.block_length = BytesTokenizer(), 32
    save_pretrained(model, folder / "shifted", format="native")
    rows = [
        {"question": f"the {word} is", "choices": [" here", " far", " b"], "answer": number % 3}
        for number, word in enumerate(["river", "stone", "old man", "sea"])
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        head += f"{folder / 'rows.jsonl'}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


def test_the_command_line_runs_local_tasks(work: Path) -> None:
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "sedd_scale.evaluation.harness", "--model", "sedd_scale"),
            *("--model_args", f"checkpoint={work / 'absorb'},draws=4"),
            *("--tasks", ",".join(TASKS), "--include_path", str(work), "--batch_size", "8"),
            *("--output_path", str(work / "out")),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    (path,) = (work / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert 0.0 <= results["local_choice"]["acc,none"] <= 1.0
    # Random weights know nothing: about log2 257 bits a byte.
    assert 6.0 < results["local_rolling"]["bits_per_byte,none"] < 12.0
    assert "exact_match,none" in results["local_generate"]


def test_likelihoods_are_those_of_the_continuation_given_the_context(work: Path) -> None:
    exact = SeddScaleLM(str(work / "autoregressive"), batch_size=3)
    rolling = exact.loglikelihood_rolling([Request(text) for text in ("abc", "abcde", "x" * 70)])
    ((nats, _),) = exact.loglikelihood([Request("abc", "de")])
    assert rolling[0] + nats == pytest.approx(rolling[1], rel=NETWORK)
    # Blocks of 32 that stand alone.
    parts = exact.loglikelihood_rolling([Request("x" * 32), Request("x" * 6)])
    assert rolling[2] == pytest.approx(2 * parts[0] + parts[1], rel=NETWORK)
    model = load_pretrained(work / "autoregressive")
    # Of all continuations of one token, the probabilities sum to one.
    every = exact._log_probabilities([([97, 98], [token]) for token in range(257)])
    assert np.exp(every).sum() == pytest.approx(1.0, abs=1e-5)
    assert model.objective.causal

    bound = SeddScaleLM(str(work / "absorb"), draws=8, seed=3)
    pairs = [("the sea is", " here"), ("the sea is", " far"), ("", " b")]
    found = bound.loglikelihood([Request(*pair) for pair in pairs])
    alone = [bound.loglikelihood([Request(*pair)])[0] for pair in pairs]
    for one, other in zip(found, alone, strict=True):  # whatever the company
        assert one == (pytest.approx(other[0]), other[1])
    assert all(-20 * len(pair[1]) < value < 0 for pair, (value, _) in zip(pairs, found))
    other = SeddScaleLM(str(work / "absorb"), draws=8, seed=4)
    assert other.loglikelihood([Request(*pairs[0])])[0][0] != found[0][0]
    # A long context loses its beginning; a space before the cut belongs to the word.
    long = bound.loglikelihood([Request("y" * 90 + "z ", "ab"), Request("y" * 28 + "z", " ab")])
    assert long[0][0] == pytest.approx(long[1][0])
    with pytest.raises(DataError, match="continuation of 40 tokens"):
        bound.loglikelihood([Request("", "a" * 40)])


def test_where_nothing_predicts_a_first_token_eos_stands_before_it(work: Path) -> None:
    model = SeddScaleLM(str(work / "shifted"))
    assert (model.start, model.max_length) == ([BytesTokenizer().eos_id], 31)
    every = model._log_probabilities([(model.start, [token]) for token in range(257)])
    assert np.exp(every).sum() == pytest.approx(1.0, abs=1e-5)
    ((first, _), (rest, _)) = model.loglikelihood([Request("", "a"), Request("", "ab")])
    assert first == pytest.approx(every[97], rel=NETWORK) and rest < first
    (whole,) = model.loglikelihood_rolling([Request("ab")])
    assert whole == pytest.approx(rest, rel=NETWORK)
    (greedy,) = np.flatnonzero([model._are_greedy([(model.start, [t])])[0] for t in range(257)])
    assert int(greedy) == int(np.argmax(every))


@pytest.mark.parametrize("name", ["absorb", "autoregressive", "shifted"])
def test_what_is_generated_greedily_is_greedy(work: Path, name: str) -> None:
    model = SeddScaleLM(str(work / name), draws=2)
    options = {"until": [], "max_gen_toks": 3, "do_sample": False}
    (text,) = model.generate_until([Request("the sea", options)])
    given = model._encode("the sea")
    greedy = model._are_greedy([(given, [token]) for token in range(257)])
    assert sum(greedy) == 1
    made = model._encode(text)
    if len(text.encode()) == 3 and "\ufffd" not in text:
        assert model._are_greedy([(given, made)]) == [True]
    stopped = model.generate_until([Request("the sea", {**options, "until": [text[1:]]})])
    assert stopped == [text[: text.index(text[1:])]] if text[1:] else True


def test_the_uniform_graph_has_likelihoods_and_text_too(work: Path) -> None:
    model = SeddScaleLM(str(work / "uniform"), draws=4, steps=4)
    ((nats, greedy),) = model.loglikelihood([Request("ab", "cd")])
    assert math.isfinite(nats) and nats < 0 and not greedy
    (text,) = model.generate_until([Request("ab", {"until": ["\n"], "max_gen_toks": 4})])
    assert isinstance(text, str) and "\n" not in text
