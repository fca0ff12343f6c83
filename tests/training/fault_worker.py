"""Bad steps, flipped bits, failing and slow saves, replays and a hang, in two real processes.

    torchrun --nproc-per-node 2 fault_worker.py FOLDER DATASET

One launch for all of them, since its imports cost more than they do. What each rank finds goes to
FOLDER/found-RANK.json. The last case hangs, so that the launch ends with the watchdog's exit code.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.")

import torch  # noqa: E402

from sedd_scale.benchmark.synthetic import SyntheticRun, synthetic_config  # noqa: E402
from sedd_scale.checkpoint import fault_points  # noqa: E402
from sedd_scale.config import Config, load_config  # noqa: E402
from sedd_scale.config.sections import TrainingConfig  # noqa: E402
from sedd_scale.engine.engine import Engine, MicroBatch  # noqa: E402
from sedd_scale.errors import CheckpointError, TrainingError  # noqa: E402
from sedd_scale.parallel.layout import Layout, initialize_layout, leave_layout  # noqa: E402
from sedd_scale.planning.model_states import update_rule  # noqa: E402
from sedd_scale.training.bad_steps import BadSteps  # noqa: E402
from sedd_scale.training.guards import StepGuard  # noqa: E402
from sedd_scale.training.loop import train  # noqa: E402
from sedd_scale.training.replay import replay  # noqa: E402
from sedd_scale.training.replicas import check_replicas  # noqa: E402
from tests.training.waits import Waits  # noqa: E402

# Of a matrix that is large enough for ZeRO 3 to spread it.
WIDE = "model.hidden_size=192"
FP32, BF16 = "training.precision=fp32", "training.precision=bf16"
TENSOR, PIPELINE = "parallel.tensor=2", "parallel.pipeline=2"
MUON = "optimizer.name=muon"
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ZeRO 1": (FP32,),
    "ZeRO 1 bf16, Muon": (BF16, MUON),
    "ZeRO 2": (FP32, "parallel.zero_stage=2"),
    "ZeRO 2 bf16": (BF16, "parallel.zero_stage=2"),
    "ZeRO 3, Muon": (FP32, "parallel.zero_stage=3", WIDE, MUON),
    "ZeRO 3 bf16": (BF16, "parallel.zero_stage=3", WIDE),
    "TP2, Muon": (FP32, TENSOR, MUON),
    "PP2": (FP32, PIPELINE),
    "PP2 bf16": (BF16, PIPELINE),
}
# A matrix, that ZeRO 3 spreads and TP splits, and a vector, that both leave whole.
MATRIX, VECTOR = "blocks.1.mlp.linear_fc1.weight", "blocks.1.norm2.weight"


def bits(engine: Engine) -> dict[str, str]:
    """Hashes of everything that this rank holds: working weights, masters, moments, averages."""
    tensors = {}
    for logical in engine.parameters:
        if logical.parameter.numel():
            tensors[f"{logical.name} weight"] = logical.parameter
        for index, copy in enumerate(reversed(engine.fragments.working_copies(logical))):
            tensors[f"{logical.name} copy {index}"] = copy
        for key in engine.fragments.state_keys(logical):
            fragment = engine.fragments.get(logical, key)
            if fragment is not None:
                tensors[f"{logical.name} {key}"] = fragment.flat
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy()).hexdigest()
        for name, tensor in tensors.items()
    }


def with_a_nan(batches: list[MicroBatch]) -> list[MicroBatch]:
    """The batch with one time that is not a number."""
    sigma_B = batches[-1].inputs[1].clone()
    sigma_B[-1] = math.nan
    noisy_BL, _, context_BK = batches[-1].inputs
    return [*batches[:-1], batches[-1]._replace(inputs=(noisy_BL, sigma_B, context_BK))]


def bad_step(run: SyntheticRun, engine: Engine, layout: Layout, folder: Path) -> dict[str, Any]:
    """Two good steps, one that is not finite because of one rank's data, and a good one."""
    guard = StepGuard(TrainingConfig(on_nonfinite="skip"))
    folder.mkdir(exist_ok=True)
    bad_steps = BadSteps(folder, run.config, layout, fingerprint="f" * 8, resumed_step=0)
    results, states, lines = [], [], []
    waits = Waits(engine)
    for step in range(1, 5):
        batches = run.micro_batches(step)
        # Its own data-parallel part is bad; ranks that share a part share the bad time.
        if step == 3 and layout.data_rank == layout.data - 1:
            batches = with_a_nan(batches)
        with waits if step == 4 else contextlib.nullcontext():
            waits.events.clear()
            result = guard.train_step(engine, step, batches, lr=1e-3)
        if guard.verdict.cause is not None:
            lines.append(
                bad_steps.record(step, result.numbers, guard.verdict, batches, action="skipped")
            )
        results.append([result.numbers.loss, result.numbers.grad_norm, result.applied])
        states.append(bits(engine))
    return {
        "applied": [applied for _, _, applied in results],
        "finite": [math.isfinite(loss) and math.isfinite(norm) for loss, norm, _ in results],
        "skipped": guard.skipped,
        "optimizer_step": engine.fragments.get_step(),
        # After a step that is left out ZeRO 3 has yet to gather again what it keeps whole.
        "changed": [name for name, was in states[1].items() if states[2].get(name, was) != was],
        "changed_by_good_ones": states[0] != states[1] and states[2] != states[3],
        "lines": lines,
        "events": waits.events,
    }


def flipped(engine: Engine, layout: Layout, name: str, key: str) -> str:
    """What the check says when rank 1 holds one flipped bit in a parameter, if it has a part."""
    logical = next((p for p in engine.parameters if p.name == name), None)
    target = None
    if layout.rank == 1 and logical is not None:
        fragment = engine.fragments.get(logical, key) if key != "weight" else None
        if fragment is not None:
            target = fragment.flat
        elif key == "weight" and logical.parameter.numel():
            target = logical.parameter.detach().view(-1)
        elif key == "weight":  # spread by ZeRO 3
            (target,) = engine.fragments.working_copies(logical)
    flip_the_lowest_bit(target)
    try:
        check_replicas(7, engine.fragments)
    except TrainingError as error:
        message = str(error)
    else:
        message = "nothing"
    flip_the_lowest_bit(target)
    check_replicas(8, engine.fragments)
    return message


def flip_the_lowest_bit(tensor: torch.Tensor | None) -> None:
    """Of a tensor's last number; twice changes nothing."""
    if tensor is not None:
        tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])[-1] ^= 1


def of_layout(name: str, folder: Path) -> dict[str, Any]:
    """A bad step and flipped bits under one layout."""
    arguments = Namespace(
        model="tiny",
        vocab_size=50,
        batch_size=2,
        block_length=16,
        accumulate=2,
        overrides=list(LAYOUTS[name]),
    )
    config = synthetic_config(arguments, "model.num_layers=2", world_size=2)
    parallel = config.parallel
    layout = initialize_layout(tensor=parallel.tensor, pipeline=parallel.pipeline)
    run = SyntheticRun(config, layout)
    engine = run.engine()
    found = bad_step(run, engine, layout, folder / name)
    moment, *_ = update_rule(config.optimizer.name, MATRIX).moments
    flips = [(MATRIX, "weight"), (VECTOR, "weight"), (MATRIX, moment)]
    if parallel.tensor > 1:
        flips.append((VECTOR, "exp_avg"))
    found["flips"] = {
        f"{parameter} {key}": flipped(engine, layout, parameter, key) for parameter, key in flips
    }
    leave_layout()
    return found


@contextlib.contextmanager
def fault(point: str, handler: Callable[[], None], *, rank: int | None = None) -> Iterator[None]:
    """Within, `handler` is called at a point of every save, on one rank or on all."""
    if rank is None or os.environ["RANK"] == str(rank):
        fault_points.at(point, handler)
    try:
        yield
    finally:
        fault_points._handlers.clear()


class FailsTheSecondTime:
    """A full disk that is mended afterwards."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")


def text_of(path: Path) -> str:
    """A file's only line; nothing where it is not there."""
    return path.read_text().strip() if path.exists() else ""


def trained(config: Config, run_dir: Path) -> dict[str, Any]:
    """Train; what was said, what is there, and how it ended."""
    out, err, ended = io.StringIO(), io.StringIO(), "finished"
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train(config, run_dir)
        except (CheckpointError, TrainingError) as error:
            ended = str(error)
    leave_layout()
    torch.distributed.barrier()
    checkpoints = run_dir / "checkpoints"
    return {
        "ended": ended,
        "said": out.getvalue() + err.getvalue(),
        "checkpoints": sorted(path.name for path in checkpoints.glob("step-*")),
        "latest": (checkpoints / "latest").read_text().strip(),
    }


def replayed(config: Config, run_dir: Path, step: int) -> list[str]:
    """The report of a replay, after which the run directory is what it was."""

    def listing() -> dict[str, tuple[int, int]]:
        stats = {str(path): path.stat() for path in run_dir.rglob("*")}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    before = listing()
    lines = list(replay(config, run_dir, step))
    leave_layout()
    torch.distributed.barrier()
    assert listing() == before, "a replay wrote into the run"
    return lines


def main() -> None:
    folder, dataset = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: of_layout(name, folder) for name in LAYOUTS}
    overrides = (folder / "overrides").read_text().split()

    def config(*more: str) -> Config:
        tiny = Path(__file__).resolve().parents[2] / "configs/runs/tiny.yaml"
        return load_config(tiny, [*overrides, f"data.path={dataset}", *more])

    found["undisturbed"] = trained(config(), folder / "undisturbed")

    short = ("training.steps=9", "checkpoint.every=4")
    run_dir = folder / "failing"
    latest: list[str] = []
    with fault("data written", FailsTheSecondTime(), rank=1):
        named = run_dir / "checkpoints/latest"
        with fault("before data", lambda: latest.append(text_of(named)), rank=0):
            found["failed save"] = trained(
                config(*short, "checkpoint.on_failure=continue"), run_dir
            )
    found["latest while failing"] = latest
    with fault("data written", FailsTheSecondTime(), rank=1):
        found["failed save stops"] = trained(config(*short), folder / "failing and stopping")

    with fault("before data", lambda: time.sleep(0.4), rank=1):
        found["slow saves"] = trained(
            config("training.steps=4", "checkpoint.every=1", "checkpoint.keep=0"), folder / "slow"
        )

    if os.environ["RANK"] == "0":
        damaged = run_dir / "checkpoints/step-9/__1_0.distcp"
        damaged.write_bytes(damaged.read_bytes()[:-100])
    torch.distributed.barrier()
    found["after damage"] = trained(config("training.steps=12", "checkpoint.every=20"), run_dir)

    spikes = config(
        *("training.steps=60", "training.skip_spikes_above=0.5", "training.stop_after_skips=2"),
        *("checkpoint.every=5", "training.spike_window=8"),
    )
    found["spikes"] = trained(spikes, folder / "spikes")
    records = [json.loads(line) for line in (folder / "spikes/bad_steps.jsonl").open()]
    found["spike records"] = records
    found["spike replayed"] = replayed(spikes, folder / "spikes", records[-1]["step"])
    wild = config("training.steps=9", "optimizer.lr=1e30", "checkpoint.every=1")
    found["wild"] = trained(wild, folder / "wild")
    records = [json.loads(line) for line in (folder / "wild/bad_steps.jsonl").open()]
    found["wild records"] = records
    found["wild replayed"] = replayed(wild, folder / "wild", records[-1]["step"])

    rank = os.environ["RANK"]
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    # Rank 1's part of a save never ends: both ranks wait for it, and neither has an error.
    with fault("before data", lambda: time.sleep(600), rank=1):
        limits = ("training.hang_floor=2", "training.hang_slow=3")
        hanging = config("checkpoint.async_save=false", *limits, *short)
        train(hanging, folder / "hanging")


if __name__ == "__main__":
    main()
