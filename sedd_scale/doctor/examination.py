"""All of the doctor's checks in order, reported one by one."""

import argparse
import json
import os
import sys
from collections.abc import Iterator

from sedd_scale.doctor.findings import BAD, Finding, print_finding, verdict
from sedd_scale.doctor.installation import (
    check_packages,
    check_python,
    check_slurm,
    check_wandb_key,
)
from sedd_scale.doctor.machine import (
    check_devices,
    check_disk,
    check_memory,
    try_all_reduce,
    try_training,
)

EXIT_NOT_READY = 1


def examine(*, trials: bool = True) -> Iterator[Finding]:
    """Look at this machine and installation; with `trials` also use them.

    Nothing is trained where a package that is needed does not import.
    """
    yield check_python()
    packages = check_packages()
    yield from packages
    yield check_wandb_key(os.environ)
    yield check_slurm()
    yield from check_disk()
    broken = {finding.name for finding in packages if finding.verdict == BAD}
    num_gpus = 0
    if "torch" not in broken:
        devices, num_gpus = check_devices()
        yield from devices
    yield from check_memory(num_gpus)
    if not trials:
        return
    if broken:
        detail = f"not tried without {', '.join(sorted(broken))}"
        yield Finding("training step", BAD, detail, "mend what is marked above")
        return
    yield try_all_reduce("gloo", 2)
    if num_gpus:
        yield try_all_reduce("nccl", min(2, num_gpus))
    yield try_training()


def doctor_command(arguments: argparse.Namespace) -> int:
    """Report; 0 where training works here, else 1."""
    findings = []
    stream = sys.stderr if arguments.json else sys.stdout
    for finding in examine(trials=not arguments.quick):
        findings.append(finding)
        print_finding(finding, stream)
    print(verdict(findings), file=stream)
    ready = all(finding.verdict != BAD for finding in findings)
    if arguments.json:
        print(json.dumps({"ready": ready, "findings": [item._asdict() for item in findings]}))
    return 0 if ready else EXIT_NOT_READY
