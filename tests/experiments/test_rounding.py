"""What bfloat16 costs a bound: pairs of one set of draws, and differences of a rounding's size."""

import json
from pathlib import Path

import pytest

from sedd_scale.__main__ import main
from sedd_scale.experiments.rounding import VARIANTS
from sedd_scale.interop.pretrained import save_pretrained
from sedd_scale.tokenizers.alphabets import BytesTokenizer
from tests.data.corpus import make_texts
from tests.evaluation.enumeration import tiny_model


def test_the_report_has_each_type_beside_float32(tmp_path: Path) -> None:
    tokenizer = BytesTokenizer()
    model = tiny_model("absorb", "loglinear", num_tokens=tokenizer.vocab_size, block_length=16)
    model.tokenizer = tokenizer
    save_pretrained(model, tmp_path / "model", format="native")
    text, output = tmp_path / "text.txt", tmp_path / "report"
    text.write_text(" ".join(make_texts(3)))
    command = ["experiment", "rounding", "--checkpoint", str(tmp_path / "model")]
    command += ["--data", str(text), "--output", str(output), "--draws", "4"]
    assert main([*command, "--max-blocks", "8"]) == 0
    rows = json.loads((output / "report.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == list(VARIANTS)
    exact, *rounded = rows
    assert exact["difference"] == 0.0 and exact["blocks"] == 8
    for row in rounded:
        apart = row["nats_per_token"] - exact["nats_per_token"]
        assert row["difference"] == pytest.approx(apart, abs=1e-9) != 0.0
        # Logits and activations of a few units, rounded to one part in 2^8.
        assert abs(apart) < 0.03 * exact["nats_per_token"]
        assert row["difference_stderr"] > 0.0
    assert (output / "report.md").read_text().count("\n| ") == len(VARIANTS) + 1
    assert main([*command, "--max-blocks", "1"]) == 2
