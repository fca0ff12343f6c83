"""What a run says on a terminal, without a run: each line of the input makes ten more steps."""

import sys
from pathlib import Path

from sedd_scale.tracking.console import open_console

STEPS = 1000


def main() -> None:
    console = open_console(
        sys.stdout,
        title=Path(sys.argv[1]).name,
        total_steps=STEPS,
        first_step=0,
        peak="measured peak",
        live=True,
    )
    console.say("begun")
    for number, line in enumerate(sys.stdin, start=1):
        step = 10 * number
        console.advance(step)
        values = {
            "loss": 8.0 - number / 4,
            "loss_z": -0.5 if number % 2 else 4.6,
            "grad_norm": 0.93,
            "grad_norm_z": 2.5,
            "lr": 3e-4,
            "tokens": 1000.0 * number,
            "tokens_per_second": 12_345.0,
            "step_ms": 162.0,
            "mfu": 0.385,
            "memory_bytes": 1.25e9,
        }
        console.training(step, values)
        if line.startswith("validate"):
            console.validation(step, 4.6522, 0.0137)
        if line.startswith("save"):
            console.saved(step)
            print("a warning of somebody", file=sys.stderr)
    console.close()
    print("left")


if __name__ == "__main__":
    main()
