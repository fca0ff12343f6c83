"""The machine: GPUs, memory and disk; and the trials that need all of it together."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sedd_scale.cluster.node_checks import MIN_FREE_SHARE, available_memory
from sedd_scale.doctor.findings import BAD, GOOD, NOTICE, OPTIONAL, Finding
from sedd_scale.doctor.processes import run_trial, run_trials
from sedd_scale.files.compiler import compiler_fault

GB = 1e9
LOW_DISK_GB, LOW_MEMORY_GB, LOW_SHARED_GB = 5.0, 2.0, 1.0


def check_devices() -> tuple[list[Finding], int]:
    """CUDA, NCCL and gloo, and the number of GPUs."""
    output, error = run_trial("devices")
    if not output:
        return [Finding("CUDA", BAD, f"torch cannot be asked: it {error}")], 0
    found = json.loads(output[-1])
    num_gpus = len(found["names"])
    compiler = judge_compiler(compiler_fault(), on_gpu=num_gpus > 0)
    return [judge_cuda(found), judge_nccl(found), judge_gloo(found), compiler], num_gpus


def judge_cuda(found: dict[str, Any]) -> Finding:
    """What to say of the GPUs."""
    if found["built_for"] is None:
        fix = None
        if shutil.which("nvidia-smi") is not None:
            fix = "rm -rf .venv && make setup TORCH_INDEX="
        return Finding(
            "CUDA",
            OPTIONAL if fix is None else NOTICE,
            f"torch is a CPU build; training uses {found['threads']} threads of the CPU",
            fix,
        )
    build = f"torch is built for CUDA {found['built_for']}"
    if not found["names"]:
        return Finding(
            "CUDA",
            NOTICE,
            f"{build}, but sees no GPU",
            "nvidia-smi has to list one: a newer driver, or CUDA_VISIBLE_DEVICES",
        )
    names = found["names"]
    detail = f"{build}; {len(names)} x {names[0]}, {found['memory_gb']:.0f} GB"
    if "device_error" in found:
        return Finding("CUDA", BAD, f"{detail}: {found['device_error']}", "see nvidia-smi")
    if found["device_free_share"] < MIN_FREE_SHARE:
        return Finding(
            "CUDA",
            NOTICE,
            f"{detail}; only {found['device_free_share']:.0%} of its memory is free",
            "nvidia-smi names the process that holds the rest",
        )
    if not found["bf16"]:
        return Finding("CUDA", NOTICE, f"{detail}, without bf16", "training.precision=fp32")
    return Finding("CUDA", GOOD, detail)


def judge_compiler(fault: str | None, *, on_gpu: bool) -> Finding:
    """What to say of the compiler that Triton's kernels need where they first run."""
    if fault is None:
        return Finding("compiler", GOOD, "a C compiler and the headers of this Python")
    return Finding("compiler", BAD if on_gpu else OPTIONAL, f"for kernels on a GPU: {fault}")


def judge_nccl(found: dict[str, Any]) -> Finding:
    """What to say of NCCL, which GPUs talk through."""
    if found["has_nccl"]:
        return Finding("NCCL", GOOD, found["nccl"] or "built in; there is no GPU to use it")
    if found["names"]:
        return Finding("NCCL", BAD, "this torch has none", "a CUDA build of torch: make setup")
    return Finding("NCCL", OPTIONAL, "not in a CPU build of torch; gloo serves the CPU")


def judge_gloo(found: dict[str, Any]) -> Finding:
    """What to say of gloo, which the CPU's processes talk through."""
    if found["has_gloo"]:
        return Finding("gloo", GOOD, "built in")
    return Finding("gloo", BAD, "this torch has none", "one of the releases on PyPI: make setup")


def check_memory(num_gpus: int) -> list[Finding]:
    """Main memory, and what of it processes may share."""
    available = available_memory() / GB
    findings = []
    if available < LOW_MEMORY_GB:
        fix = "end other programs; smaller training.micro_batch or model"
        findings.append(Finding("memory", NOTICE, f"only {available:.1f} GB available", fix))
    else:
        findings.append(Finding("memory", GOOD, f"{available:.1f} GB available"))
    shared = Path("/dev/shm")
    if num_gpus > 1 and shared.is_dir():
        size = shutil.disk_usage(shared).total / GB
        if size < LOW_SHARED_GB:
            fix = "docker run --shm-size=8g, or --ipc=host"
            detail = f"/dev/shm has {size:.2f} GB, too little for NCCL within a node"
            findings.append(Finding("shared memory", NOTICE, detail, fix))
    return findings


def check_disk() -> list[Finding]:
    """Free space where the command was started, and for temporary files."""
    findings = []
    folders = {"disk": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    for name, folder in folders.items():
        free = shutil.disk_usage(folder).free / GB
        detail = f"{free:.1f} GB free in {folder}"
        if free < LOW_DISK_GB:
            fix = "remove old checkpoints (checkpoint.keep), or use another disk"
            if name == "temporary files":
                fix = "export TMPDIR=DIR of a larger disk"
            findings.append(Finding(name, NOTICE, detail, fix))
        else:
            findings.append(Finding(name, GOOD, detail))
    return findings


def try_all_reduce(backend: str, num_processes: int) -> Finding:
    """Sum numbers over real processes."""
    name = f"{backend} all-reduce"
    with tempfile.TemporaryDirectory(prefix="sedd-doctor-") as folder:
        meeting = str(Path(folder) / "meeting")
        trials = [
            ["all_reduce", backend, str(rank), str(num_processes), meeting]
            for rank in range(num_processes)
        ]
        results = run_trials(trials)
    errors = [error for _, error in results if error is not None]
    many = f"{num_processes} processes" if num_processes > 1 else "1 process, as there is 1 GPU"
    if errors:
        variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        fix = f"export {variable}=lo (or the device that `ip route` names), and see NCCL_DEBUG=INFO"
        if backend == "gloo":
            fix = f"export {variable}=lo (or the device that `ip route` names)"
        return Finding(name, BAD, f"{many}: one {errors[0]}", fix)
    said = json.loads(results[0][0][-1])
    return Finding(
        name, GOOD, f"{many}: {said['megabytes']:.1f} MB in {1000 * said['seconds']:.1f} ms"
    )


def try_training() -> Finding:
    """One step of a small run: data, corruption, step, validation, checkpoint."""
    with tempfile.TemporaryDirectory(prefix="sedd-doctor-") as folder:
        output, error = run_trial("train", folder)
    if error is not None:
        return Finding(
            "training step",
            BAD,
            error,
            "mend what is marked above; if all else is well, this is a fault of sedd_scale",
        )
    said = json.loads(output[-1])
    return Finding(
        "training step",
        GOOD,
        f"on the {said['device']} in {said['precision']}: loss {said['loss']:.2f}, validation "
        f"{said['bound']:.2f} nats/token, {said['checkpoint']} saved",
    )
