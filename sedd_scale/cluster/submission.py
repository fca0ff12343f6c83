"""One submission of a run: its code and configuration, kept in the run directory, and its job file.

    RUN_DIR/submissions/N/code/         the package with its configurations, as it was
    RUN_DIR/submissions/N/config.yaml   the resolved configuration
    RUN_DIR/submissions/N/version.txt   the commit, and whether files differed from it
    RUN_DIR/submissions/N/job.sbatch    what was submitted; submit it by hand to start again
    RUN_DIR/submissions/N/job           the job's number

A job that waits or comes back runs the code that it was submitted with, whatever happens to the
repository meanwhile.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sedd_scale.cluster.job_size import JobSize
from sedd_scale.cluster.restarts import job_fields
from sedd_scale.config import Config
from sedd_scale.errors import ConfigError
from sedd_scale.files.package import PACKAGE, checkout
from sedd_scale.version import __version__

# In a checkout, what a submission depends on.
CODE = ("sedd_scale", "configs", "slurm")
GOING_ON = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
# Before the end of a start: time to save.
SIGNAL_SECONDS = 300


def render(
    folder: Path,
    run_dir: Path,
    size: JobSize,
    *,
    name: str,
    python: str,
    cpus_per_task: int,
    on_cpu: bool,
    launcher: str,
    directives: Sequence[str] = (),
    working_directory: Path,
) -> str:
    """The text of a job file for `folder`, a submission of `run_dir`.

    Args:
        name: of the job.
        directives: more flags of sbatch, such as --account=NAME.
        working_directory: what relative paths of the configuration mean.
    """
    hours, minutes = divmod(size.seconds // 60, 60)
    grace = min(SIGNAL_SECONDS, size.seconds // 4)
    flags = [
        f"--job-name={name}",
        f"--nodes={size.nodes}",
        f"--ntasks-per-node={size.tasks_per_node}",
        *([] if on_cpu else [f"--gpus-per-node={size.tasks_per_node}"]),
        f"--cpus-per-task={cpus_per_task}",
        f"--mem={size.memory_gb}G",
        f"--time={hours}:{minutes:02}:00",
        f"--signal=USR1@{grace}",
        "--requeue",
        "--open-mode=append",
        f"--output={run_dir}/slurm/%j.log",
        f"--chdir={working_directory}",
        *directives,
    ]
    lines = [
        "#!/usr/bin/env bash",
        f"# {size.tasks} process{'es' * (size.tasks > 1)}; about {size.run_seconds / 3600:.1f} "
        f"hours in all, in {size.starts} start{'s' * (size.starts > 1)}.",
        *(f"#SBATCH {flag}" for flag in flags),
        "set -euo pipefail",
        f"export SEDD_HOME={shlex.quote(str(folder / 'code'))}",
        f"export SEDD_PYTHON=${{SEDD_PYTHON:-{shlex.quote(python)}}}",
        f"export SEDD_LAUNCHER=${{SEDD_LAUNCHER:-{launcher}}}",
        f"export SEDD_MAX_RESTARTS=${{SEDD_MAX_RESTARTS:-{max(20, 3 * size.starts)}}}",
        "# shellcheck source=slurm/launch.sh",
        '. "$SEDD_HOME/sedd_scale/slurm/launch.sh"',
        f"run_dir={shlex.quote(str(run_dir))}",
        'sedd_job "$run_dir/slurm" "$run_dir" train '
        f'{shlex.quote(str(folder / "config.yaml"))} --run-dir "$run_dir" "$@"',
    ]
    return "\n".join(lines) + "\n"


def snapshot(folder: Path, config: Config) -> None:
    """Copy the code and write the configuration into `folder`, which it makes."""
    folder.mkdir(parents=True)
    shutil.copytree(
        PACKAGE,
        folder / "code" / PACKAGE.name,
        ignore=shutil.ignore_patterns("__pycache__", "*.pyc"),
    )
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "version.txt").write_text(version_of(checkout()))


def version_of(repository: Path | None) -> str:
    """The commit of a git checkout and the files that differ from it; None: the version."""
    if repository is None:
        return f"sedd_scale {__version__}, installed\n"
    try:
        head, changed = (
            subprocess.run(
                ["git", "-C", str(repository), *words], capture_output=True, text=True, check=True
            ).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--short", "--", *CODE])
        )
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout\n"
    return head + (changed or "no changes\n")


def next_folder(run_dir: Path) -> Path:
    """Where the run's next submission goes."""
    numbers = [int(path.name) for path in (run_dir / "submissions").glob("[0-9]*")]
    return run_dir / "submissions" / str(max(numbers, default=0) + 1)


def submitted_jobs(run_dir: Path) -> list[str]:
    """Numbers of the run's jobs, oldest first."""
    files = sorted(
        (run_dir / "submissions").glob("[0-9]*/job"), key=lambda file: int(file.parent.name)
    )
    return [job for file in files if (job := file.read_text().strip()).isdecimal()]


def refuse_second_job(run_dir: Path) -> None:
    """Raise ConfigError where a job of this run waits or works: two would spoil the run."""
    for job in submitted_jobs(run_dir):
        state = (job_fields(job) or {}).get("JobState", "")
        if state in GOING_ON:
            raise ConfigError(f"{run_dir} has job {job} already ({state}): `scancel {job}` first")


def submit(job_file: Path) -> str:
    """Hand the job file to sbatch; the job's number.

    Raises:
        ConfigError: there is no sbatch, or it refuses, with its words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(job_file)], capture_output=True, text=True, timeout=120
        )
    except FileNotFoundError as error:
        raise ConfigError(
            "there is no sbatch on this machine: submit from one that has it, or use --dry-run"
        ) from error
    if done.returncode:
        raise ConfigError(f"sbatch refuses {job_file}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    (job_file.parent / "job").write_text(f"{job}\n")
    return job
