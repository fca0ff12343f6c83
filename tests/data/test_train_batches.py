"""Batches of a run: damaged shards are met alike by all ranks, padding has no part in the loss."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sedd_scale.config import Config
from sedd_scale.data.corpus import Corpus
from sedd_scale.data.padding import counted_positions
from sedd_scale.data.shards import BadShardError
from sedd_scale.diffusion.corruption import Draw
from sedd_scale.errors import DataError
from sedd_scale.parallel.layout import Layout
from sedd_scale.training.batches import TrainBatches, ValidationBatches, random_lengths
from tests.data.skip_worker import damage
from tests.datasets import dataset_of_words
from tests.distributed.runs import launch

WORKER = Path(__file__).with_name("skip_worker.py")
LENGTH = 48
ALONE = Layout(
    tensor=1,
    pipeline=1,
    data=1,
    tensor_rank=0,
    pipeline_rank=0,
    data_rank=0,
    rank=0,
    device=torch.device("cpu"),
)


def make(directory: Path, **arguments: Any) -> Path:
    chosen = {"block_length": LENGTH, "valid_fraction": 0.1, **arguments}
    return dataset_of_words(directory / "d", 80, blocks_per_shard=60, **chosen)


def batches_of(
    path: Path, *overrides: str, layout: Layout = ALONE
) -> tuple[TrainBatches, ValidationBatches]:
    config = Config().override(
        f"data.path={path}",
        "training.global_batch=8",
        "training.micro_batch=4",
        "model.vocab_size=257",
        *overrides,
    )
    corpus = Corpus(config.data)
    return TrainBatches(corpus, config, layout), ValidationBatches(corpus, config, layout)


def skip(path: Path, *arguments: object, ranks: int) -> list[dict[str, Any]]:
    launch(ranks, [str(WORKER), str(path), *map(str, arguments)])
    return [json.loads(path.with_name(f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def test_ranks_skip_a_damaged_shard_alike_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = make(tmp_path)
    chosen = batches_of(path, "training.valid_blocks=40")[1].blocks
    damage(path, 1, split="valid")
    two = skip(path, 0, 30, 4, "skip", "[]", ranks=2)
    assert two[0]["skipped"] == two[1]["skipped"] == [[0, 1]]
    assert two[0]["order"] == two[1]["order"]
    assert two[0]["metrics"] == two[1]["metrics"]
    assert two[0]["metrics"]["skipped_shards"] == 1.0
    # Another number of ranks goes on from what the checkpoint says, with the same batches.
    (one,) = skip(path, 12, 30, -1, "skip", json.dumps(two[0]["last"]), ranks=1)
    together = [first + second for first, second in zip(two[0]["digests"], two[1]["digests"])]
    assert one["digests"] == together[12:]
    assert one["order"] == two[0]["order"]
    assert one["last"] == two[0]["last"]
    # Of the validation blocks only those of the damaged shard were replaced.
    expected = two[0]["valid_blocks"]
    assert two[1]["valid_blocks"] == one["valid_blocks"] == expected
    assert two[0]["valid_metrics"] == {"skipped_valid_shards": 1.0}
    assert len(set(expected)) == len(expected) == 40
    whole = chosen // 60 != 1
    assert not whole.all()
    assert all(block // 60 != 1 for block in expected)
    assert np.array_equal(np.array(expected)[whole], chosen[whole])


def test_a_damaged_shard_stops_a_run_by_default(tmp_path: Path) -> None:
    path = make(tmp_path)
    batches, _ = batches_of(path)
    damage(path, 1)
    with pytest.raises(BadShardError, match=r"train-000001\.tar holds member .* at byte \d+"):
        for step in range(100):
            batches.of_step(step)


def test_a_damaged_validation_shard_stops_a_run_by_default(tmp_path: Path) -> None:
    path = make(tmp_path)
    damage(path, 0, split="valid")
    with pytest.raises(BadShardError, match=r"valid-000000\.tar holds member .* at byte \d+"):
        batches_of(path)


def test_missing_and_cut_validation_shards_are_skipped_too(tmp_path: Path) -> None:
    path = make(tmp_path)
    shards = sorted(path.glob("valid-*.tar"))
    shards[0].unlink()
    with pytest.raises(DataError, match=r"valid-000000\.tar is missing"):
        batches_of(path)
    _, valid = batches_of(path, "data.on_bad_shard=skip")
    assert valid.metrics() == {"skipped_valid_shards": 1.0}
    assert min(valid.blocks) >= 60
    for shard in shards[1:]:
        shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"every validation shard of .* is damaged"):
        batches_of(path, "data.on_bad_shard=skip")


@pytest.mark.parametrize("random_length", [0.0, 0.5])
def test_rows_weigh_what_the_text_of_the_global_batch_says(
    tmp_path: Path, random_length: float
) -> None:
    """On any split into replicas and micro-batches; the engine takes the mean of micro-batches."""
    path = make(tmp_path, packing="documents", block_length=700)
    overrides = ("graph.name=uniform", f"data.random_length={random_length}")
    for data, micro_batch in ((1, 8), (1, 2), (4, 1)):
        rows, weights, tokens = 0, set(), set()
        for rank in range(data):
            layout = dataclasses.replace(ALONE, data=data, data_rank=rank)
            train, _ = batches_of(
                path, *overrides, f"training.micro_batch={micro_batch}", layout=layout
            )
            step = train.of_step(3)
            tokens.add(step.tokens)
            rows += sum(len(batch.targets.rows_M) for batch in step.micro_batches)
            weights |= {float(batch.targets.row_weight) for batch in step.micro_batches}
        # Under the uniform graph every position of text is a row of the loss.
        assert tokens == {rows}
        assert rows < 0.9 * 8 * 700
        assert len(weights) == 1
        assert weights.pop() * rows / (8 / micro_batch) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("documents", [False, True])
def test_given_first_tokens_are_not_counted(tmp_path: Path, packing: str, documents: bool) -> None:
    """Of blocks, or of each document: what is left weighs alike on any split."""
    path = make(tmp_path, **({"packing": packing} if packing == "documents" else {}))
    overrides = (
        *("training.objective=autoregressive", "training.shift=true"),
        f"model.document_attention={str(documents).lower()}",
    )
    seen = set()
    for data in (1, 4):
        rows, share = 0, 0.0
        for rank in range(data):
            layout = dataclasses.replace(ALONE, data=data, data_rank=rank)
            train, valid = batches_of(path, *overrides, "training.micro_batch=2", layout=layout)
            step = train.of_step(1)
            for batch in step.micro_batches:
                rows += len(batch.targets.rows_M)
                share += len(batch.targets.rows_M) * float(batch.targets.row_weight) / 4
        assert share == pytest.approx(1.0, abs=1e-12) and rows == step.tokens
        seen.add(rows)
    assert len(seen) == 1
    (noisy_BL, _, _), targets = step.micro_batches[0]
    assert torch.equal(targets.clean_M, noisy_BL.t().flatten()[targets.rows_M + len(noisy_BL)])
    text_n = valid.tokens_n
    tokens_BL = valid.corpus.valid_reader().read(valid.blocks)
    for tokens_L, count in zip(tokens_BL.tolist(), text_n.tolist(), strict=True):
        expected = 0
        padded = counted_positions(np.array([tokens_L]), valid.corpus.eos_id)[0]
        for place in range(1, LENGTH):
            begins = documents and tokens_L[place - 1] == valid.corpus.eos_id
            expected += not begins and (packing == "stream" or bool(padded[place]))
        assert count == expected


def test_without_padding_rows_weigh_one_over_all_positions_exactly(tmp_path: Path) -> None:
    train, _ = batches_of(make(tmp_path))
    step = train.of_step(0)
    assert step.tokens == 8 * LENGTH
    assert {float(batch.targets.row_weight) for batch in step.micro_batches} == {1 / (4 * LENGTH)}


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_padding_is_neither_corrupted_nor_counted(tmp_path: Path, graph: str) -> None:
    path = make(tmp_path, packing="documents", block_length=700)
    train, valid = batches_of(path, f"graph.name={graph}")
    eos = train.corpus.eos_id
    checked = 0
    for step in range(6):
        clean_BL = train.loader.batch(step, range(8))
        counted_BL = counted_positions(clean_BL, eos)
        for number, batch in enumerate(train.of_step(step).micro_batches):
            part = slice(4 * number, 4 * number + 4)
            noisy_BL, counted = batch.inputs[0].numpy(), counted_BL[part]
            assert np.array_equal(noisy_BL[~counted], clean_BL[part][~counted])
            checked += int((~counted).sum())
            # Rows of the loss are positions [L * B]: none of them padding.
            rows = batch.targets.rows_M.numpy()
            assert counted.T.reshape(-1)[rows].all()
            if graph == "uniform":
                assert len(rows) == counted.sum()
            else:
                assert len(rows) == (noisy_BL == 257).sum()
    assert checked > 1000
    blocks = [batch.inputs[0] for batch in valid.micro_batches]
    reader = valid.corpus.valid_reader()
    text = counted_positions(reader.read(valid.blocks), eos).sum(1)
    assert valid.tokens_n.tolist() == text.tolist()
    # A network that loses 2 nats on each text token is 2 nats per token above the constant.
    nats = [valid.tokens_n * rate for rate in (0.0, 2.0)]
    none, two = (valid.bound([part])[0] for part in nats)
    assert two - none == pytest.approx(2.0 * (1 - valid.process.t_min))
    assert valid.bound([nats[1]])[1] == pytest.approx(0.0, abs=1e-12)
    assert sum(map(len, blocks)) >= len(valid.blocks)


def test_a_share_of_blocks_has_a_random_length(tmp_path: Path) -> None:
    path = make(tmp_path)
    batches, _ = batches_of(path, "data.random_length=0.25", "graph.name=uniform")
    eos = batches.corpus.eos_id
    samples, short = 0, 0
    for step in range(40):
        clean = batches.loader.batch(step, range(8))
        for number, batch in enumerate(batches.of_step(step).micro_batches):
            ids = np.arange(8 * step + 4 * number, 8 * step + 4 * number + 4)
            draw = Draw(0, step, ids, global_batch=8)
            lengths = random_lengths(draw, block_length=LENGTH, share=0.25)
            assert len(batch.targets.rows_M) == lengths.sum()
            for row, length in enumerate(lengths.tolist()):
                assert (batch.inputs[0][row, length:] == eos).all()
                samples, short = samples + 1, short + (length < LENGTH)
        assert clean.shape == (8, LENGTH)
    # Binomial: 320 samples, a quarter of which is cut (one in 48 of those to its whole length).
    expected = samples * 0.25 * (1 - 1 / LENGTH)
    assert abs(short - expected) < 4 * np.sqrt(expected)


def test_random_lengths_are_uniform_and_keyed_by_sample() -> None:
    draw = Draw(1, 3, np.arange(4000), global_batch=4000)
    lengths = random_lengths(draw, block_length=10, share=1.0)
    counts = np.bincount(lengths, minlength=11)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 400).max() < 5 * 20
    some = random_lengths(draw.part(slice(17, 23)), block_length=10, share=1.0)
    assert np.array_equal(some, lengths[17:23])
    assert (random_lengths(draw, block_length=10, share=0.0) == 10).all()
