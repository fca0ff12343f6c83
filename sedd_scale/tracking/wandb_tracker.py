"""A run of Weights & Biases, in the process of its own that `trackers` starts."""

import contextlib
import tarfile
from pathlib import Path
from typing import Any

from sedd_scale.files.package import PACKAGE, own_files

STEP = "step"
"""The axis of all numbers: wandb's own counts what it is sent, and goes back to no earlier step."""
SECONDS_TO_ANSWER = 60.0
"""For the service, at the start of a run."""
CODE_SUFFIXES = (".py", ".yaml", ".sh")
CODE_ARCHIVE = "code.tar.gz"


class WandbTracker:
    """Sends numbers, samples, the configuration and the code; system metrics go by themselves.

    Args:
        project, name, run_id: of the run; online, one that was begun before goes on under its id.
        group: of the run's segments, offline; None for none.
        watched_pid: the process whose memory and CPU are to be reported.
        save_code: whether to keep a copy of the program that ran, CODE_ARCHIVE among its files.

    Raises:
        RuntimeError: online without an API key.
    """

    def __init__(
        self,
        *,
        run_dir: str,
        mode: str,
        project: str,
        name: str,
        run_id: str,
        group: str | None,
        config: dict[str, Any],
        watched_pid: int | None = None,
        save_code: bool = True,
    ) -> None:
        import wandb

        online = mode == "online"
        # `init` would ask for a missing key on the terminal, and wait.
        if online and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; run `wandb login` or set WANDB_API_KEY")
        settings: dict[str, Any] = {
            "init_timeout": SECONDS_TO_ANSWER,
            "silent": True,
            "console": "off",
            "disable_git": True,
        }
        if watched_pid is not None:
            settings["x_stats_pid"] = watched_pid
        self._table = wandb.Table
        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            group=group,
            resume="allow" if online else None,
            dir=run_dir,
            config=config,
            mode="online" if online else "offline",
            settings=wandb.Settings(**settings),
        )
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        # A value with nothing else stands for its best, or its last.
        for metric, summary in (("valid_nats_per_token", "min"), ("tokens_per_second", "mean")):
            self._run.define_metric(metric, summary=summary, step_metric=STEP)
        if save_code:
            self._save_code()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Send one step's numbers."""
        known = {name: value for name, value in values.items() if value is not None}
        self._run.log({STEP: step, **known})

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Send samples as the table `samples`, a row each; `step` is a column of it."""
        columns = list(dict.fromkeys(name for sample in samples for name in sample))
        rows = [[step, *(sample.get(name) for name in columns)] for sample in samples]
        table = self._table(columns=[STEP, *columns], data=rows)
        self._run.log({STEP: step, "samples": table})

    def close(self) -> None:
        """Send what is not yet sent."""
        self._run.finish()

    def _save_code(self) -> None:
        """Keep the program as one file of the run, which needs no more of the service."""
        archive = Path(self._run.dir) / CODE_ARCHIVE
        with tarfile.open(archive, "w:gz") as code:
            for path in own_files(*CODE_SUFFIXES):
                with contextlib.suppress(FileNotFoundError):  # it went away meanwhile
                    code.add(path, str(path.relative_to(PACKAGE.parent)))
        self._run.save(str(archive), base_path=self._run.dir, policy="now")
