"""Whether a job goes on: what its starts have come to, and if another one is worth it.

    python -m sedd_scale.cluster.restarts begin LEDGER --progress RUN_DIR
    python -m sedd_scale.cluster.restarts end LEDGER --progress RUN_DIR --code 75

slurm/launch.sh calls both. The ledger is a file of one JSON line a start of the job and one an end;
a start that Slurm cut short, with its node for instance, has no end. `end` prints `requeue`, with
the nodes to leave out, or `stop`; reasons go to stderr.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd_scale.checkpoint.directory import newest_whole
from sedd_scale.cli import EXIT_USER_ERROR, add_command, given_path, make_parser, run_command
from sedd_scale.errors import CheckpointError, ConfigError
from sedd_scale.files.json_lines import read_json_lines
from sedd_scale.version import now

EXIT_BAD_NODES = 3
"""Exit code of the health check where it can name a bad node."""

# Seconds that Slurm's controller may be away for when a job asks how it stands. Whether the job is
# worth another start is known without it, and slurm/launch.sh waits longer to requeue it.
PATIENCE = 10.0


@dataclass(frozen=True)
class Verdict:
    """Whether the job is to be requeued, why, and which nodes it is to leave out."""

    requeue: bool
    reason: str
    exclude: tuple[str, ...] = ()


def progress_of(path: Path) -> int:
    """How far the work at `path` is: a number that grows.

    The step of the checkpoint that a run goes on from, or else the bytes of an output: a file, a
    directory, and the PATH.parts of an unfinished one.
    """
    if (path / "checkpoints").is_dir():
        try:
            return int(newest_whole(path)[1]["step"])
        except CheckpointError:  # none yet, or none that is whole: training says which
            return 0
    places = [path, path.with_name(path.name + ".parts")]
    files = [file for place in places for file in (place, *place.rglob("*")) if file.is_file()]
    if (path / "slurm").is_dir():  # a run directory before its first checkpoint
        return 0
    return sum(file.stat().st_size for file in files)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """The lines of a ledger; none where there is no file."""
    return list(read_json_lines(path))


def count_stalled(ledger: Sequence[dict[str, Any]], progress: int) -> int:
    """Starts in a row, up to the last, that brought nothing: `progress` is where things stand.

    Starts that ended at a bad node are passed over: they did not get to work.
    """
    fruitless = {line["restart"] for line in ledger if line["event"] == "end" and line["bad_nodes"]}
    starts = [
        line["progress"]
        for line in ledger
        if line["event"] == "begin" and line["restart"] not in fruitless
    ]
    stalled = 0
    for before, after in zip(reversed(starts), [progress, *reversed(starts)]):
        if after != before:
            break
        stalled += 1
    return stalled


def judge(
    ledger: Sequence[dict[str, Any]],
    *,
    progress: int,
    restarts: int,
    max_restarts: int,
    max_stalled: int,
) -> Verdict:
    """Whether one more start is allowed after `restarts` requeues."""
    if restarts >= max_restarts:
        return Verdict(False, f"{restarts} restarts are all that SEDD_MAX_RESTARTS allows")
    stalled = count_stalled(ledger, progress)
    if stalled >= max_stalled:
        return Verdict(
            False,
            f"no progress in {stalled} starts in a row (still at {progress}), which "
            "SEDD_MAX_STALLED takes for a fault that a restart does not mend",
        )
    bad = {node for line in ledger if line["event"] == "end" for node in line["bad_nodes"]}
    return Verdict(True, f"at {progress}", tuple(sorted(bad)))


def _judged(
    arguments: argparse.Namespace, ledger: list[dict[str, Any]], progress: int, restarts: int
) -> Verdict:
    most = {"max_restarts": arguments.max_restarts, "max_stalled": arguments.max_stalled}
    return judge(ledger, progress=progress, restarts=restarts, **most)


def begin_command(arguments: argparse.Namespace) -> int:
    """Note a start; EXIT_USER_ERROR where it is one too many."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    progress = progress_of(arguments.progress)
    ledger = read_ledger(arguments.ledger)
    if restarts:  # Slurm may have requeued the job by itself
        verdict = _judged(arguments, ledger, progress, restarts - 1)
        if not verdict.requeue:
            _say(f"not started again: {verdict.reason}")
            _note(arguments.ledger, "refused", progress=progress, reason=verdict.reason)
            return EXIT_USER_ERROR
        last = ledger[-1] if ledger else {"event": "end"}
        how = "" if last["event"] == "end" else ", cut short by Slurm"
        _say(f"goes on at {progress} after restart {restarts}{how}")
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    _note(arguments.ledger, "begin", progress=progress, nodes=nodes)
    return 0


def end_command(arguments: argparse.Namespace) -> None:
    """Note an end, and print whether to requeue."""
    progress, code = progress_of(arguments.progress), arguments.code
    bad_nodes = arguments.bad_nodes.split() if code == EXIT_BAD_NODES else []
    note = {"progress": progress, "code": code, "bad_nodes": bad_nodes}
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    job = job_fields(os.environ["SLURM_JOB_ID"], patience=PATIENCE)
    state = "RUNNING" if job is None else job.get("JobState", "unknown")
    job = job or {}
    if code == 0:
        verdict = Verdict(False, "finished")
    elif state != "RUNNING" and job.get("Reason") != "TimeLimit":
        # Cancelled, or requeued by Slurm: nothing to decide. A job that hit its limit can be
        # requeued still.
        verdict = Verdict(False, f"Slurm ends the job ({state})")
    elif code == EXIT_USER_ERROR:
        verdict = Verdict(False, "an error to mend: see above")
    else:
        ledger = [*read_ledger(arguments.ledger), {"event": "end", "restart": restarts, **note}]
        verdict = _judged(arguments, ledger, progress, restarts)
    word = "requeued" if verdict.requeue else "not requeued"
    without = f", without {' '.join(verdict.exclude)}" if verdict.exclude else ""
    _say(f"exit code {code}; {word}{without}: {verdict.reason}")
    _note(arguments.ledger, "end", reason=verdict.reason, requeued=verdict.requeue, **note)
    if not verdict.requeue:
        print("stop")
        return
    exclude = list(verdict.exclude)
    before = job.get("ExcNodeList", "(null)")
    if exclude and before != "(null)":
        exclude.append(before)
    print(" ".join(["requeue", ",".join(exclude)]).strip())


def job_fields(job: str, *, patience: float = 0.0) -> dict[str, str] | None:
    """What `scontrol show job` says of a job, by field; nothing where Slurm does not know it.

    None where Slurm does not answer. Of an array, of which the last task to start has the number
    of the whole, it lists all tasks, each on a line.

    Args:
        patience: seconds to ask again for, while Slurm does not answer.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            asked = subprocess.run(
                ["scontrol", "show", "job", "--oneliner", job],
                capture_output=True,
                text=True,
                timeout=max(5.0, patience),
            )
        except FileNotFoundError:
            return {}
        except subprocess.TimeoutExpired:
            asked = None
        if asked is not None and asked.returncode == 0:
            for line in asked.stdout.splitlines():
                pairs = (word.partition("=") for word in line.split())
                found = {name: value for name, equals, value in pairs if equals}
                if found.get("JobId") == job:
                    return found
            return {}
        if asked is not None and re.search("Invalid job id|configuration source", asked.stderr):
            return {}
        if time.monotonic() >= deadline:
            return None
        time.sleep(2.0)


def _say(line: str) -> None:
    print(f"restarts: {line}", file=sys.stderr, flush=True)


def _note(ledger: Path, event: str, **values: object) -> None:
    line = {
        "event": event,
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": now(),
        **values,
    }
    # A start that was cut short may have left a line without its end.
    content = ledger.read_bytes() if ledger.is_file() else b""
    with ledger.open("a") as file:
        file.write("\n" * (content[-1:] not in (b"", b"\n")) + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _command(arguments: argparse.Namespace) -> int:
    if "SLURM_JOB_ID" not in os.environ:
        raise ConfigError("SLURM_JOB_ID is not set: this is for job scripts, by slurm/launch.sh")
    return arguments.run(arguments) or 0


def main() -> int:
    """The command of slurm/launch.sh."""
    parser = make_parser(
        "python -m sedd_scale.cluster.restarts",
        "Note a start or an end of a Slurm job and say whether to requeue it.",
        "python -m sedd_scale.cluster.restarts begin runs/a/attempts-7.jsonl --progress runs/a",
    )
    actions = parser.add_subparsers(required=True, metavar="begin|end")
    for name, run, meaning in (
        ("begin", begin_command, "note a start, or refuse it"),
        ("end", end_command, "note an end, and say whether to requeue the job"),
    ):
        action = add_command(
            actions,
            name,
            help=meaning,
            example=f"python -m sedd_scale.cluster.restarts {name} runs/a/attempts-7.jsonl "
            "--progress runs/a",
        )
        action.set_defaults(run=run)
        action.add_argument("ledger", type=given_path)
        action.add_argument("--progress", type=given_path, required=True)
        action.add_argument("--max-restarts", type=int, default=20)
        action.add_argument("--max-stalled", type=int, default=3)
    action.add_argument("--code", type=int, default=0)
    action.add_argument("--bad-nodes", default="")
    return run_command(parser, _command)


if __name__ == "__main__":
    sys.exit(main())
