"""Files of prompts: order, settings of a line, and errors that name the line or pass it over."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from sedd_scale.errors import DataError
from sedd_scale.generation.prompts_file import Prompt, prompts_of_lines, read_prompt_lines
from sedd_scale.sampling.settings import SamplerSettings
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from sedd_scale.tokenizers.base import Tokenizer
from sedd_scale.tokenizers.sentencepiece import SentencePieceTokenizer

BYTES = BytesTokenizer()


def write(path: Path, *lines: object) -> Path:
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return path


def read(
    path: Path,
    *,
    length: int = 6,
    tokenizer: Tokenizer | None = BYTES,
    kind: str = "absorb",
    settings: SamplerSettings | None = None,
    skipped: list[str] | None = None,
) -> list[Prompt]:
    """All of the file; errors go to `skipped`, or are raised where it is None."""
    on_bad = None if skipped is None else lambda error: skipped.append(str(error))
    return prompts_of_lines(
        read_prompt_lines(path, on_bad=on_bad),
        tokenizer=tokenizer,
        num_tokens=257,
        length=length,
        kind=kind,
        settings=settings,
        on_bad=on_bad,
    )


def test_prompts_are_read_in_order(tmp_path: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        {"id": "one", "text": "a[blank:2]", "num_samples": 3, "seed": 4},
        "\r\n",
        {"prefix": "ab"},
        {"tokens": [1], "positions": [2], "length": 4},
    )
    prompts = read(path, length=5)
    assert [prompt.id for prompt in prompts] == ["one", 3, 4]
    assert [(prompt.num_samples, prompt.seed) for prompt in prompts] == [
        (3, 4),
        (1, None),
        (1, None),
    ]
    assert [len(prompt.given.tokens_L) for prompt in prompts] == [3, 5, 4]
    assert np.flatnonzero(prompts[2].given.fixed_L).tolist() == [2]


def test_a_line_changes_the_settings_of_the_command(tmp_path: Path) -> None:
    path = write(
        tmp_path / "prompts.jsonl",
        {"prefix": "a"},
        {"prefix": "a", "steps": 3, "temperature": 0.5},
        {"prefix": "a", "sampler": "euler", "steps": None},
    )
    base = SamplerSettings(sampler="ancestral", steps=9, top_p=0.9)
    assert [prompt.settings for prompt in read(path, settings=base)] == [
        base,
        SamplerSettings(sampler="ancestral", steps=3, top_p=0.9, temperature=0.5),
        SamplerSettings(sampler="euler", steps=None, top_p=0.9),
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{\n", "is not JSON"),
        ("[" * 100000 + "\n", "is not JSON"),
        ("[1]\n", "is a JSON list: each line must be one object"),
        ({"text": 3}, "text=3 is not text"),
        ({"text": "x \ud83d ____"}, "half of a surrogate pair"),
        ({"text": "a____", "prefix": "b"}, "exactly one of"),
        ({"id": 1}, "exactly one of"),
        ({"txt": "a____"}, "unknown key 'txt'"),
        ({"text": "a____", "num_samples": 0}, "num_samples=0"),
        ({"text": "a____", "length": 0}, "length=0"),
        ({"text": "a____", "length": 7}, "length=7 is more than the length 6"),
        ({"text": "a____", "seed": -1}, "seed=-1"),
        ({"text": "a____", "id": True}, "id=True"),
        ({"text": "a____", "id": 1}, "id=1 is also that of line 1"),
        ({"text": "a____", "steps": 0}, "steps=0"),
        ({"text": "a____", "sampler": "best"}, "sampler 'best'"),
        ({"text": "abcdefgh____"}, "more than the length 6"),
        ({"tokens": [1, 2], "positions": [1]}, "2 tokens have 1 positions"),
        ({"tokens": [1, 2], "positions": [1, 1]}, "given twice"),
        ({"tokens": [1], "positions": [6]}, "position 6 is outside"),
        ({"tokens": [257], "positions": [0]}, "token id 257"),
        ({"tokens": ["a"], "positions": [0]}, "not a list of integers"),
        ({"positions": [0]}, "not a list of integers"),
    ],
)
def test_a_malformed_line_is_named_or_passed_over(
    tmp_path: Path, line: object, message: str
) -> None:
    path = write(tmp_path / "prompts.jsonl", {"text": "a____"}, line, {"text": "b____"})
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2.*{message}"):
        read(path)
    skipped: list[str] = []
    assert [prompt.id for prompt in read(path, skipped=skipped)] == [1, 3]
    (error,) = skipped
    assert "prompts.jsonl:2" in error and message in error


def test_settings_of_another_graph_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", {"prefix": "a"}, {"prefix": "a", "top_p": 0.5})
    with pytest.raises(DataError, match=r"prompts\.jsonl:2: top_p=0.5"):
        read(path, kind="uniform")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="is empty"):
        read(write(tmp_path / "empty.jsonl", "\n"))
    with pytest.raises(DataError, match="no line that can be used"):
        read(write(tmp_path / "bad.jsonl", "{\n", "[]\n"), skipped=[])
    (tmp_path / "bad.jsonl").write_bytes(b'\n{"text": "\xff"}')
    with pytest.raises(DataError, match=r"bad\.jsonl:2: byte 0xff at offset 11 is not UTF-8"):
        read(tmp_path / "bad.jsonl")
    path = write(tmp_path / "text.jsonl", {"text": "a____"})
    with pytest.raises(DataError, match="carries no tokenizer"):
        read(path, tokenizer=None)


def test_text_without_a_token_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "model").open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the cat sat on the mat", "a dog ate the hat"]),
            model_writer=model,
            vocab_size=24,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    tokenizer = SentencePieceTokenizer.open((tmp_path / "model").rename(tmp_path / "tiny.model"))
    path = write(tmp_path / "p.jsonl", {"text": "the ____"}, {"text": "the \u017c ____"})
    with pytest.raises(DataError, match=r"p\.jsonl:2: the text holds 'ż'"):
        read(path, tokenizer=tokenizer, length=40)
