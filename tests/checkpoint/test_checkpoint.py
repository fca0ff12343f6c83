"""Checkpoints: boxes by brute force, layouts against layouts, directories, and errors."""

import itertools
import json
import math
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from sedd_scale.checkpoint.boxes import LogicalTensor, boxes_of_range, logical_boxes
from sedd_scale.checkpoint.directory import find_checkpoint, has_checkpoint, read_meta
from sedd_scale.checkpoint.manifest import write_manifest
from sedd_scale.checkpoint.reading import load_weights
from sedd_scale.errors import CheckpointError
from sedd_scale.model.parameters import LogicalParameter
from sedd_scale.parallel.layout import Layout
from tests.distributed.runs import launch
from tests.tolerance import NETWORK

WORKER = Path(__file__).with_name("checkpoint_worker.py")
VOCAB, WIDTH = 101, 24


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes saved, and what four, two and one found in it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    (folder / "tokenizer" / "model").mkdir(parents=True)
    (folder / "tokenizer" / "model" / "vocab.txt").write_text("x")
    launch(4, [str(WORKER), "resume", str(folder)])
    return folder


def results(saved: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((saved / "resume.json").read_text())
    return found


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, read with torch alone."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    tensors = {
        name: torch.full(t.size, torch.nan) for name, t in metadata.state_dict_metadata.items()
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return tensors


def logical(
    name: str, shape: tuple[int, ...], *, dim: int | None = None, ranks: int = 1, rank: int = 0
) -> LogicalParameter:
    """A parameter as rank `rank` of `ranks` tensor ranks has it, padded to equal shards."""
    local = list(shape)
    if dim is not None:
        local[dim] = -(-shape[dim] // ranks)
    return LogicalParameter(
        name=name,
        parameter=nn.Parameter(torch.full(local, torch.nan)),
        local_shape=tuple(local),
        shape=shape,
        partition_dim=dim,
        offset=local[dim] * rank if dim is not None else 0,
    )


def model(ranks: int, rank: int, vocab: int = VOCAB) -> list[LogicalParameter]:
    """The parameters of the workers' model."""
    where: dict[str, Any] = {"ranks": ranks, "rank": rank}
    parameters = [logical("embedding.tokens.weight", (vocab, WIDTH), dim=0, **where)]
    for block in ("blocks.0", "blocks.1"):
        parameters += [
            logical(f"{block}.norm.weight", (WIDTH,)),
            logical(f"{block}.norm.bias", (WIDTH,)),
            *(
                logical(f"{block}.up.{part}.{kind}", shape, dim=0, **where)
                for kind, shape in (("weight", (30, WIDTH)), ("bias", (30,)))
                for part in ("gate", "inner")
            ),
            logical(f"{block}.down.weight", (WIDTH, 30), dim=1, **where),
            logical(f"{block}.down.bias", (WIDTH,)),
        ]
    parameters.append(logical("head.linear.weight", (vocab, WIDTH), dim=0, **where))
    parameters.append(logical("head.linear.bias", (vocab,), dim=0, **where))
    return parameters


def layout(tensor: int = 1, rank: int = 0, pipeline: int = 1) -> Layout:
    return Layout(tensor, pipeline, 1, rank, 0, 0, rank, torch.device("cpu"))


def test_boxes_of_every_range_hold_it_once_in_order() -> None:
    for shape in [(1,), (7,), (3, 4), (5, 1), (1, 5), (2, 3, 4), (3, 1, 2, 2)]:
        total = math.prod(shape)
        whole = torch.arange(total).view(shape)
        for start, end in itertools.combinations(range(total + 1), 2):
            boxes = list(boxes_of_range(shape, start, end - start))
            values = []
            for box in boxes:
                assert box.begin == len(values)
                part = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes))]
                assert part.shape == box.sizes
                values += part.flatten().tolist()
            assert values == list(range(start, end))
            assert len(boxes) <= 2 * len(shape) - 1
        assert list(boxes_of_range(shape, 0, 0)) == []


def test_fragments_of_padded_shards_fill_the_logical_tensor_once() -> None:
    draw = random.Random(0)
    for _ in range(200):
        shape = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
        ranks = draw.choice([1, 2, 3])
        dim = draw.choice([None, 0, *(d for d in range(1, len(shape)) if shape[d] % ranks == 0)])
        whole = torch.randn(shape)
        count = torch.zeros(shape)
        read = torch.full(shape, torch.nan)
        for rank in range(ranks if dim is not None else 1):
            parameter = logical("p", shape, dim=dim, ranks=ranks, rank=rank)
            shard = parameter.slice_of(whole)
            flat = shard.flatten()
            cuts = sorted(draw.randint(0, flat.numel()) for _ in range(3))
            for start, end in itertools.pairwise([0, *cuts, flat.numel()]):
                for box in logical_boxes(parameter, start, end - start):
                    where = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes))
                    begin = start + box.begin
                    count[where] += 1
                    read[where] = flat[begin : begin + math.prod(box.sizes)].view(box.sizes)
        assert torch.equal(count, torch.ones(shape))
        assert torch.equal(read, whole)


def test_parts_are_views_of_the_fragment() -> None:
    parameter = logical("p", (5, 4), dim=0, ranks=2, rank=1)  # rows 3, 4 and one of padding
    flat = torch.zeros(10)
    tensor = LogicalTensor(parameter.shape)
    tensor.add(parameter, flat, 2)
    chunks = tensor.__create_chunk_list__()
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in chunks] == [
        ((3, 2), (1, 2)),
        ((4, 0), (1, 4)),
    ]
    for item in tensor.__create_write_items__("p/ema", None):
        tensor.part(item.index).fill_(1.0)
    assert torch.equal(flat, torch.tensor([1.0] * 6 + [0.0] * 4))


def test_same_layout_goes_on_bit_for_bit(saved: Path) -> None:
    found = results(saved)
    assert found["same layout"] == found["reference"]
    assert found["bf16 resumed"] == found["bf16"]
    assert len(set(found["reference"])) == 3


@pytest.mark.parametrize(
    "name", ["TP2 PP2 ZeRO1", "DP4 ZeRO2, from TP2 PP2", "DP2 ZeRO1", "TP2 ZeRO2", "PP2", "DP1"]
)
def test_other_layouts_go_on_with_the_same_losses(saved: Path, name: str) -> None:
    found = results(saved)
    assert found[name] == pytest.approx(found["reference"], rel=NETWORK, abs=0)


def test_bf16_goes_on_from_fp32(saved: Path) -> None:
    found = results(saved)
    assert found["bf16 from fp32"] == pytest.approx(found["reference"][:2], rel=5e-3)


def test_the_checkpoint_holds_the_logical_tensors(saved: Path) -> None:
    expected = torch.load(saved / "tensors.pt")
    assert expected["head.linear.weight/ema"].shape == (VOCAB, WIDTH)
    for run in ("zero3", "again", "pipeline"):
        found = tensors_in(saved / run / "checkpoints" / "step-3")
        assert found.keys() == expected.keys()
        for name in expected:
            assert torch.equal(found[name], expected[name]), (run, name)
    assert not torch.equal(
        expected["head.linear.weight/ema"], expected["head.linear.weight/master"]
    )


@pytest.mark.parametrize("weights", ["ema", "master"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_load_weights_gives_each_tensor_rank_its_shard(
    saved: Path, weights: str, ranks: int
) -> None:
    expected = torch.load(saved / "tensors.pt")
    for rank in range(ranks):
        parameters = model(ranks, rank)
        meta = load_weights(saved / "zero3", parameters, layout(ranks, rank), weights=weights)
        assert meta["step"] == 3
        for parameter in parameters:
            whole = expected[f"{parameter.name}/{weights}"]
            assert torch.equal(parameter.parameter, parameter.slice_of(whole)), parameter.name


def test_load_weights_casts_and_takes_a_stage(saved: Path) -> None:
    stage = model(1, 0)[:4]
    load_weights(saved / "zero3", stage, layout(pipeline=2), dtype=torch.bfloat16)
    expected = torch.load(saved / "tensors.pt")
    for parameter in stage:
        value = expected[f"{parameter.name}/ema"]
        assert torch.equal(parameter.parameter, value.bfloat16())


def test_another_model_is_refused_before_anything_is_written(saved: Path) -> None:
    other, missing, short = results(saved)["load errors"]
    assert other.endswith(
        " is of another model: misshapen: "
        "embedding.tokens.weight is [101, 24] and should be [103, 24], "
        "head.linear.weight is [101, 24] and should be [103, 24], "
        "head.linear.bias is [101] and should be [103]"
    )
    assert "no checkpoint" in missing and "nothing" in missing
    assert "__2_0.distcp is cut short: 500 of" in short

    wide = model(1, 0, vocab=103)
    with pytest.raises(CheckpointError, match=r"embedding.tokens.weight.*\[101, 24\].*\[103, 24\]"):
        load_weights(saved / "zero3", wide, layout())
    assert all(parameter.parameter.isnan().all() for parameter in wide)
    with pytest.raises(CheckpointError, match="unknown "):
        load_weights(saved / "zero3", model(1, 0)[:-1], layout())
    with pytest.raises(CheckpointError, match=r"missing extra.weight \[3\]"):
        load_weights(saved / "zero3", [*model(1, 0), logical("extra.weight", (3,))], layout())


def test_the_directory_keeps_the_newest(saved: Path) -> None:
    assert results(saved)["listings"] == [
        ["latest", "step-5", "step-5\n"],
        ["latest", "step-5", "step-6", "step-6\n"],
        ["latest", "step-6", "step-7", "step-7\n"],
        ["latest", "step-6", "step-7", "step-7\n"],
        ["latest", "step-7", "step-8", "step-8\n"],
    ]
    step = saved / "kept" / "checkpoints" / "step-8"
    assert (step / "tokenizer" / "model" / "vocab.txt").read_text() == "x"
    meta = read_meta(saved / "kept")
    assert meta["step"] == 8 and meta["optimizer_step"] == 6
    assert meta["shapes"]["head.linear.bias"] == [VOCAB]
    assert set(meta["versions"]) >= {"sedd_scale", "torch", "deepspeed", "megatron-core"}


def test_a_save_that_fails_on_one_process_fails_on_all_and_leaves_the_last(saved: Path) -> None:
    no_folder, full = results(saved)["save errors"]
    assert no_folder.startswith("cannot write checkpoint") and "Not a directory" in no_folder
    assert "rank 3" in full and "No space left" in full and "\n" not in full
    assert find_checkpoint(saved / "zero3").name == "step-3"
    assert not (saved / "zero3" / "checkpoints" / "step-4").exists()


def test_a_checkpoint_is_found_by_any_of_its_names(saved: Path) -> None:
    step = saved / "zero3" / "checkpoints" / "step-3"
    for path in (saved / "zero3", saved / "zero3" / "checkpoints", step):
        assert find_checkpoint(path) == step
    assert has_checkpoint(saved / "zero3")


def test_what_is_missing_is_named(saved: Path, tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="it has no directory step-N"):
        find_checkpoint(tmp_path)

    run = tmp_path / "run"
    shutil.copytree(saved / "zero3", run)
    folder, step = run / "checkpoints", run / "checkpoints" / "step-3"
    (folder / "latest").unlink()
    assert has_checkpoint(run)
    assert find_checkpoint(run) == step
    step.rename(folder / "step-3.tmp")
    assert not (folder / "step-3").exists()
    with pytest.raises(CheckpointError, match="cut short"):
        find_checkpoint(folder / "step-3.tmp")


def test_damage_is_named_before_anything_is_loaded(saved: Path, tmp_path: Path) -> None:
    def damaged(name: str) -> Path:
        run = tmp_path / name
        shutil.copytree(saved / "zero3" / "checkpoints" / "step-3", run / "checkpoints" / "step-3")
        (run / "checkpoints" / "latest").write_text("step-3")
        return run / "checkpoints" / "step-3"

    def refuses(step: Path, match: str) -> None:
        parameters = model(1, 0)
        with pytest.raises(CheckpointError, match=match):
            load_weights(step.parent, parameters, layout())
        assert all(parameter.parameter.isnan().all() for parameter in parameters)

    for file in (".metadata", "meta.json", "manifest.json", "tokenizer/model/vocab.txt"):
        step = damaged(f"no {file.replace('/', ' ')}")
        (step / file).unlink()
        refuses(step, rf"incomplete: (it has no )?{file}( is missing)?")
        step = damaged(f"half {file.replace('/', ' ')}")
        content = (step / file).read_bytes()
        (step / file).write_bytes(content[: len(content) // 2])
        refuses(step, f"{file} is (cut short|damaged)")
        step = damaged(f"flipped {file.replace('/', ' ')}")
        flip_a_bit(step / file)
        refuses(step, "damaged|incomplete")
    step = damaged("flipped")
    flip_a_bit(step / "__1_0.distcp")
    refuses(step, "__1_0.distcp is damaged: its SHA-256 is")
    load_weights(step, model(1, 0), layout(), verify=False)  # as asked
    step = damaged("another pickle")
    (step / ".metadata").write_bytes(pickle.dumps([1, 2]))
    write_manifest(step, {})
    refuses(step, ".metadata is damaged")
    step = damaged("newer")
    meta = json.loads((step / "meta.json").read_text())
    (step / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    write_manifest(step, {})
    refuses(step, "format version 99")
    (step / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != "step"}))
    write_manifest(step, {})
    refuses(step, "damaged: no step")
    step = damaged("short")
    data = step / "__1_0.distcp"
    data.write_bytes(data.read_bytes()[:-1000])
    refuses(step, "__1_0.distcp is cut short")
    data.unlink()
    refuses(step, "__1_0.distcp is missing")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
