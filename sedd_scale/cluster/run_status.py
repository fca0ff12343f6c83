"""How a run on a cluster stands: its job, how far it is, what it measured last, what is left."""

import subprocess
from pathlib import Path
from typing import Any

from sedd_scale.cluster.restarts import job_fields, progress_of, read_ledger
from sedd_scale.cluster.submission import submitted_jobs
from sedd_scale.errors import ConfigError
from sedd_scale.files.json_lines import read_json_lines
from sedd_scale.quantities import format_duration


def newest_job(run_dir: Path) -> str | None:
    """The run's last job, however it was submitted."""
    ledgers = (run_dir / "slurm").glob("attempts-*.jsonl")
    jobs = [*(path.stem.removeprefix("attempts-") for path in ledgers), *submitted_jobs(run_dir)]
    return max((job for job in jobs if job.isdecimal()), key=int, default=None)


def run_status(run_dir: Path) -> dict[str, Any]:
    """What is known of a run, by name; None where it is not known (yet).

    Raises:
        ConfigError: there is no such run.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"there is no run directory {run_dir}")
    job = newest_job(run_dir)
    if job is None:
        raise ConfigError(f"{run_dir} was never submitted: use `sedd-scale submit` or sbatch")
    ledger = read_ledger(run_dir / "slurm" / f"attempts-{job}.jsonl")
    asked = job_fields(job) or {}
    restarts = max((line["restart"] for line in ledger), default=0)
    training, validation = last_metrics(run_dir / "metrics.jsonl")
    steps = total_steps(run_dir)
    step = None if training is None else training["step"]
    seconds_left = None
    if training is not None and steps is not None:
        seconds_left = max(0, steps - training["step"]) * training["step_ms"] / 1000
    last = ledger[-1] if ledger else {}
    return {
        "run": str(run_dir),
        "job": job,
        "state": state_of(asked, last),
        "reason": last.get("reason") or _known(asked.get("Reason")),
        "nodes": _known(asked.get("NodeList")),
        "excluded": _known(asked.get("ExcNodeList")),
        "restarts": int(asked.get("Restarts", restarts)),
        "step": step,
        "steps": steps,
        "saved_step": progress_of(run_dir),
        "training": training,
        "validation": validation,
        "seconds_left": seconds_left,
        "limit_left": limit_left(job) if asked.get("JobState") == "RUNNING" else None,
    }


def state_of(asked: dict[str, str], last: dict[str, Any]) -> str:
    """The job's state in Slurm, or what its last start came to where Slurm has forgotten it."""
    if "JobState" in asked:
        return asked["JobState"]
    if last.get("event") == "end":
        return "COMPLETED" if last["code"] == 0 else "ENDED"
    return "UNKNOWN"


def last_metrics(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The last lines of training and of validation."""
    training = validation = None
    for line in read_json_lines(path):
        if "loss" in line:
            training = line
        elif "valid_nats_per_token" in line:
            validation = line
    return training, validation


def total_steps(run_dir: Path) -> int | None:
    """Steps of the whole run, as configured."""
    from sedd_scale.config import load_config

    path = run_dir / "config.yaml"
    try:
        return load_config(path).training.steps if path.exists() else None
    except ConfigError:  # cut short; the next start writes it anew
        return None


def limit_left(job: str) -> str | None:
    """Time until the job's limit, as Slurm writes it."""
    asked = subprocess.run(
        ["squeue", "-h", "-j", job, "-o", "%L"], capture_output=True, text=True, timeout=60
    )
    return asked.stdout.strip() or None


def format_status(status: dict[str, Any]) -> str:
    """The status for people."""
    rows = [
        ("run", status["run"]),
        ("job", f"{status['job']}, {status['state']}"),
        ("reason", status["reason"]),
        ("nodes", status["nodes"]),
        ("left out", status["excluded"]),
        ("restarts", str(status["restarts"])),
    ]
    training, validation = status["training"], status["validation"]
    if training is not None:
        of = "" if status["steps"] is None else f" of {status['steps']:,}"
        rows.append(("step", f"{training['step']:,}{of}, saved at {status['saved_step']:,}"))
        rows.append(
            (
                "training",
                f"loss {training['loss']:.3f} nats/token, "
                f"{training['tokens_per_second']:,.0f} tokens/s, {training['step_ms']:.0f} ms/step",
            )
        )
    if validation is not None:
        rows.append(
            (
                "validation",
                f"{validation['valid_nats_per_token']:.3f} nats/token at step "
                f"{validation['step']:,}",
            )
        )
    if status["seconds_left"] is not None:
        rows.append(("work left", format_duration(status["seconds_left"])))
    if status["limit_left"] is not None:
        rows.append(("until limit", status["limit_left"]))
    return "\n".join(f"{name:12}{text}" for name, text in rows if text)


def _known(value: str | None) -> str | None:
    return None if value in (None, "(null)", "None", "") else value
