"""The packages: what setup.py asks for, what is installed, whether it imports."""

import importlib.metadata
import json
import netrc
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping

from packaging.requirements import Requirement

from sedd_scale.doctor.findings import BAD, GOOD, NOTICE, OPTIONAL, Finding
from sedd_scale.doctor.processes import run_trial
from sedd_scale.files.package import PACKAGE, checkout
from sedd_scale.version import TESTED

OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 12)

# Modules of the packages that are named otherwise.
MODULES = {
    "megatron-core": "megatron.core",
    "pyyaml": "yaml",
    "flash-attn": "flash_attn",
}
# What extras are for; the first of these packages is looked at.
EXTRAS = {
    "flash": ("flash-attn", "faster attention on NVIDIA GPUs"),
    "tensorboard": ("tensorboard", "logging.tensorboard=true"),
    "parquet": ("pyarrow", "text in .parquet files"),
    "zstd": ("zstandard", "text in .zst files"),
    "hf": ("tokenizers", "tokenizers and models of Hugging Face"),
    "remote": ("fsspec", "data on S3 and the like"),
    "judge": ("transformers", "generative perplexity by another model"),
    "hub": ("huggingface_hub", "benchmarks by name"),
    "harness": ("lm_eval", "tasks of lm-evaluation-harness"),
}


def check_python() -> Finding:
    """The interpreter."""
    version = sys.version_info
    detail = f"{version.major}.{version.minor}.{version.micro} at {sys.executable}"
    if OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        return Finding("Python", GOOD, detail)
    return Finding(
        "Python", BAD, f"{detail}: 3.10, 3.11 or 3.12 is needed", "make setup PYTHON=python3.12"
    )


def requirements() -> dict[str, Requirement] | None:
    """What is required, by package; None: this program is not installed."""
    try:
        lines = importlib.metadata.requires("sedd_scale") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found[requirement.name.lower()] = requirement
    return found


def check_packages() -> list[Finding]:
    """The package itself, everything it requires, its extras and Triton."""
    needed = requirements()
    if needed is None:
        return [
            Finding(
                "sedd_scale",
                BAD,
                f"{PACKAGE} is not installed, so nobody knows what it requires",
                pip(f"-e {checkout() or PACKAGE.parent}"),
            )
        ]
    extras = {package: (extra, use) for extra, (package, use) in EXTRAS.items()}
    names = [*needed, *extras, "triton"]
    versions = {name: installed_version(name) for name in names}
    failures = import_failures(name for name in names if versions[name] is not None)
    findings = []
    for name, requirement in needed.items():
        findings.append(judge_required(requirement, versions[name], failures.get(name)))
    for name, (extra, use) in extras.items():
        findings.append(judge_optional(name, extra, use, versions[name], failures.get(name)))
    findings.append(judge_triton(versions["triton"], failures.get("triton")))
    return findings


def pip(what: str) -> str:
    """The command that installs into this interpreter."""
    return f"{sys.executable} -m pip install {what}"


def installed_version(name: str) -> str | None:
    """The version of an installed package, without what it was built for; None: not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def import_failures(names: Iterable[str]) -> dict[str, str]:
    """Why packages do not import, for those that do not."""
    packages = {MODULES.get(name, name.replace("-", "_")): name for name in names}
    failures: dict[str, str] = {}
    left = list(packages)
    while left:
        # One process for all, so that what they share is imported once.
        output, error = run_trial("imports", *left)
        begun = None
        for line in output:
            found = json.loads(line)
            begun = found["module"] if found["state"] == "begun" else None
            if found["state"] == "failed":
                failures[packages[found["module"]]] = found["reason"]
        if error is None:
            break
        if begun is None:
            failures[packages[left[0]]] = error
            break
        # It took the process with it; the rest have another.
        failures[packages[begun]] = f"importing it {error}"
        left = left[left.index(begun) + 1 :]
    return failures


def judge_required(requirement: Requirement, version: str | None, failure: str | None) -> Finding:
    """What to say of a package that is needed."""
    name = requirement.name.lower()
    wanted = shlex.quote(f"{name}{requirement.specifier}")
    fix = pip(wanted)
    if version is None:
        return Finding(name, BAD, "not installed", fix)
    if failure is not None:
        again = pip(f"--force-reinstall {wanted}")
        return Finding(name, BAD, f"{version} is installed, but {failure}", again)
    if not requirement.specifier.contains(version, prereleases=True):
        detail = f"{version}, but {requirement.specifier} is needed"
        return Finding(name, BAD if name in TESTED else NOTICE, detail, fix)
    return Finding(name, GOOD, version)


def judge_optional(
    name: str, extra: str, use: str, version: str | None, failure: str | None
) -> Finding:
    """What to say of a package that an extra brings."""
    here = checkout()
    fix = pip(f"'sedd_scale[{extra}]'" if here is None else f"-e '{here}[{extra}]'")
    if version is None:
        return Finding(name, OPTIONAL, f"not installed; for {use}", fix)
    if failure is not None:
        return Finding(name, NOTICE, f"{version} is installed, but {failure}; for {use}", fix)
    return Finding(name, GOOD, version)


def judge_triton(version: str | None, failure: str | None) -> Finding:
    """Triton comes with torch's CUDA builds."""
    if version is None:
        return Finding(
            "triton", OPTIONAL, "not installed; for fused kernels on a GPU", "a CUDA build of torch"
        )
    if failure is not None:
        return Finding("triton", NOTICE, f"{version} is installed, but {failure}")
    return Finding("triton", GOOD, version)


def check_wandb_key(environment: Mapping[str, str]) -> Finding:
    """Whether a key for Weights & Biases is there; nothing is sent."""
    name = "wandb key"
    if environment.get("WANDB_API_KEY"):
        return Finding(name, GOOD, "WANDB_API_KEY is set")
    try:
        file = netrc.netrc(os.environ.get("NETRC"))
        host = environment.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1]
        if file.authenticators(host.split("/")[0].split(":")[0]) is not None:
            return Finding(name, GOOD, "in the file of `wandb login`")
    except (OSError, netrc.NetrcParseError):
        pass
    return Finding(
        name, OPTIONAL, "none; for logging.wandb=online (offline needs none)", "wandb login"
    )


def check_slurm() -> Finding:
    """Slurm's commands, and whether a cluster answers them."""
    words = ["sinfo", "--noheader", "--format=%D %T"]
    try:
        nodes = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        return Finding(
            "Slurm",
            OPTIONAL,
            "not on this machine; for slurm/*.sh and sedd-scale submit",
            "use them on a login node of a cluster",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding("Slurm", NOTICE, f"sinfo does not answer: {error}")
    if nodes.returncode != 0:
        reason = (nodes.stderr.strip().splitlines() or ["no reason given"])[0]
        return Finding(
            "Slurm",
            OPTIONAL,
            f"its commands are here, but no cluster answers: {reason}",
            "use slurm/*.sh and sedd-scale submit on a login node of a cluster",
        )
    states = "; ".join(" ".join(line.split()) for line in nodes.stdout.splitlines()[:4])
    return Finding("Slurm", GOOD, f"nodes: {states or 'none'}")
