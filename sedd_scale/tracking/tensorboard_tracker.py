"""TensorBoard's event files, in the process of their own that `trackers` starts."""

from typing import Any


class TensorBoardTracker:
    """Writes numbers and samples below `RUN_DIR/tensorboard`.

    Args:
        folder: of the event files.
        resumed_step: step that the run resumes from; what was written of later ones is hidden.
        config: the resolved configuration as YAML.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, *, folder: str, resumed_step: int | None, config: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("pip install 'sedd_scale[tensorboard]'") from error

        first_step = None if resumed_step is None else resumed_step + 1
        self._writer: Any = SummaryWriter(folder, purge_step=first_step)
        if resumed_step is None:
            indented = "".join(f"    {line}\n" for line in config.splitlines())
            self._writer.add_text("config", indented, 0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one step's numbers: those of validations and of training apart."""
        for name, value in values.items():
            if value is not None:
                group = "validation" if name.startswith("valid") else "training"
                self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write samples as text, a card each."""
        for number, sample in enumerate(samples):
            lines = [f"    {line}" for line in str(sample.get("text", sample)).splitlines()]
            self._writer.add_text(f"samples/{number}", "\n".join(lines), step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()
