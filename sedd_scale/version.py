"""The version of this program, and the releases it takes of packages whose insides it knows."""

import importlib.metadata
import platform
import time

from sedd_scale.errors import InstallationError

__version__ = "0.1.0"
# Their undocumented parts are used, and change without notice.
TESTED = {"deepspeed": ("0.19.8",), "megatron-core": ("0.16.1",)}


def versions() -> dict[str, str]:
    """Of this program and of what its results may depend on."""
    packages = ("torch", "deepspeed", "megatron-core", "numpy")
    return {
        "sedd_scale": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


def now() -> str:
    """Date, time and offset, as records hold it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def require_tested(package: str) -> None:
    """Refuse a release of `package` outside `TESTED`.

    Raises:
        InstallationError: names the release and those that work.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "no release"
    if found.partition("+")[0] not in TESTED[package]:
        known = " or ".join(TESTED[package])
        raise InstallationError(
            f"{package} {known} is needed and {found} is installed: "
            f"pip install {package}=={TESTED[package][-1]}"
        )
